"""A run that is killed, meets a full disk, or has company leaves its source as it was and its output whole or absent.

One process imports everything and then forks for each run: starting Python and torch anew would take minutes.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_models import build, save

from keyreduce.checkpoint.find import open_model
from keyreduce.checkpoint.verify import check_finite

KILLS = 30
PRUNE = ("prune", "--method", "l2", "--model")
REPOSITORY = Path(__file__).parents[2]

# Runs the command line in a fork, which kills itself at the n-th call that touches the disk. It prints how often it
# touched it, where it was not killed before.
FORKS = """
import contextlib, os, signal, sys
import torch
from keyreduce.checkpoint import writing
from keyreduce.cli import main

# What the commands import is there before the first fork.
for command in ("prune --method l2 --output cut", "convert-dcp cut dcp", "convert-dcp dcp hf"):
    sys.argv = ["keyreduce", *command.split()]
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        try:
            main()
        except SystemExit as exit_:
            assert not exit_.code, command

def run(arguments, deadly):
    calls = 0
    def count():
        nonlocal calls
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
    def audit(event, _):
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
            count()
    def counted(function):
        def call(*arguments, **options):
            count()
            return function(*arguments, **options)
        return call
    os.copy_file_range = counted(os.copy_file_range)
    writing.write_all = counted(writing.write_all)
    torch.save = counted(torch.save)
    sys.addaudithook(audit)
    sys.argv = ["keyreduce", *arguments]
    try:
        main()
    except SystemExit as exit_:
        return exit_.code or 0, calls

for line in sys.stdin:
    deadly, *arguments = line.rstrip("\\n").split("\\t")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        code, calls = run(arguments, int(deadly))
        os.write(writer, str(calls).encode())
        os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), os.read(reader, 100).decode() or "-", flush=True)
    os.close(reader)
"""


@pytest.fixture(scope="module")
def forked(python, tmp_path_factory):
    """A function that runs a command in a fork, killed at the call of that number; it returns exit code and calls."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [python, "-W", "ignore", "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path_factory.mktemp("forks"),
    )

    def run(*arguments: object, deadly: int = 0) -> tuple[int, int | None]:
        process.stdin.write("\t".join(map(str, (deadly, *arguments))) + "\n")
        process.stdin.flush()
        code, calls = process.stdout.readline().split()
        return int(code), None if calls == "-" else int(calls)

    yield run
    process.stdin.close()
    assert process.wait(60) == 0


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path) -> dict[str, bytes]:
    """What does not depend on when and where it was made."""
    return {name: data for name, data in bytes_of(folder).items() if name.endswith((".safetensors", ".distcp"))}


