"""A stand-in for Python whose programs start at once: forks of one process that has imported torch, transformers, fla.

To import them takes ten seconds, which is longer than what most tests let a process of its own do. It is called as
Python is, with a script, ``-m`` or ``-c``, and has environment, folder, pipes and exit code of its own. Signals reach
the fork, which is killed with it. torchrun finds it as ``sys.executable``, and starts its processes by it.
"""

import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

CLIENT = Path(__file__).with_name("forks_client.py")


@contextlib.contextmanager
def python_of_forks(folder: Path) -> Iterator[str]:
    """Start the process that forks, and yield the path of what stands in for Python."""
    address, script = folder / "forks", folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{CLIENT}" "{address}" "$@"\n')
    script.chmod(0o755)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = "import sys, forks; forks.serve(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(address), str(script)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=folder, **pipes) as server:
        assert server.stdout.readline() == b"ready\n"
        yield str(script)
        server.stdin.close()


def serve(address: str, script: str) -> None:
    """Import, and then fork for each program that is asked for, until stdin is closed."""
    gc.disable()
    with warnings.catch_warnings(action="ignore"):
        _import()
    gc.freeze()
    gc.enable()
    sys.executable = script
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that have ended
        print("ready", flush=True)
        while sys.stdin not in (ready := select.select([sys.stdin, listening], [], [])[0]):
            assert ready
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _attend(connection)
                os._exit(0)
            connection.close()


def _import() -> None:
    import fla_torch

    fla_torch.enable()
    import fla  # noqa: F401, registers its models
    import torch.distributed.launcher.api  # noqa: F401

    import keyreduce.api.functions
    import keyreduce.cli
    import keyreduce.recovery.training.run  # noqa: F401

    with contextlib.suppress(ImportError):
        import accelerate  # noqa: F401
        import peft  # noqa: F401


def _attend(connection: socket.socket) -> None:
    """Fork once more, for the program; pass signals on to it, and its exit code back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, pipes, *_ = socket.recv_fds(connection, 8, 100)
    with connection.makefile("rb") as file:
        asked = json.loads(file.read(int.from_bytes(length)))
    program = os.fork()
    if program == 0:
        connection.close()
        _place(pipes, asked.pop("numbers"))
        os._exit(_run(**asked))
    for pipe in pipes:
        os.close(pipe)
    while True:
        if select.select([connection], [], [], 0.02)[0]:
            numbers = connection.recv(100)
            for number in numbers or [signal.SIGKILL]:
                os.kill(program, number)
        ended, status = os.waitpid(program, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(2, signed=True))
            return


def _place(pipes: list[int], numbers: list[int]) -> None:
    """Give open files the numbers that they had where they come from."""
    out_of_the_way = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 500) for pipe in pipes]
    for pipe in pipes:
        os.close(pipe)
    for pipe, number in zip(out_of_the_way, numbers, strict=True):
        os.dup2(pipe, number)
        os.close(pipe)


def _run(words: list[str], environment: dict[str, str], folder: str) -> int:
    """Do in this process what Python does with its arguments, and return the exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):
        if words[0] == "-W":
            warnings.simplefilter(words[1])
        words = words[2:] if words[0] == "-W" else words[1:]
    kind, sys.argv = words[0], words
    code = 0
    try:
        if kind == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            sys.argv, sys.path = ["-c", *words[2:]], ["", *sys.path]
            exec(words[1], main.__dict__)
        elif kind == "-m":
            sys.argv, sys.path = words[1:], [folder, *sys.path]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
