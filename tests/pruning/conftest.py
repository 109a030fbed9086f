from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuts import cut, plan_of

from keyreduce.checkpoint.folder import open_folder


@pytest.fixture
def pruned(tmp_path: Path) -> Callable[..., Path]:
    """A function: a checkpoint, its key channels pruned to a number, or other targets too, in a new folder."""

    def prune(source: Path, key: int | None = None, *, method: str = "random", name: str = "pruned", **targets) -> Path:
        checkpoint = open_folder(source)
        keep = ({} if key is None else {"key": key}) | targets
        return cut(checkpoint, plan_of(checkpoint, keep, method), tmp_path / name)

    return prune


@pytest.fixture(autouse=True, scope="session")
def softmax_attention_on_a_cpu() -> Iterator[None]:
    """fla's softmax attention asks for a package that needs a GPU; of it, hybrid models use one function."""

    def attend(query_BTHC, key_BSGC, value_BSGC, causal, window_size):
        assert causal
        assert window_size == (-1, -1)
        T, S, shared = query_BTHC.shape[1], key_BSGC.shape[1], query_BTHC.shape[2] // key_BSGC.shape[2]
        key_BHSC, value_BHSC = (x.repeat_interleave(shared, 2).transpose(1, 2) for x in (key_BSGC, value_BSGC))
        seen_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return torch.nn.functional.scaled_dot_product_attention(
            query_BTHC.transpose(1, 2), key_BHSC, value_BHSC, attn_mask=seen_TS
        ).transpose(1, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fla.layers.attn.flash_attn_func", attend)
        yield
