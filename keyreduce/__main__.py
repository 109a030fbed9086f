"""``python -m keyreduce`` is ``keyreduce``."""

from keyreduce.cli import main

main()
