import pytest
import torch

from keyreduce.benchmarking import forward
from keyreduce.benchmarking.forward import time_passes
from keyreduce.benchmarking.timed_models import timed_models
from keyreduce.benchmarking.timing import PeakMemory, RoundTimes
from keyreduce.errors import KeyreduceError

SETTINGS = {"batch_size": 2, "seq_len": 80, "rounds": 7, "seed": 0}


def test_figures_are_in_order(pair, roofline):
    entries = time_passes(pair, roofline, "mixer", **SETTINGS)
    assert [(entry["label"], entry["head_k_dim"]) for entry in entries] == [("dense", 16), ("pruned", 8)]
    for entry in entries:
        latency = entry["latency_seconds"]
        assert 0 < latency["low"] <= latency["median"] <= latency["high"]
        assert entry["tokens_per_second"] == pytest.approx(2 * 80 / latency["median"])
        assert entry["warmup_seconds"] > 0
        assert entry["peak_memory_bytes"] > 2 * 80 * 32 * 4
        assert entry["peak_reserved_bytes"] is None
    assert "speedup" not in entries[0]
    assert entries[1]["memory_ratio"] > 1


def test_ratios_are_taken_round_by_round_and_shares_of_the_ceilings(pair, roofline, monkeypatch):
    timings = {"dense": RoundTimes((6.0, 60.0, 8.0)), "pruned": RoundTimes((3.0, 20.0, 8.0))}
    remaining = iter((PeakMemory(300, 512), PeakMemory(200, 256)))
    monkeypatch.setattr(forward, "interleave", lambda functions, device, **settings: timings)
    monkeypatch.setattr(forward, "peak_memory", lambda function, device: next(remaining))
    dense, pruned = time_passes(pair, roofline, "mixer", **SETTINGS)
    assert pruned["speedup"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert pruned["latency_seconds"] == {"median": 8.0, "low": 3.0, "high": 20.0}
    assert pruned["tokens_per_second"] == 20.0
    assert (dense["peak_memory_bytes"], pruned["peak_reserved_bytes"], pruned["memory_ratio"]) == (300, 256, 1.5)
    for entry in (dense, pruned):
        assert entry["gigabytes_per_second"] == pytest.approx(entry["bandwidth_share"])
        assert 1e3 * entry["teraflops"] == pytest.approx(entry["compute_share"])
    # Weights once, input and output once.
    moved = 4 * (sum(parameter.numel() for parameter in pair[0].mixer.parameters()) + 2 * 2 * 80 * 32)
    assert dense["gigabytes_per_second"] == pytest.approx(moved / 8.0 / 1e9)


def test_every_mixer_gets_the_same_inputs_in_turn(loaded, roofline):
    models = timed_models({"dense": loaded(), "hybrid": loaded(attn={"layers": [0], "num_heads": 2})})
    seen, modes = {timed.label: [] for timed in models}, set()
    for timed in models:

        def hook(_, args, kwargs, label=timed.label):
            seen[label].append(kwargs["hidden_states"])
            modes.add(torch.is_inference_mode_enabled())

        timed.mixer.register_forward_pre_hook(hook, with_kwargs=True)
    ticks = []
    time_passes(models, roofline, "mixer", **SETTINGS, progress=ticks.append)
    assert sum(ticks) == SETTINGS["rounds"]
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn(2, 80, 32, generator=generator) for _ in range(8)]
    for inputs in seen.values():
        assert len(inputs) >= SETTINGS["rounds"]
        assert all(torch.equal(hidden_BTD, expected[call % 8]) for call, hidden_BTD in enumerate(inputs))
    assert modes == {True}


def test_a_batch_beyond_all_memory_is_one_line(pair, roofline):
    with pytest.raises(KeyreduceError, match="a batch of 1000000000000 x 80 tokens needs more memory"):
        time_passes(pair, roofline, "mixer", **SETTINGS | {"batch_size": 10**12})
