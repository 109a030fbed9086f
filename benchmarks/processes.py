"""Running a command, or one function in a process of its own: the seconds, and the most anonymous memory it held.

Anonymous memory is what a process allocates, and not the files it maps, which the kernel can drop. It is read from
/proc, as Linux has it.
"""

import multiprocessing
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

SAMPLE_SECONDS = 0.005


class Measured(NamedTuple):
    """One run: seconds, and peak anonymous bytes of the process and its descendants together, and of it alone."""

    seconds: float
    tree: int
    main: int


class Failed(Exception):
    """What was to be measured did not run to its end; the text says why."""


class MemorySampler:
    """While the block runs, a thread looks at the anonymous memory of a process and of its descendants.

    Attributes:
        tree, main: the most bytes seen, in all of them together and in the process alone.
    """

    def __init__(self, pid: int):
        self.pid, self.tree, self.main = pid, 0, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            held = [anonymous_bytes(pid) for pid in family_tree(self.pid)]
            self.main, self.tree = max(self.main, held[0]), max(self.tree, sum(held))
            if self._stopped.wait(SAMPLE_SECONDS):
                return


def can_measure() -> bool:
    """Return whether this system says what a process holds, and which children it has."""
    return Path(f"/proc/self/task/{os.getpid()}/children").is_file()


def family_tree(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    try:
        # A child is listed under the thread that started it.
        threads = os.listdir(f"/proc/{pid}/task")
        children = [Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in threads]
    except OSError:
        return  # it has ended meanwhile
    for child in " ".join(children).split():
        yield from family_tree(int(child))


def anonymous_bytes(pid: int) -> int:
    """Return the resident anonymous memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def run_command(command: Sequence[str | Path]) -> Measured:
    """Run a command and measure it from its start to its end.

    Raises:
        Failed: it ended with an error; the text is the last line that it wrote to stderr.
    """
    with tempfile.TemporaryFile() as errors:
        start = perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        with MemorySampler(process.pid) as memory:
            code = process.wait()
            seconds = perf_counter() - start
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if code != 0:
        raise Failed(said[-1] if said else f"it ended with code {code}")
    return Measured(seconds, memory.tree, memory.main)


def run_function(prepare: Callable[..., Callable[[], object]], *arguments: object) -> Measured:
    """Start a process, let it call ``prepare``, and measure there the function that this returns, and nothing before.

    Args:
        prepare: a function that a fresh process can import.
        arguments: what it is given; they can be pickled.

    Raises:
        Failed: one of the two raised an error, or the process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_call_when_told, args=(theirs, prepare, arguments))
    process.start()
    theirs.close()
    try:
        _receive(ours)
        with MemorySampler(process.pid) as memory:
            ours.send("start")
            seconds = _receive(ours)
    finally:
        ours.close()
        process.join()
    return Measured(seconds, memory.tree, memory.main)


def _call_when_told(connection: Connection, prepare: Callable, arguments: tuple) -> None:
    try:
        function = prepare(*arguments)
        connection.send("ready")
        connection.recv()
        start = perf_counter()
        function()
        connection.send(perf_counter() - start)
    except Exception as error:
        connection.send(Failed(f"{type(error).__name__}: {error}"))


def _receive(connection: Connection) -> object:
    try:
        message = connection.recv()
    except EOFError:
        raise Failed("its process was killed") from None
    if isinstance(message, Failed):
        raise message
    return message
