"""Rounded states against a plain loop in numpy, which finds the nearest of all numbers that a format has.

Shapes: B rows, W value heads, K key channels, V value channels.
"""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from keyreduce.models.state_rounding import round_state, storing
from keyreduce.serving.state_formats import FORMATS

B, W, K, V = 2, 3, 12, 40
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
NUMBERS = {"int8": np.arange(-127.0, 128.0), "int4": np.arange(-7.0, 8.0), "fp8": np.unique(E4M3[np.isfinite(E4M3)])}
SCALED = [name for name, form in FORMATS.items() if form.scaled]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers of many magnitudes, so that some are subnormal in e4m3 and some round to zero."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (numbers * torch.exp(3 * torch.randn(shape, generator=generator, dtype=torch.float64))).to(dtype)


def nearest(values: np.ndarray, kind: str) -> np.ndarray:
    """The nearest number of a format to each value that lies within its bounds."""
    numbers = NUMBERS[kind]
    return numbers[np.abs(values[..., None] - numbers).argmin(-1)]


def rounded_together(values: np.ndarray, kind: str) -> np.ndarray:
    """Values that share one scale."""
    largest = np.abs(values).max(initial=0.0)
    scale = largest / NUMBERS[kind][-1] if largest else 1.0
    return nearest(values / scale, kind) * scale


def rounded_head(state_KV: np.ndarray, name: str) -> np.ndarray:
    form, kind = FORMATS[name], name.partition("-")[0]
    if form.scaled == "head":
        return rounded_together(state_KV, kind)
    rows = state_KV.T if form.scaled == "row" else state_KV
    size = rows.shape[1] & -rows.shape[1]
    rotation = np.kron(np.eye(rows.shape[1] // size), hadamard(size) / np.sqrt(size))
    rows = rows @ rotation if form.rotated else rows
    width = form.group or rows.shape[1]
    parts = [range(start, min(start + width, rows.shape[1])) for start in range(0, rows.shape[1], width)]
    found = np.stack([np.concatenate([rounded_together(row[part], kind) for part in parts]) for row in rows])
    found = found @ rotation.T if form.rotated else found
    return found.T if form.scaled == "row" else found


@DTYPES
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(B, W, K, V), (1, 1, 1, 1), (1, 2, 40, 5)])
def test_scaled_formats_take_the_nearest_number(name, dtype, shape):
    state_BWKV = draw(*shape, dtype=dtype)
    expected = np.array([[rounded_head(head.double().numpy(), name) for head in row] for row in state_BWKV])
    found = round_state(state_BWKV.clone(), name)
    assert found.dtype == dtype and found.shape == state_BWKV.shape
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    if shape[-2] > 1:
        assert not np.allclose(expected, state_BWKV.double().numpy(), rtol=1e-3)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_tie_goes_to_the_even_number(name):
    largest = NUMBERS[name][-1]
    column = torch.tensor([largest, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 0.0])
    found = round_state(column.view(1, 1, -1, 1), name)
    assert found.flatten().tolist() == [largest, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 4.0, 0.0]


def test_fp8_is_the_cast_of_torch():
    """All float32 around every number of e4m3 and around every middle between two, with a scale of exactly 1."""
    numbers = torch.from_numpy(NUMBERS["fp8"]).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles])
    beside = [torch.nextafter(exact, exact + side) for side in (-1.0, 1.0)]
    values = torch.cat([exact, *beside, torch.linspace(-448, 448, 9999)]).clamp(-448, 448)
    expected = values.to(torch.float8_e4m3fn).float()
    assert torch.equal(round_state(values.view(1, 1, -1, 1), "fp8").flatten(), expected)
    assert len(expected.unique()) == len(NUMBERS["fp8"])


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_plain_formats_are_the_casts_of_torch(name):
    state_BWKV = draw(B, W, K, V, dtype=torch.float32)
    expected = state_BWKV.to(getattr(torch, name)).float()
    assert torch.equal(round_state(state_BWKV, name), expected)
    assert not torch.equal(expected, state_BWKV)


def test_float16_overflows_where_bfloat16_does_not():
    state_BWKV = torch.full((1, 1, 1, 1), 1e5)
    assert round_state(state_BWKV, "float16").isinf().all()
    assert round_state(state_BWKV, "bfloat16").isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_tiny_numbers_are_safe(name):
    state_BWKV = torch.zeros(1, 1, 4, 4)
    state_BWKV[0, 0, 1, 1] = 1.0
    found = round_state(state_BWKV.clone(), name)
    torch.testing.assert_close(found, state_BWKV, rtol=0, atol=0 if name != "int4-rotated" else 1e-6)
    assert round_state(torch.full((1, 1, 4, 4), 1e-44), name).isfinite().all()


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int4-rotated"])
def test_what_was_stored_once_stays(name):
    once = round_state(draw(B, W, K, V, dtype=torch.float32), name)
    twice = round_state(once.clone(), name)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_each_head_has_its_own_format():
    state_BWKV = draw(B, W, K, V, dtype=torch.float32)
    found = storing(["int8", "float32", "bfloat16"])(state_BWKV.clone())
    assert torch.equal(found[:, 0], round_state(state_BWKV, "int8")[:, 0])
    assert torch.equal(found[:, 1], state_BWKV[:, 1])
    assert torch.equal(found[:, 2], round_state(state_BWKV, "bfloat16")[:, 2])
    assert storing(["float32"] * W) is None
