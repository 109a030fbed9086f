"""What every test shares: fla runs in PyTorch where there is no GPU, and a test for a GPU says why it skips.

``--fast`` collects what needs no model. Nothing imports torch for it but what is tested.
"""

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

FAST = {
    "test_budget.py",
    "test_capacity.py",
    "test_drawing.py",
    "test_engine_kernels.py",
    "test_engines.py",
    "test_help.py",
    "test_house.py",
    "test_hub.py",
    "test_launch.py",
    "test_model_card.py",
    "test_outputs.py",
    "test_overlap.py",
    "test_package.py",
    "test_processes.py",
    "test_record.py",
    "test_request.py",
    "test_results_page.py",
    "test_strong_rrqr.py",
    "test_sweep_launchers.py",
    "test_sweep_plots.py",
    "test_sweep_recipe.py",
    "test_sweep_tables.py",
    "test_text.py",
    "test_vllm_capacity.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="Collect the tests that need no model.")


def pytest_configure(config: pytest.Config) -> None:
    # What is imported stays: to look through it for garbage, again and again, takes a third of the time to import it.
    gc.disable()
    if not config.getoption("--fast"):
        # Not in a fixture: the names that test modules import from fla must be the dispatched ones already.
        import fla_torch

        fla_torch.enable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if is_test and config.getoption("--fast") and collection_path.name not in FAST else None


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: the folder of a tiny random model of a family, saved once, not to be changed."""
    from tiny_models import build, save

    return cache(lambda model_type: save(build(model_type), tmp_path_factory.mktemp("models") / model_type))


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What stands in for ``sys.executable`` and has imported everything; with a GPU, that itself: CUDA cannot fork."""
    import torch
    from forks import python_of_forks

    if torch.cuda.is_available():
        yield sys.executable
    else:
        with python_of_forks(tmp_path_factory.mktemp("forks")) as path:
            yield path


@pytest.fixture
def tiny_copy(tiny_folder, tmp_path: Path) -> Callable[..., Path]:
    """A function: a copy of a tiny random model, to be changed; by default of a DeltaNet, in the folder ``model``."""

    def copy(name: str = "model", model_type: str = "delta_net") -> Path:
        return Path(shutil.copytree(tiny_folder(model_type), tmp_path / name))

    return copy


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