@pytest.mark.parametrize("command", ["prune", "prune --overwrite", "convert-dcp to DCP", "convert-dcp to HF"])
def test_killed_at_any_moment(forked, tmp_path, command):
    model = tmp_path / "model"
    save(build("delta_net"), model, max_shard_size="40KB")
    source = model
    if command.endswith("to HF"):
        assert forked("convert-dcp", model, tmp_path / "dcp")[0] == 0
        source = tmp_path / "dcp" / "step-0"
    target = tmp_path / "out" / ("step-0" if command.endswith("to DCP") else "cut")
    named = target.parent if command.endswith("to DCP") else target
    prune = (*PRUNE, model, "--ratio", 0.5, "--output")
    arguments = (*prune, named) if command.startswith("prune") else ("convert-dcp", source, named)
    old = None
    if command.endswith("--overwrite"):
        assert forked("prune", "--method", "l1", "--keep", 3, "--model", model, "--output", tmp_path / "old")[0] == 0
        old = weights_of(tmp_path / "old")
        arguments = (*arguments, "--overwrite")

    def put_old() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(tmp_path / "old", target)

    code, calls = forked(*arguments)
    assert code == 0
    made, before = weights_of(target), bytes_of(source)
    assert made and made != old
    # Most of the calls read what precedes the writing; the last ones are the dangerous ones.
    points = random.Random(0).choices(range(1, calls + 1), weights=range(1, calls + 1), k=2 * KILLS)
    seen, killed = set(), 0
    for deadly in points:
        if killed == (KILLS if command == "prune" else KILLS // 3):
            break
        if old is None:
            shutil.rmtree(target, ignore_errors=True)
        else:
            put_old()
        code, _ = forked(*arguments, deadly=deadly)
        if code == 0:
            continue  # it made a few calls fewer this time
        killed += 1
        assert code == -signal.SIGKILL, (deadly, calls)
        assert bytes_of(source) == before
        if target.exists():
            check_finite(open_model(str(target)))
            assert weights_of(target) in ([made] if old is None else [made, old])
        seen.add(target.exists())
        left = [path for path in target.parent.glob(".*")] if target.parent.exists() else []
        again = forked(*arguments)
        assert again[0] == 0, (deadly, left)
        assert weights_of(target) == made
        assert [path.name for path in target.parent.iterdir()] == [target.name]
    else:
        pytest.fail(f"only {killed} runs were killed")
    assert False in seen or old is not None


WRITES = ["config.json", "tokenizer.json", "model.safetensors", "keyreduce.json", "README.md"]


@pytest.mark.parametrize("file", WRITES)
def test_a_full_disk(keyreduce, tiny_folder, tmp_path, monkeypatch, file):
    """Everything that is written into one file meets a disk without room."""
    import builtins

    def fails(path, flags) -> bool:
        return Path(str(path)).name == file and ".partial" in str(path) and ("w" in flags or "x" in flags)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = builtins.open

    def guarded(path, mode="r", *arguments, **options):
        return full() if fails(path, mode) else original(path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr("io.open", guarded)
    result = keyreduce(*PRUNE, tiny_folder("delta_net"), "--output", tmp_path / "out" / "cut")
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1 and "No space left on device" in result.err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_in_the_middle_of_a_tensor(keyreduce, tiny_folder, tmp_path, monkeypatch):
    from keyreduce.checkpoint import writing

    room = 20_000

    def write(file, data):
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)

    def copy(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "write_all", write)
    monkeypatch.setattr(os, "copy_file_range", copy)
    result = keyreduce(*PRUNE, tiny_folder("delta_net"), "--output", tmp_path / "cut")
    assert result.code == 2 and "No space left on device" in result.err and len(result.err.splitlines()) == 1
    assert not list(tmp_path.glob("*cut*"))


def test_two_runs_at_one_target(keyreduce, python, tiny_folder, tmp_path, monkeypatch):
    """The second one starts while the first is writing; it stops, says why, and does not disturb the first."""
    from keyreduce.checkpoint import rewrite

    started, over = threading.Event(), threading.Event()
    target = tmp_path / "cut"
    arguments = [*PRUNE, str(tiny_folder("delta_net")), "--output", str(target)]
    second = {}
    write_weights = rewrite.write_weights

    def meanwhile() -> None:
        started.wait(60)
        second["done"] = subprocess.run(
            [python, "-m", "keyreduce", *arguments],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=300,
            check=False,
        )
        over.set()

    def slow(*positional, **options):
        started.set()
        assert over.wait(300)
        write_weights(*positional, **options)

    monkeypatch.setattr(rewrite, "write_weights", slow)
    thread = threading.Thread(target=meanwhile)
    thread.start()
    result = keyreduce(*arguments)
    thread.join()
    assert result.code == 0, result.err
    assert second["done"].returncode == 2
    assert "another run is writing" in second["done"].stderr and len(second["done"].stderr.splitlines()) == 1
    check_finite(open_model(str(target)))
    assert [path.name for path in tmp_path.glob("*cut*")] + list(tmp_path.glob(".*")) == ["cut"]


def test_what_appears_meanwhile_is_left_alone(keyreduce, tiny_folder, tmp_path, monkeypatch):
    from keyreduce.checkpoint import rewrite

    target = tmp_path / "cut"
    write_weights = rewrite.write_weights

    def write(*positional, **options):
        write_weights(*positional, **options)
        target.mkdir()
        (target / "note").write_text("mine")

    monkeypatch.setattr(rewrite, "write_weights", write)
    result = keyreduce(*PRUNE, tiny_folder("delta_net"), "--output", target)
    assert result.code == 2 and "has appeared meanwhile" in result.err
    assert bytes_of(target) == {"note": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(keyreduce, tiny_folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    result = keyreduce(*PRUNE, tiny_folder("delta_net"), "--output", tmp_path / "locked" / "x")
    assert result.code == 2 and "cannot write to" in result.err and len(result.err.splitlines()) == 1


ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}

# The command line with a command that claims an output, says so, and works until it is stopped.
WORK = """
import os, pathlib, signal, sys, time
from keyreduce import cli
from keyreduce.cli.console import Console
from keyreduce.outputs import claimed

kept = [argument for argument in sys.argv[1:] if argument != "nohup"]

@cli.app.command()
def work():
    with claimed(pathlib.Path("out/model"), folder=True) as claim, claim.appearing() as made:
        (made / "half").touch(), (claim.scratch / "cut").mkdir()
        console = Console(as_json=False)
        for what in kept:
            console.keep(what)
        print("begun", flush=True)
        time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
sys.argv = ["keyreduce", "work"]
cli.main()
"""


def stop(process: subprocess.Popen, number: int) -> int:
    process.send_signal(number)
    return process.wait(60)


@pytest.mark.parametrize(
    ("kept", "said"), [((), "no output was written"), (("one", "two"), "kept: one; two")], ids=["nothing", "something"]
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_unwinds(tmp_path, number, code, kept, said):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", WORK, *kept], cwd=tmp_path, env=ENVIRONMENT, text=True, **pipes)
    assert process.stdout.readline() == "begun\n"
    assert {path.name for path in tmp_path.glob("out/**/*")} > {".model.lock", ".model.partial", "half", "cut"}
    assert stop(process, number) == code
    assert process.stderr.read().strip() == f"keyreduce: stopped; {said}"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    command = [sys.executable, "-c", WORK, "nohup"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.send_signal(signal.SIGHUP)
        process.wait(0.5)
    assert stop(process, signal.SIGTERM) == 143
    assert list(tmp_path.iterdir()) == []


def test_calibrate_unwinds_and_keeps_another_one_out(keyreduce, tiny_folder, tmp_path):
    arguments = ["calibrate", "--model", tiny_folder("delta_net"), "--work", tmp_path / "out", "--num-batches", 10**6]
    command = [sys.executable, "-m", "keyreduce", *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert "calibrating" in next((line for line in process.stderr if "calibrating" in line), "")
    second = keyreduce(*arguments)
    assert second.code == 2 and len(second.err.splitlines()) == 1 and "another run is writing" in second.err
    code = stop(process, signal.SIGTERM)
    assert (code, process.stderr.read()) == (143, "keyreduce: stopped; no output was written\n")
    assert not (tmp_path / "out").exists()


def test_calibrate_meets_a_full_disk(python, tiny_folder, tmp_path):
    """No file may be larger than the limit, which the system tells in the way it tells that a disk is full."""
    (tmp_path / "text.txt").write_text("the state is low-rank\n" * 100)
    arguments = ["calibrate", "--model", tiny_folder("delta_net"), "--output", tmp_path / "out" / "calibration"]
    arguments += ["--text", tmp_path / "text.txt", "--num-batches", 1, "--seq-len", 16]
    limited = (
        "import resource, keyreduce.cli; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); keyreduce.cli.main()"
    )
    command = [python, "-c", limited, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2  # the first says what is calibrated
    assert "keyreduce: cannot write" in done.stderr and "File too large" in done.stderr
    assert not (tmp_path / "out").exists()


# The command line with a command that prints as all of them do.
PRINT = """
from dataclasses import dataclass
from keyreduce import cli
from keyreduce.api.request import Result
from keyreduce.cli.console import Console

@dataclass(frozen=True, kw_only=True)
class Made(Result):
    made: bool = True

@cli.app.command()
def say(json: bool = False, lines: int = 1):
    console = Console(as_json=json)
    for line in range(lines):
        console.say(f"line {line}")
    console.finish(Made())

cli.main()
"""


@pytest.mark.parametrize("buffering", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["say", "--json"], ["say"], ["say", "--lines", "3000"], ["--help"], ["calibrate", "--help"]]
)
def test_stdout_that_is_full_or_closed(arguments, buffering):
    def left(stdout: int) -> tuple[int, list[str]]:
        """Return exit code and stderr, where tables go with --json."""
        command = [sys.executable, "-c", PRINT, *arguments]
        done = subprocess.run(
            command,
            env=ENVIRONMENT | {"PYTHONUNBUFFERED": buffering},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        os.close(stdout)
        return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("line ")]

    code, told = left(os.open("/dev/full", os.O_WRONLY))
    assert code == 2 and len(told) == 1 and told[0].startswith("keyreduce: cannot write to stdout")
    assert told[0].endswith(": No space left on device")
    reader, writer = os.pipe()
    os.close(reader)
    assert left(writer) == (1, [])
