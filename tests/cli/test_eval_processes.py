"""``keyreduce eval`` under torchrun: one report, and the figures of one process to the last digit."""

import json
import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SIZES = ("--num-batches", 3, "--batch-size", 2, "--seq-len", 48, "--stride", 32)
RECALL = ("--recall", "mqar,needle", "--recall-lengths", "200", "--recall-pairs", "2", "--recall-probes", 3)


def test_two_processes_report_what_one_does(keyreduce, python, tiny_folder):
    arguments = ("eval", "--model", tiny_folder("delta_net"), "--device", "cpu", *SIZES, *RECALL)
    alone = keyreduce(*arguments, "--json").json()
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "flash-linear-attention")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "keyreduce", *map(str, arguments), "--work", "both", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == alone
    assert json.loads(Path("both/eval.json").read_text()) == alone
    assert done.stderr.count("there is no pruned model at") == 1
