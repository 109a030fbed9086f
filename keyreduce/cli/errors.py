"""How a command ends: with one line on stderr and exit code 2 where the input is bad, by a signal, under torchrun."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NoReturn

from keyreduce.errors import KeyreduceError
from keyreduce.processes import Processes, is_torchrun

show_tracebacks = False
"""Whether ``--debug`` was given."""
_flags: dict[str, str] = {}
_kept: list[str] = []


def begin_command(flags: Mapping[str, str], *, show_tracebacks: bool) -> None:
    """Remember what the running command calls the fields of its request, and whether tracebacks are wanted."""
    globals()["show_tracebacks"] = show_tracebacks
    _kept.clear()
    _flags.clear()
    _flags.update(flags)


def message_of(error: KeyreduceError) -> str:
    """Return an error's message in the words of the command line."""
    return error.with_names(lambda field: _flags.get(field, f"--{field.replace('_', '-')}"))


def tell(message: str) -> int:
    """Print the message as one line, and return the exit code 2."""
    # A name out of a damaged file need not be Unicode.
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    with contextlib.suppress(OSError):  # of a stderr that takes nothing
        # In one piece: processes of torchrun may be stopping at the same time.
        sys.stderr.write(f"keyreduce: {line}\n")
    return 2


def keep(what: str) -> None:
    """Remember what stays if the running command is stopped from now on."""
    _kept.append(what)


def tell_stopped(number: int) -> int:
    """Say what a command that a signal has stopped leaves, and return its exit code."""
    if Processes.of_torchrun().rank == 0:
        tell("stopped; " + (f"kept: {'; '.join(_kept)}" if _kept else "no output was written"))
    return 128 + number


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that what is half made is removed.

    Not where they are ignored, as by nohup; and not under torchrun, where a process may be waiting for another one in
    a call that no exception ends.
    """
    may_set = threading.current_thread() is threading.main_thread() and not is_torchrun()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP) if may_set}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def unwind(number: int, _: object) -> NoReturn:
        # A terminal that closes says so twice: the second signal must not interrupt the clearing.
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in before:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """End the process, after what it has put off until its end: what is to be printed, and temporary folders."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try once more, and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Who reads no further, such as `head`, has what it wanted.
        code = code or (1 if isinstance(error, BrokenPipeError) else tell(f"cannot write to stdout: {error.strerror}"))
    if not is_torchrun():
        sys.exit(code)
    # Not by way of destructors: that of gloo's process group waits for its threads while it holds the GIL, for which
    # one of those threads may be waiting to let go of a tensor (seen with torch 2.13).
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)
