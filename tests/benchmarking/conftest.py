"""Tiny random models to be timed, on one thread."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import build, save

from keyreduce.benchmarking.ceilings import Ceilings
from keyreduce.benchmarking.subjects import Subject, subjects_of
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
def pair(loaded) -> list[Subject]:
    """A DeltaNet of 16 key channels, and one of 8."""
    return subjects_of({"dense": loaded(), "pruned": loaded(expand_k=0.5)})


@pytest.fixture
def ceilings() -> Ceilings:
    """A device of 1 GB/s and 1 GFLOP/s."""
    return Ceilings(1e9, 1e9)


@pytest.fixture
def study(tmp_path, monkeypatch) -> Callable[[str], tuple[ModuleType, Callable[..., None]]]:
    """A function: the module of a study of repair, and how to run it on a tiny model, with some text, on a CPU."""
    folder = save(build("delta_net", initializer_range=0.05), tmp_path / "model")
    texts = {name: tmp_path / f"{name}.jsonl" for name in ("calibration", "heldout")}
    for name, path in texts.items():
        path.write_text("".join(f'{{"text": "{name} {n} is {n * n}, yes"}}\n' for n in range(100)))
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)

    def load(name: str) -> tuple[ModuleType, Callable[..., None]]:
        spec = importlib.util.spec_from_file_location(name, benchmarks / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        given = ["--model", folder, *(word for name, path in texts.items() for word in (f"--{name}", path))]
        given += ["--num-batches", 1, "--batch-size", 2, "--seq-len", 40, "--device", "cpu"]

        def run(*arguments: object) -> None:
            monkeypatch.setattr(sys, "argv", [str(word) for word in (module.__file__, *given, *arguments)])
            module.main()

        return module, run

    return load
