"""Child processes, with small children of Python that import nothing heavy; and the processes of torchrun."""

import math
import os
import signal
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

import pytest

from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity
from keyreduce.processes import Job, Processes, command_line, gpus, last_line, run_jobs

REPOSITORY = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("processes_worker.py")


def job(folder: Path, name: str, code: str, **env: str) -> Job:
    return Job(name, [sys.executable, "-S", "-c", code], folder / "logs" / f"{name}.log", env)


def test_outcomes_come_in_the_order_of_the_jobs(tmp_path):
    ended = []
    outcomes = run_jobs(
        [
            job(tmp_path, "slow", "import time; time.sleep(0.5); print('a')"),
            job(tmp_path, "fast", "print('b')"),
            job(tmp_path, "last", "import sys; print('c', file=sys.stderr)"),
        ],
        workers=3,
        progress=lambda outcome: ended.append(outcome.job.name),
    )
    assert [outcome.job.name for outcome in outcomes] == ["slow", "fast", "last"]
    assert all(outcome.code == 0 and outcome.message == "" for outcome in outcomes)
    assert sorted(ended) == ["fast", "last", "slow"]
    assert outcomes[0].seconds >= 0.5
    assert [outcome.job.log.read_text() for outcome in outcomes] == ["a\n", "b\n", "c\n"]


def test_a_job_that_fails_is_told_and_the_others_go_on(tmp_path):
    outcomes = run_jobs(
        [
            job(tmp_path, "bad", "import sys; print('first'); print('keyreduce: no such model\\n'); sys.exit(2)"),
            job(tmp_path, "silent", "import sys; sys.exit(3)"),
            Job("absent", [str(tmp_path / "no such program")], tmp_path / "absent.log"),
            job(tmp_path, "killed", "import os, signal; print('half', flush=True); os.kill(os.getpid(), 9)"),
            job(tmp_path, "good", "print('done')"),
        ]
    )
    assert [outcome.code for outcome in outcomes] == [2, 3, 127, -signal.SIGKILL, 0]
    assert [outcome.code == 0 for outcome in outcomes] == [False, False, False, False, True]
    assert outcomes[0].message == "no such model"
    assert "exit code 3" in outcomes[1].message
    assert "cannot be run: No such file" in outcomes[2].message
    assert "SIGKILL" in outcomes[3].message and "memory" in outcomes[3].message


# Says when it began and ended, and what it was given.
_REPORT = """
import os, time
begin = time.monotonic()
time.sleep(0.3)
print(begin, time.monotonic(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"])
"""


def reports(outcomes) -> list[tuple[float, float, str, str]]:
    lines = [outcome.job.log.read_text().split() for outcome in outcomes]
    return [(float(begin), float(end), device, threads) for begin, end, device, threads in lines]


def most_at_once(spans) -> int:
    return max(sum(begin <= moment < end for begin, end, *_ in spans) for moment, *_ in spans)


def test_only_so_many_run_at_a_time(tmp_path):
    spans = reports(run_jobs([job(tmp_path, str(n), _REPORT) for n in range(5)], workers=2))
    assert most_at_once(spans) <= 2
    spans = reports(run_jobs([job(tmp_path, str(n), _REPORT) for n in range(2)]))
    assert most_at_once(spans) == 1


def test_no_two_jobs_share_a_device(tmp_path):
    spans = reports(run_jobs([job(tmp_path, str(n), _REPORT) for n in range(5)], devices=["4", "GPU-b"]))
    assert {device for *_, device, _ in spans} == {"4", "GPU-b"}
    for device in ("4", "GPU-b"):
        assert most_at_once([span for span in spans if span[2] == device]) == 1


def test_more_workers_than_devices_share_them(tmp_path):
    spans = reports(run_jobs([job(tmp_path, str(n), _REPORT) for n in range(4)], workers=4, devices=["0", "1"]))
    assert sorted(device for *_, device, _ in spans) == ["0", "0", "1", "1"]


