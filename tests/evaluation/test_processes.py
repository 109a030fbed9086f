"""The processes of torchrun: what each of them does, and how they end."""

import math
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity
from keyreduce.processes import Processes

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("processes_worker.py")


def test_an_error_in_one_process_is_told_by_the_first(tmp_path):
    """The others end quietly. What processes find when all is well is in tests/cli/test_eval_processes.py."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, WORKER, tmp_path], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0").read_text() == "raised: the disk is made of cheese"
    assert (tmp_path / "1").read_text() == "exit: 2"


def test_one_process_alone_is_no_group(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it for programs that are not torchrun's
    alone = Processes.of_torchrun()
    assert alone == (0, 1, 0)
    assert alone.gather(lambda: {"found": 1}) == [{"found": 1}]
    assert alone.device(None) is None
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
