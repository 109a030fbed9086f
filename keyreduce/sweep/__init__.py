"""Recipes, their runs, and tables of the results.

A sweep plans requests of :mod:`keyreduce.api` and lets other processes carry them out, so it stands above that folder.
That is why the requests of ``keyreduce sweep`` and ``keyreduce table`` are here, in :mod:`keyreduce.sweep.request`.
"""
