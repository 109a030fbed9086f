"""The hand-over to flame and torchtitan: job files, and the script that asks whether a step-0 loads."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny_models import build, save

from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.folder import open_folder

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "flame/jobs").glob("*.toml"))
# Of flame's config_manager.py and train.py: an option that they have not would be taken without a word, and do nothing.
OPTIONS = {
    "job": {"dump_folder", "description", "print_args"},
    "model": {"name", "config", "tokenizer_path"},
    "optimizer": {"name", "lr", "eps", "implementation", "early_step_in_backward"},
    "lr_scheduler": {"warmup_steps", "decay_ratio", "decay_type", "lr_min"},
    "training": {
        *("batch_size", "seq_len", "context_len", "varlen", "gradient_accumulation_steps", "steps", "max_norm"),
        *("skip_nan_inf", "dataset", "dataset_name", "dataset_split", "streaming", "num_workers", "seed", "compile"),
        *("data_parallel_replicate_degree", "data_parallel_shard_degree"),
        *("mixed_precision_param", "mixed_precision_reduce", "pin_memory", "persistent_workers"),
    },
    "checkpoint": {
        *("enable_checkpoint", "folder", "interval", "load_step", "model_weights_only", "export_dtype"),
        *("keep_latest_k", "exclude_from_loading", "async_mode"),
    },
    "activation_checkpoint": {"mode", "selective_ac_option"},
    "metrics": {"log_freq", "enable_wandb", "enable_tensorboard"},
}
TOKENS = {"340m": 0.5e9, "1.3b": 1e9}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_say_what_flame_knows_and_the_readme_tells(path):
    job = tomllib.loads(path.read_text())
    for section, values in job.items():
        assert values.keys() <= OPTIONS[section]
    training = job["training"]
    rows = 8 * training["batch_size"] * training["gradient_accumulation_steps"]
    assert rows == 64
    assert rows * training["seq_len"] * training["steps"] == pytest.approx(TOKENS[path.stem], rel=0.06)
    assert training["context_len"] == training["seq_len"]
    # train.py reads them, and config_manager.py gives them no default.
    assert {"pin_memory", "persistent_workers"} <= training.keys()
    assert job["checkpoint"]["enable_checkpoint"] and job["checkpoint"]["load_step"] == -1
    assert training["steps"] % job["checkpoint"]["interval"] == 0
    assert f"`jobs/{path.name}`" in (ROOT / "flame/README.md").read_text()


def test_there_is_a_job_of_each_size():
    assert {path.stem for path in JOBS} == set(TOKENS)


def check_step0(python: str, folder: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "flash-linear-attention")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, ROOT / "flame/check_step0.py", folder]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(params=[False, True], ids=["two tensors", "tied"])
def handed_over(request, tmp_path: Path) -> Path:
    """The checkpoint folder of a job whose step-0 is a model of a layer; the output layer may be the embeddings."""
    folder = save(build("delta_net_2", num_hidden_layers=1, tie_word_embeddings=request.param), tmp_path / "model")
    step = tmp_path / "job/checkpoint/step-0"
    step.mkdir(parents=True)
    write_dcp(open_folder(folder), step)
    return step.parent


def test_a_step_0_is_loaded_as_it_was_written(python, handed_over, request):
    is_tied = request.node.callspec.id == "tied"
    asked = check_step0(sys.executable if is_tied else python, handed_over)
    assert asked.returncode == 0, asked.stderr
    by = "torchtitan" if importlib.util.find_spec("torchtitan") else f"torch {torch.__version__} alone"
    assert asked.stdout.startswith(by) and "each as it was written" in asked.stdout


def test_what_does_not_load_is_told(python, handed_over):
    config = json.loads((handed_over / "step-0/config.json").read_text())
    (handed_over / "step-0/config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    asked = check_step0(python, handed_over)
    assert asked.returncode == 1
    assert "is not loaded: Missing key in checkpoint state_dict: model.layers.1." in asked.stderr.splitlines()[-1]
    nothing = check_step0(python, handed_over.parent)
    assert nothing.returncode == 1 and "there is no distributed checkpoint at" in nothing.stderr
