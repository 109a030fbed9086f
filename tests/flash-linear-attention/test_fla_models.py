"""fla's own DeltaNet and Gated DeltaNet models on a CPU: forward, backward, cache, padding and generation."""

import pytest
import torch
import torch.nn.functional as F
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM

COMMON = dict(hidden_size=24, num_hidden_layers=2, vocab_size=50, intermediate_size=32, initializer_range=0.2)
# No token ends a generation early.
SPECIAL = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)

FAMILIES = {
    "delta_net": (DeltaNetForCausalLM, DeltaNetConfig, dict(num_heads=2)),
    "gated_deltanet": (GatedDeltaNetForCausalLM, GatedDeltaNetConfig, dict(num_heads=2, head_dim=7, expand_v=2)),
}
VARIANTS = {
    "delta_net": {},
    "delta_net gate": {"use_gate": True},
    "delta_net no convolution": {"use_short_conv": False},
    "delta_net wide values": {"expand_v": 1.5},
    "delta_net relu sum": {"qk_activation": "relu", "qk_norm": "sum"},
    "delta_net elu": {"qk_activation": "elu"},
    "delta_net identity": {"qk_activation": "identity"},
    "delta_net negative eigenvalues": {"allow_neg_eigval": True},
    "delta_net no beta": {"use_beta": False},
    "delta_net unfused": {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False},
    "delta_net fused loss": {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True},
    "gated_deltanet": {},
    "gated_deltanet no gate": {"use_gate": False},
    "gated_deltanet sigmoid": {"output_gate_activation": "sigmoid"},
    "gated_deltanet no convolution": {"use_short_conv": False},
    "gated_deltanet grouped values": {"num_v_heads": 4},
    "gated_deltanet negative eigenvalues": {"allow_neg_eigval": True},
}
GENERAL = ["delta_net gate", "gated_deltanet grouped values"]

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


@pytest.fixture(params=VARIANTS)
def model(request):
    torch.manual_seed(0)
    model_class, config_class, sizes = FAMILIES[request.param.split()[0]]
    return model_class(config_class(**COMMON, **SPECIAL, **sizes, **VARIANTS[request.param])).eval()


def draw_tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [9, 80])
def test_loss_reaches_every_parameter(model, tokens):
    ids = draw_tokens(2, tokens)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(model):
    ids = draw_tokens(2, 80)
    whole = model(ids).logits
    prefill = model(ids[:, :70], use_cache=True)
    logits, cache = [prefill.logits], prefill.past_key_values
    for t in range(70, 80):
        step = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        logits, cache = [*logits, step.logits], step.past_key_values
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_left_padding_changes_no_row(model):
    lengths = [11, 1, 7]
    rows = [draw_tokens(length) for length in lengths]
    ids = torch.stack([F.pad(row, (11 - len(row), 0)) for row in rows])
    mask = torch.arange(11) >= 11 - torch.tensor(lengths)[:, None]
    logits = model(ids, attention_mask=mask.long()).logits
    for row, padded in zip(rows, logits, strict=True):
        torch.testing.assert_close(padded[-len(row) :], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generates_what_greedy_search_without_a_cache_does(model):
    ids = draw_tokens(2, 5)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("model", GENERAL, indirect=True)
@torch.no_grad()
def test_generates_from_a_padded_batch_what_each_row_alone_does(model):
    long, short = draw_tokens(8), draw_tokens(3)
    ids = torch.stack([long, F.pad(short, (5, 0))])
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for row, tokens in zip(together, (long, short), strict=True):
        alone = model.generate(tokens[None], max_new_tokens=5, do_sample=False)
        assert torch.equal(row[-5:], alone[0, -5:])


@pytest.mark.parametrize("model", GENERAL, indirect=True)
@torch.no_grad()
def test_packed_sequences_do_not_meet(model):
    ids = draw_tokens(1, 90)
    packed = model(ids, cu_seqlens=torch.tensor([0, 1, 20, 90])).logits
    alone = [model(ids[:, start:end]).logits for start, end in ((0, 1), (1, 20), (20, 90))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", GENERAL, indirect=True)
def test_sixteen_bit_model(model):
    ids = draw_tokens(2, 80)
    expected = model(ids).logits
    model = model.bfloat16()
    result = model(ids, labels=ids)
    assert result.logits.dtype == torch.bfloat16
    assert (result.logits - expected).norm() / expected.norm() < 0.05
    result.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.generate(ids[:, :5], max_new_tokens=3).shape == (2, 8)
