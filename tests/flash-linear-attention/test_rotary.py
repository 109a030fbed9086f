"""fla's rotary embedding on a CPU: each pair of channels turned as a complex number, written here anew.

Shapes: B batch, T tokens, H heads, D channels, P positions, R rotated pairs.
"""

import pytest
import torch
from fla.modules import RotaryEmbedding
from fla.modules.rotary import rotary_embedding
from torch.testing import assert_close

B, T, H, D, P = 2, 7, 3, 12, 20


def draw(R=6, dtype=torch.float64, B=B, T=T):
    """Return the input and the caches of cosines and sines ``[P, R]``."""
    generator = torch.Generator().manual_seed(R)
    x = torch.randn(B, T, H, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    angles_PR = torch.arange(P)[:, None] * 10.0 ** -torch.linspace(0, 3, R, dtype=torch.float64)
    return x, angles_PR.cos().to(dtype), angles_PR.sin().to(dtype)


def reference_rotation(x, cos, sin, position_BT, interleaved=False):
    R = cos.shape[1]
    pairs = x[..., : 2 * R].unflatten(-1, (R, 2) if interleaved else (2, R))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(first, second) * torch.complex(cos, sin)[position_BT][:, :, None]
    turned = torch.stack([turned.real, turned.imag], dim=-1 if interleaved else -2).flatten(-2)
    return torch.cat([turned, x[..., 2 * R :]], dim=-1)


def assert_same_values_and_gradients(actual, expected, x):
    assert_close(actual, expected)
    actual, expected = (torch.autograd.grad(output.sin().sum(), x) for output in (actual, expected))
    assert_close(actual, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [6, 4, 1])
@pytest.mark.parametrize("offset", [0, 5, torch.tensor([0, 13]), torch.tensor([2, 9], dtype=torch.int32)])
def test_rotation_and_its_gradient(offset, R, interleaved):
    x, cos, sin = draw(R)
    first = offset[:, None] if isinstance(offset, torch.Tensor) else offset
    positions = (torch.arange(T) + first).expand(B, T)
    actual = rotary_embedding(x, cos, sin, interleaved=interleaved, seqlen_offsets=offset)
    assert_same_values_and_gradients(actual, reference_rotation(x, cos, sin, positions, interleaved), x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([4, 0, 11])])
def test_positions_begin_anew_in_each_packed_sequence(offset, dtype):
    lengths = [1, 4, 2]
    x, cos, sin = draw(B=1)
    first = offset if isinstance(offset, torch.Tensor) else torch.full((3,), offset)
    positions = torch.cat([start + torch.arange(length) for start, length in zip(first, lengths, strict=True)])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    actual = rotary_embedding(x, cos, sin, seqlen_offsets=offset, cu_seqlens=bounds)
    assert_same_values_and_gradients(actual, reference_rotation(x, cos, sin, positions), x)


def test_tokens_before_the_first_position_become_zero():
    x, cos, sin = draw(R=4)
    output = rotary_embedding(x, cos, sin, seqlen_offsets=torch.tensor([-3, 0]))
    assert (output[0, :3, :, :8] == 0).all()
    assert torch.equal(output[0, :3, :, 8:], x[0, :3, :, 8:])
    positions = (torch.arange(T) + torch.tensor([[-3], [0]])).clamp_min(0)
    assert_close(output[0, 3:], reference_rotation(x, cos, sin, positions)[0, 3:])
    assert_close(output[1], reference_rotation(x, cos, sin, positions)[1])


def test_rotates_in_place_where_asked_for():
    x, cos, sin = draw()
    values = x.detach().clone()
    expected = rotary_embedding(values, cos, sin)
    output = rotary_embedding(values, cos, sin, inplace=True)
    assert output.data_ptr() == values.data_ptr()
    assert torch.equal(output, expected)
    assert not torch.equal(values, x.detach())


def test_sixteen_bits_are_turned_in_thirty_two():
    x, cos, sin = draw(dtype=torch.bfloat16)
    output = rotary_embedding(x, cos, sin)
    assert output.dtype == torch.bfloat16
    positions = torch.arange(T).expand(B, T)
    assert_close(output, reference_rotation(x.float(), cos.float(), sin.float(), positions).bfloat16())


def test_module_makes_scores_depend_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, D, generator=generator).expand(1, T, 1, D) for _ in range(2))
    query, key = RotaryEmbedding(D)(query, key, seqlen_offset=3)
    scores = query[0, :, 0] @ key[0, :, 0].mT
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
