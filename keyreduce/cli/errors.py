"""How a command ends when the input is bad: one line on stderr, exit code 2."""

import sys
from typing import NoReturn

show_tracebacks = False
"""Set by ``--debug``."""


def stop(message: str) -> NoReturn:
    """Print the message as one line and exit with code 2."""
    # A name out of a damaged file need not be Unicode.
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    # In one piece: processes of torchrun may be stopping at the same time.
    sys.stderr.write(f"keyreduce: {line}\n")
    sys.exit(2)
