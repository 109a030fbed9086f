def benchmark(): pass
