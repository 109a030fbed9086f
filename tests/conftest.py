"""What every test shares: fla runs in PyTorch where there is no GPU, and a test for a GPU says why it skips."""

import fla_torch
import pytest
import torch

# Not in a fixture: the names that test modules import from fla must be the dispatched ones already.
fla_torch.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
