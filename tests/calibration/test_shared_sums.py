"""Calibration under torchrun: each process takes its share of the batches, and all get the sums over all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keyreduce.calibration import run
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import text_source
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.processes import Processes

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("shared_worker.py")
OPTIONS = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_every_process_gets_the_sums_of_all(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, WORKER, tmp_path], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert (tmp_path / rank).read_text() == "300 {0: {11.0}, 4: {55.0}}"


def test_shares_add_up_to_the_whole(tmp_path, tiny_folder, monkeypatch):
    """Five batches among three: the last process has one alone."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    text = text_source((tmp_path / "text.txt",), None, None, None, default="calibration")
    source, settings = open_folder(tiny_folder("delta_net")), Settings(num_batches=5, batch_size=2, seq_len=24)
    whole = calibrate(source, text, settings, **OPTIONS)
    monkeypatch.setattr(run, "add_up", lambda layers, tokens: (layers, tokens))
    shares = [calibrate(source, text, settings, **OPTIONS, processes=Processes(rank, 3)) for rank in range(3)]
    assert [share.tokens for share in shares] == [96, 96, 48]
    assert {str(share.inputs) for share in shares} == {str(whole.inputs)}
    for layer, statistics in whole.layers.items():
        for name, tensor in statistics.tensors().items():
            added = sum(share.layers[layer].tensors()[name] for share in shares)
            torch.testing.assert_close(added, tensor, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_are_of_one_process(tmp_path, tiny_folder):
    with pytest.raises(KeyreduceError, match="without torchrun"):
        calibrate(
            open_folder(tiny_folder("delta_net")), None, Settings(), **OPTIONS, gradients=True,
            processes=Processes(0, 2),
        )  # fmt: skip
