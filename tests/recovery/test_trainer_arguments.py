"""The settings of a training as the arguments of transformers' Trainer."""

import os

import pytest
import torch
from accelerate import PartialState

from keyreduce.calibration.run import Settings
from keyreduce.recovery.modes import make_training
from keyreduce.recovery.training.trainer import trainer_arguments


def test_one_process_trains_on_one_gpu_of_several(tmp_path, monkeypatch):
    for name, value in {"is_available": True, "device_count": 2, "set_device": None, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    settings = Settings(num_batches=8, batch_size=4, seq_len=32)
    arguments = trainer_arguments(settings, make_training("full", {}), torch.device("cuda"), tmp_path)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4


@pytest.mark.parametrize("names", [("WORLD_SIZE",), ("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("PMI_SIZE",)])
def test_what_a_cluster_sets_without_torchrun_makes_no_processes(tmp_path, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(name, "4")
    settings = Settings(num_batches=8, batch_size=3, seq_len=32)
    PartialState._reset_state()
    arguments = trainer_arguments(settings, make_training("full", {}), torch.device("cpu"), tmp_path)
    assert arguments.world_size == 1 and arguments.train_batch_size == 3
    assert {os.environ[name] for name in names} == {"4"}
