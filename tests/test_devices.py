"""How much memory a device has to give."""

import pytest
import torch

from keyreduce.devices import available_memory


def test_a_cpu_has_what_the_system_says(monkeypatch):
    assert 10**6 < available_memory(torch.device("cpu")) < 2**60
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "MemTotal: 5 kB\nMemAvailable:   3 kB\n")
    assert available_memory(torch.device("cpu")) == 3 * 1024
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "nothing of the kind")
    assert available_memory(torch.device("cpu")) > 10**6


@pytest.mark.gpu
def test_what_a_gpu_keeps_in_reserve_is_free():
    device = torch.device("cuda")
    before = available_memory(device)
    held = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    assert available_memory(device) <= before - (1 << 30)
    del held
    assert available_memory(device) >= before - (1 << 25)  # others may use the GPU, too
