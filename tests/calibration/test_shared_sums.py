"""Calibration under torchrun: each process takes its share of the batches, and all get the sums over all of them."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from keyreduce.calibration.file import read_statistics
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import text_source

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("shared_worker.py")


@pytest.mark.parametrize(("number", "device"), [(2, "cpu"), (3, "cpu"), pytest.param(2, "cuda", marks=pytest.mark.gpu)])
def test_every_process_gets_the_sums_of_all(python, tmp_path, tiny_folder, number, device):
    """Five batches: with three processes the last has one alone. Of several GPUs each process has one."""
    text, model = tmp_path / "text.txt", tiny_folder("gated_deltanet")
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    paths = [str(REPOSITORY), str(REPOSITORY / "flash-linear-attention"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*torchrun, WORKER, model, text, tmp_path, device], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole = calibrate(
        open_folder(model), text_source((text,), None, None, None, default="calibration"),
        Settings(num_batches=5, batch_size=2, seq_len=24), device=torch.device(device), dtype=torch.float32,
        gradients=True,
    )  # fmt: skip
    for rank in range(number):
        shared = read_statistics(tmp_path / str(rank))
        assert (shared.tokens, shared.inputs) == (whole.tokens, whole.inputs)
        assert shared.layers.keys() == whole.layers.keys()
        for layer, statistics in whole.layers.items():
            for name, tensor in statistics.tensors().items():
                # A gradient is summed in float32.
                tolerance = dict(rtol=1e-4, atol=1e-6) if "element" in name else dict(rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(shared.layers[layer].tensors()[name], tensor, **tolerance, msg=name)
