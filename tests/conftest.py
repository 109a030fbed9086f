"""What every test shares: fla runs in PyTorch where there is no GPU, and a test for a GPU says why it skips."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import fla_torch
import pytest
import torch

# Not in a fixture: the names that test modules import from fla must be the dispatched ones already.
fla_torch.enable()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: the folder of a tiny random model of a family, saved once, not to be changed."""
    from tiny_models import build, save

    return cache(lambda model_type: save(build(model_type), tmp_path_factory.mktemp("models") / model_type))


@pytest.fixture
def tiny_copy(tiny_folder, tmp_path: Path) -> Callable[..., Path]:
    """A function: a copy of a tiny random model, to be changed; by default of a DeltaNet, in the folder ``model``."""

    def copy(name: str = "model", model_type: str = "delta_net") -> Path:
        return Path(shutil.copytree(tiny_folder(model_type), tmp_path / name))

    return copy


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
