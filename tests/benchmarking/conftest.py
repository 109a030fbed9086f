"""Tiny random models to be timed, on one thread."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build

from keyreduce.benchmarking.metrics import Roofline
from keyreduce.benchmarking.timed_models import TimedModel, timed_models
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other at every small operation are slow where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    """A cache so small that two copies of what is decoded are rotated."""
    monkeypatch.setattr("keyreduce.benchmarking.steps.copies_past_cache", lambda size, device, at_most=64: 2)


@pytest.fixture
def loaded() -> Callable[..., LoadedModel]:
    """A function: a tiny random model of a family as one that was loaded, with changes to its config."""
    return lambda model_type="delta_net", **changes: LoadedModel(
        build(model_type, **changes), None, FAMILIES[model_type], Path(model_type)
    )


@pytest.fixture
def pair(loaded) -> list[TimedModel]:
    """A DeltaNet of 16 key channels, and one of 8."""
    return timed_models({"dense": loaded(), "pruned": loaded(expand_k=0.5)})


@pytest.fixture
def roofline() -> Roofline:
    """A device of 1 GB/s and 1 GFLOP/s."""
    return Roofline(1e9, 1e9)