def test_the_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    three = [job(tmp_path, str(n), _REPORT) for n in range(3)]
    assert {(device, threads) for *_, device, threads in reports(run_jobs(three, workers=3))} == {("7", "2")}
    # Workers that have nothing to do take no cores.
    assert {threads for *_, threads in reports(run_jobs(three[:2], workers=16))} == {"4"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert {threads for *_, threads in reports(run_jobs(three, workers=3))} == {"5"}
    own = [job(tmp_path, "own", _REPORT, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="3")]
    assert [(device, threads) for *_, device, threads in reports(run_jobs(own, devices=["0"]))] == [("3", "1")]


def test_no_jobs_need_nothing():
    assert run_jobs([], workers=4, devices=["0"]) == []


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(KeyreduceError, match="cannot write"):
        run_jobs([job(tmp_path, "a", "pass")])


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A child that has ended stays a zombie until its parent asks; where init does not, it is still over.
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# A child that has a child, and clears up when it is interrupted.
_PARENT = """
import pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
(folder / "pids.new").write_text(str(child.pid))
try:
    (folder / "pids.new").rename(folder / "pids")  # from now on it may be interrupted
    time.sleep(600)
except KeyboardInterrupt:
    (folder / "cleared").touch()
"""


# The command line with a command that runs jobs. SIGHUP is ignored where it is told so, whatever started this.
_RUNNER = """
import pathlib, signal, sys
from keyreduce import cli
from keyreduce.processes import Job, run_jobs
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv.pop() == "nohup" else signal.SIG_DFL)

@cli.app.command()
def work(folder: str):
    child = [sys.executable, "-S", folder + "/parent.py", folder]
    log = pathlib.Path(folder, "log")
    run_jobs([Job("a", child, log), Job("b", ["touch", folder + "/b"], log)])

sys.argv.insert(1, "work")
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "hangup", "code"),
    [(signal.SIGINT, "", 130), (signal.SIGTERM, "", 143), (signal.SIGHUP, "", 129), (signal.SIGTERM, "nohup", 143)],
)
def test_a_signal_ends_the_children_and_theirs(tmp_path, number, hangup, code):
    (tmp_path / "parent.py").write_text(_PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", _RUNNER, tmp_path, hangup], env=environment)
    wait_for((tmp_path / "pids").exists)
    grandchild = int((tmp_path / "pids").read_text())
    assert is_alive(grandchild)
    if hangup:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(60) == code
    wait_for(lambda: not is_alive(grandchild))
    assert (tmp_path / "cleared").exists()
    assert not (tmp_path / "b").exists()


def test_an_error_in_between_ends_the_children(tmp_path):
    def fail(outcome):
        raise RuntimeError("stop")

    forever = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    log = tmp_path / "logs" / "long.log"
    once_it_runs = f"import os, time\nwhile not os.stat({str(log)!r}).st_size: time.sleep(0.01)"
    log.parent.mkdir()
    log.touch()
    with pytest.raises(RuntimeError, match="stop"):
        run_jobs([job(tmp_path, "long", forever), job(tmp_path, "short", once_it_runs)], workers=2, progress=fail)
    assert not is_alive(int(log.read_text().split()[0]))


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_bytes(b"x" * 100_000 + b"\nkeyreduce: bad \xff model\n\n  \n")
    assert last_line(log) == "bad \N{REPLACEMENT CHARACTER} model"
    log.write_bytes(b"  1%| 1/9\r 50%| 5/9keyreduce: stopped\n")
    assert last_line(log) == "stopped"
    log.write_bytes(b"first\r second\r")
    assert last_line(log) == "second"


def test_keyreduce_itself_runs_as_a_job(tmp_path):
    command = [sys.executable, "-m", "keyreduce", "verify", str(tmp_path / "no model")]
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "300"}
    (outcome,) = run_jobs([Job("verify", command, tmp_path / "log", environment)])
    assert outcome.code == 2 and "no model" in outcome.message


def test_gpus_are_those_that_may_be_used(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-x")
    assert gpus() == ["3", "GPU-x"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


def test_an_error_in_one_process_is_told_by_the_first(tmp_path):
    """The others end quietly. What processes find when all is well is in tests/cli/test_eval_processes.py."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, WORKER, tmp_path], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0").read_text().splitlines() == [
        "raised: the disk is made of cheese",
        "another process of torchrun has ended early; its message says why",
    ]
    assert (tmp_path / "1").read_text().splitlines() == ["exit: 2", "ends early"]


def test_one_process_alone_is_no_group(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "4")  # as some clusters set them for programs that are not torchrun's
    alone = Processes.of_torchrun()
    assert alone == (0, 1, 0)
    assert alone.gather(lambda: {"found": 1}) == [{"found": 1}]
    assert alone.device(None) is None and alone.rank == 0
    with alone.adding() as add:
        add(None)
    with pytest.raises(KeyreduceError, match="cheese"):
        alone.gather(lambda: (_ for _ in ()).throw(KeyreduceError("cheese")))


@pytest.mark.parametrize("number", [1, 2, 4, 9])
def test_each_item_is_done_once(number):
    shares = [list(Processes(rank, number).own(range(7))) for rank in range(number)]
    dealt = [item for row in zip_longest(*shares) for item in row if item is not None]
    assert dealt == list(range(7))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Processes(rank, 4, rank).device(None) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Processes(5, 8, 1).device("cuda") == "cuda:1"
    assert Processes(5, 8, 1).device("cpu") == "cpu"
    assert Processes().device(None) is None


def test_the_order_of_rows_changes_no_digit_of_the_sum():
    rows = [Perplexity(nats, 1, 2, 3) for nats in (1e16, 1.0, 0.1, 3e-9, 1e16 / 3)]
    sums = {Perplexity.of(rows[start:] + rows[:start]).nats for start in range(len(rows))}
    assert sums == {math.fsum(row.nats for row in rows)}
    assert Perplexity.of(rows).words == 15


def test_torch_is_not_loaded_with_the_module():
    code = "import sys, keyreduce.processes; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("program", "named"),
    [("/a/bin/keyreduce", "keyreduce"), (str(REPOSITORY / "keyreduce/__main__.py"), "keyreduce"), ("/a/b.py", "b.py")],
)
def test_a_command_line_is_one_that_runs_again(monkeypatch, program, named):
    monkeypatch.setattr(sys, "argv", [program, "prune", "--text", "a b"])
    assert command_line() == f"{named} prune --text 'a b'"
