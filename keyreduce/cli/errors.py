"""How a command ends: when the input is bad, with one line on stderr and exit code 2; and under ``torchrun``."""

import atexit
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from keyreduce.errors import KeyreduceError

show_tracebacks = False
"""Whether ``--debug`` was given."""
_flags: dict[str, str] = {}


def begin_command(flags: Mapping[str, str], *, show_tracebacks: bool) -> None:
    """Remember what the running command calls the fields of its request, and whether tracebacks are wanted."""
    globals()["show_tracebacks"] = show_tracebacks
    _flags.clear()
    _flags.update(flags)


def message_of(error: KeyreduceError) -> str:
    """Return an error's message in the words of the command line."""
    return error.with_names(lambda field: _flags.get(field, f"--{field.replace('_', '-')}"))


def stop(message: str) -> NoReturn:
    """Print the message as one line and exit with code 2."""
    # A name out of a damaged file need not be Unicode.
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    # In one piece: processes of torchrun may be stopping at the same time.
    sys.stderr.write(f"keyreduce: {line}\n")
    sys.exit(2)


def leave(code: int) -> NoReturn:
    """End a process of ``torchrun``, with what it has put off until its end, such as the removal of temporary folders.

    Not by way of destructors: that of gloo's process group waits for its threads while it holds the GIL, for which one
    of those threads may be waiting to let go of a tensor (seen with torch 2.13).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
