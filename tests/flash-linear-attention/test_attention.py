"""Softmax attention on a CPU: the functions against a loop over tokens, and fla's hybrid models that call them.

Shapes: B batch, T queries, S keys, H query heads, G key heads, C channels.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fla.layers import attn
from fla_torch.attention import flash_attn_func, flash_attn_varlen_func
from tiny_models import FAMILIES, build, draw_tokens
from torch.testing import assert_close

from keyreduce import families
from keyreduce.calibration.capture import collect
from keyreduce.models.loading import LoadedModel

ALL = (-1, -1)


def draw(T, S, H=4, G=2, B=2, C=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T + 10 * S)
    shapes = (B, T, H, C), (B, S, G, C), (B, S, G, C)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def loop(q, k, v, *, causal=True, window_size=ALL):
    """Query by query, head by head, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    (B, T, H, C), (S, G) = q.shape, k.shape[1:3]
    output = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            place = S - T + t
            first = 0 if window_size[0] < 0 else max(0, place - window_size[0])
            last = place if causal else S - 1 if window_size[1] < 0 else min(S - 1, place + window_size[1])
            for h in range(H):
                g = h // (H // G)
                weights = [(q[b, t, h] @ k[b, s, g] / C**0.5).exp() for s in range(first, last + 1)]
                values = [v[b, s, g] for s in range(first, last + 1)]
                output[b, t, h] = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    return output


@pytest.mark.parametrize("window", [ALL, (0, 0), (2, 0), (4, -1), (3, 3), (50, 0)])
@pytest.mark.parametrize("T, S", [(7, 7), (3, 8), (1, 8), (1, 1), (6, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_against_a_loop_over_tokens(T, S, window, causal):
    operands = draw(T, S)
    options = {"causal": causal, "window_size": window}
    assert_close(flash_attn_func(*operands, **options), loop(*operands, **options))


@pytest.mark.parametrize("H, G", [(4, 4), (4, 1), (6, 3)])
def test_heads_share_keys_in_groups(H, G):
    operands = draw(5, 6, H, G)
    assert_close(flash_attn_func(*operands, causal=True), loop(*operands))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("T", [3, 9])
def test_output_has_the_dtype_of_the_inputs(dtype, tolerance, T):
    operands = draw(T, 9, dtype=dtype)
    output = flash_attn_func(*operands, causal=True)
    assert output.dtype == dtype
    assert_close(output.double(), loop(*operands), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [ALL, (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_do_not_meet(window, dtype):
    lengths_q, lengths_k = [3, 1, 0, 5], [3, 6, 0, 7]
    alone = [draw(T, S, B=1) for T, S in zip(lengths_q, lengths_k, strict=True)]
    packed = [torch.cat([operands[i][0] for operands in alone]) for i in range(3)]
    bounds = [torch.tensor([0, *lengths]).cumsum(0).to(dtype) for lengths in (lengths_q, lengths_k)]
    options = {"causal": True, "window_size": window}
    output = flash_attn_varlen_func(
        *packed, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], max_seqlen_q=5, max_seqlen_k=7, **options
    )
    assert_close(output, torch.cat([loop(*operands, **options)[0] for operands in alone]))


@pytest.mark.parametrize("T, window", [(3, ALL), (4, ALL), (4, (1, 0))])
def test_gradients(T, window):
    operands = [x.requires_grad_() for x in draw(T, 4, B=1, C=3)]
    torch.autograd.gradcheck(lambda *x: flash_attn_func(*x, causal=True, window_size=window), operands)


SOFTMAX = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(params=[None, 5], ids=["all", "window"])
def window(request):
    return request.param


@pytest.fixture(params=FAMILIES)
def model(request, window):
    """Three layers, the middle one of softmax attention."""
    model = build(request.param, num_hidden_layers=3, attn=SOFTMAX | {"window_size": window}, initializer_range=0.2)
    # No token ends a generation early.
    model.generation_config.eos_token_id = None
    return model.double()


@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(model):
    assert type(model.model.layers[1].attn) is attn.Attention
    ids = draw_tokens(2, 14)
    whole = model(ids).logits
    prefill = model(ids[:, :4], use_cache=True)
    logits, cache = [prefill.logits], prefill.past_key_values
    # One chunk of several tokens onto the cache, then token by token.
    for start, end in [(4, 7), *((t, t + 1) for t in range(7, 14))]:
        step = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        logits, cache = [*logits, step.logits], step.past_key_values
    assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_left_padding_changes_no_row(model):
    lengths = [11, 1, 7]
    rows = [draw_tokens(length, seed=length) for length in lengths]
    ids = torch.stack([F.pad(row, (11 - len(row), 0)) for row in rows])
    mask = torch.arange(11) >= 11 - torch.tensor(lengths)[:, None]
    logits = model(ids, attention_mask=mask.long()).logits
    for row, padded in zip(rows, logits, strict=True):
        assert_close(padded[-len(row) :], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generates_from_a_padded_batch_what_each_row_alone_does(model):
    long, short = draw_tokens(8, seed=1), draw_tokens(3, seed=2)
    ids = torch.stack([long, F.pad(short, (5, 0))])
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, expected in zip(together, (long, short), strict=True):
        for _ in range(6):
            logits = model(expected[None], use_cache=False).logits
            expected = torch.cat([expected, logits[0, -1:].argmax(-1)])
        assert torch.equal(row[-6:], expected[-6:])


@torch.no_grad()
def test_packed_sequences_of_a_model_do_not_meet(model):
    ids = draw_tokens(1, 30)
    packed = model(ids, cu_seqlens=torch.tensor([0, 1, 12, 30])).logits
    alone = [model(ids[:, start:end]).logits for start, end in ((0, 1), (1, 12), (12, 30))]
    assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_padded", [False, True])
def test_loss_reaches_every_parameter(model, is_padded):
    ids = draw_tokens(2, 9)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5]) if is_padded else None
    model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("gradients", [False, True])
def test_hybrid_models_are_calibrated(model, gradients):
    loaded = LoadedModel(model, None, families.FAMILIES[model.config.model_type], Path("tiny"))
    layers, tokens = collect(loaded, [draw_tokens(2, 9)], gradients=gradients)
    assert tokens == 18
    assert sorted(layers) == [0, 2]
    for statistics in layers.values():
        assert all(tensor.isfinite().all() for tensor in statistics.tensors().values())
        assert (statistics.taylor is not None) == gradients


def test_flash_attn_is_left_what_lies_on_cuda(tmp_path):
    """With a package of that name on the path, whose functions say that they were called."""
    functions = {"flash_attn_func": "flash", "flash_attn_varlen_func": "var"}
    lines = [f"def {name}(*args, **kwargs): return {answer!r}" for name, answer in functions.items()]
    (tmp_path / "flash_attn.py").write_text("\n".join(lines))
    program = """
import fla_torch, flash_attn, torch
from fla.layers import attn
held = flash_attn.flash_attn_func
for turn in range(2):
    fla_torch.enable()
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    there = torch.empty(1, 2, 1, 4, device="cuda")
here = torch.ones(1, 2, 1, 4)
bounds = torch.tensor([0, 2])
assert attn.flash_attn_func(there, there, there, causal=True) == "flash"
assert attn.flash_attn_varlen_func(there, there, there, bounds, bounds, 2, 2, causal=True) == "var"
assert torch.equal(attn.flash_attn_func(here, here, here, causal=True), here)
assert torch.equal(attn.flash_attn_varlen_func(here[0], here[0], here[0], bounds, bounds, 2, 2), here[0])
assert flash_attn.flash_attn_func is held
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
