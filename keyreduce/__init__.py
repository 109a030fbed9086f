"""keyreduce: structured pruning of DeltaNet-family language models.

The package imports nothing heavy: ``torch``, ``transformers`` and ``fla`` are loaded by the
commands that compute, so that the command line's help answers at once.
"""

__version__ = "0.1.0"
