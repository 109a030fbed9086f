import pytest
import torch

from keyreduce.benchmarking import largest_batch
from keyreduce.benchmarking.largest_batch import _Step, time_largest_batch
from keyreduce.benchmarking.steps import DecodeSteps
from keyreduce.benchmarking.work import Work


@pytest.fixture
def device_that_holds(monkeypatch):
    """A function: let steps of more than so many sequences end in an error, and those of fewer take their number."""

    def limit(sequences: int, error: Exception | None = None) -> list[int]:
        tried = []

        def make(timed, batch_size, seed):
            tried.append(batch_size)
            if batch_size > sequences:
                raise error or torch.OutOfMemoryError("CUDA out of memory")
            return DecodeSteps(lambda: None, 4, list, Work(1, 1))

        monkeypatch.setattr(largest_batch, "model_steps", make)
        return tried

    return limit


@pytest.mark.parametrize("limit", [1, 2, 3, 100, 129, 4095])
def test_the_largest_batch_is_found_to_an_eighth(pair, device_that_holds, limit):
    tried = device_that_holds(limit)
    found, _ = time_largest_batch(pair, start=1, at_most=4096, rounds=1)
    assert found["ended_by"] == "memory"
    assert found["batch_size"] <= limit <= found["batch_size"] + max(1, found["batch_size"] // 8)
    assert len(tried) < 40
    assert found["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("at_most", "room", "limit", "tried", "fits", "ended_by"),
    [
        (4096, lambda batch_size: 1000, 1000, [4, 1000], 1000, "memory"),
        (4096, lambda batch_size: 1000, 960, [4, 1000, 889], 889, "memory"),
        (4096, lambda batch_size: 500 if batch_size == 4 else 1000, 1000, [4, 500, 1000], 1000, "memory"),
        (4096, lambda batch_size: 5000, 9000, [4, 4096], 4096, "bound"),
        (1020, lambda batch_size: 1000 if batch_size == 4 else 1021, 9000, [4, 1000, 1020], 1020, "bound"),
        (4096, lambda batch_size: 3, 1000, [4], 4, "memory"),
    ],
)
def test_memory_says_what_to_try(pair, monkeypatch, at_most, room, limit, tried, fits, ended_by):
    seen = []

    def step(timed, batch_size, rounds):
        seen.append(batch_size)
        return "memory" if batch_size > limit else _Step(0.5, room(batch_size))

    monkeypatch.setattr(largest_batch, "_step", step)
    (found,) = time_largest_batch(pair[:1], start=4, at_most=at_most, rounds=1)
    assert seen == tried
    assert (found["batch_size"], found["ended_by"], found["tokens_per_second"]) == (fits, ended_by, fits / 0.5)


@pytest.mark.parametrize(("start", "at_most"), [(1, 24), (8, 24), (24, 24), (256, 24)])
def test_the_search_has_a_bound(pair, device_that_holds, start, at_most):
    tried = device_that_holds(1000)
    found, _ = time_largest_batch(pair, start=start, at_most=at_most, rounds=1)
    assert (found["batch_size"], found["ended_by"], max(tried)) == (24, "bound", 24)


def test_a_first_batch_that_does_not_fit(pair, device_that_holds):
    device_that_holds(7)
    found, _ = time_largest_batch(pair, start=8, at_most=64, rounds=1)
    assert (found["batch_size"], found["ended_by"], found["tokens_per_second"]) == (0, "memory", None)


def test_a_launch_grid_has_an_end(pair, device_that_holds):
    device_that_holds(16, RuntimeError("Triton Error [CUDA]: invalid argument"))
    found, _ = time_largest_batch(pair, start=8, at_most=64, rounds=1)
    assert (found["batch_size"], found["ended_by"]) == (16, "kernel")


def test_other_errors_are_left_alone(pair, device_that_holds):
    device_that_holds(16, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        time_largest_batch(pair, start=8, at_most=64, rounds=1)


def test_a_cpu_is_not_asked_for_more_than_is_free(pair, monkeypatch):
    per_sequence = 4 * pair[0].family.state_bytes(pair[0].config)
    monkeypatch.setattr(largest_batch, "available_memory", lambda device: 12 * per_sequence)
    dense, pruned = time_largest_batch(pair, start=2, at_most=16, rounds=1)
    assert (dense["batch_size"], dense["ended_by"]) == (12, "memory")
    assert (pruned["batch_size"], pruned["ended_by"]) == (16, "bound")
    assert pruned["tokens_per_second"] > 0
