"""What the loss says of each channel, against plain loops over full gradients, and against the loss itself.

Shapes: T tokens, U token ids, C channels, D hidden.
"""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import build, draw_tokens

from keyreduce.calibration.capture import collect
from keyreduce.calibration.projections import PROJECTIONS
from keyreduce.calibration.statistics import LayerStatistics, TaylorStatistics
from keyreduce.calibration.taylor import differentiating
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel

VARIANTS = {
    "delta_net": ("delta_net", {}),
    "delta_net with gate": ("delta_net", {"use_gate": True, "expand_k": 0.5}),
    "delta_net_2 with layers of different sizes": ("delta_net_2", {"expand_k": [1.0, 0.5, 0.25]}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet without gate": ("gated_deltanet", {"use_gate": False}),
}
WEIGHTS = {part: f"{part[0]}_proj" for part in PROJECTIONS}
FORMS = ("signed", "squared", "element")


class Mean(torch.nn.Module):
    """In the place of fla's softmax attention, which takes a package that needs a GPU."""

    def forward(self, hidden_states, **kwargs):
        count_T1 = torch.arange(1, hidden_states.shape[1] + 1).to(hidden_states)[:, None]
        return hidden_states.cumsum(1) / count_T1, None, kwargs["past_key_values"]


@pytest.fixture(params=VARIANTS)
def model(request) -> torch.nn.Module:
    """A float64 model with a layer in the middle that has no state."""
    model_type, changes = VARIANTS[request.param]
    model = build(model_type, num_hidden_layers=3, **changes)
    model.model.layers[1].attn = Mean()
    model.config.attn = {"layers": [1], "num_heads": 2}
    return model.double()


def run(model: torch.nn.Module, batches: list[torch.Tensor], **options) -> dict[int, LayerStatistics]:
    return collect(LoadedModel(model, None, FAMILIES[model.config.model_type], Path("tiny")), batches, **options)[0]


def loss_of(model: torch.nn.Module, tokens_T: torch.Tensor) -> torch.Tensor:
    logits_TU = model(tokens_T[None], use_cache=False).logits[0]
    log_probability_TU = logits_TU - logits_TU.logsumexp(-1, keepdim=True)
    chosen = [log_probability_TU[t, token] for t, token in enumerate(tokens_T[1:])]
    return -sum(chosen) / len(chosen)


def weight_of(model: torch.nn.Module, layer: int, part: str) -> torch.nn.Parameter:
    return getattr(model.model.layers[layer].attn, WEIGHTS[part]).weight


def channels_of(weight: torch.Tensor, part: str) -> list[torch.Tensor]:
    """The weights of each channel: its row, or in the output projection its column."""
    count = weight.shape[1 if part == "output" else 0]
    return [weight[:, c] if part == "output" else weight[c] for c in range(count)]


def expected_sums(model: torch.nn.Module, rows: torch.Tensor) -> dict[tuple[int, str, str], torch.Tensor]:
    """All forms, from full gradients of all parameters."""
    places = [(layer, part) for layer in (0, 2) for part in WEIGHTS]
    per_row = []
    for tokens_T in rows:
        model.zero_grad()
        loss_of(model, tokens_T).backward()
        per_row.append({place: weight_of(model, *place).grad.clone() for place in places})
    model.zero_grad()
    sums = {}
    for layer, part in places:
        weights = channels_of(weight_of(model, layer, part).detach(), part)
        gradients = [channels_of(row[layer, part], part) for row in per_row]
        products = [[weights[c] @ gradient[c] for gradient in gradients] for c in range(len(weights))]
        elements = [weights[c] * sum(gradient[c] for gradient in gradients) for c in range(len(weights))]
        sums[layer, part, "signed"] = torch.stack([sum(values) for values in products])
        sums[layer, part, "squared"] = torch.stack([sum(value**2 for value in values) for values in products])
        sums[layer, part, "element"] = torch.stack([sum(abs(value) for value in values_D) for values_D in elements])
    return sums


# Rows of up to 64 tokens take other operators in DeltaNet.
@pytest.mark.parametrize("seq_len", [9, 70])
def test_sums_are_those_of_plain_loops_over_full_gradients(model, seq_len):
    rows = draw_tokens(3, seq_len)
    layers = run(model, [rows[:2], rows[2:]], gradients=True)
    assert sorted(layers) == [0, 2]
    for (layer, part, form), expected_C in expected_sums(model, rows).items():
        sums = layers[layer].taylor.of(form, part)
        mixer = model.model.layers[layer].attn
        groups = mixer.num_heads if part in ("query", "key") else getattr(mixer, "num_v_heads", mixer.num_heads)
        assert sums.dtype == torch.float64
        assert expected_C.abs().max() > 1e-6
        torch.testing.assert_close(sums, expected_C.detach().unflatten(0, (groups, -1)), rtol=1e-8, atol=1e-12)


@torch.no_grad()
def test_the_signed_sum_is_how_the_loss_moves_with_a_channel(model):
    """No gradient here: the loss itself, with the weights of a channel a little larger and a little smaller."""
    row, step = draw_tokens(1, 12), 1e-5
    layers = run(model, [row], gradients=True)
    for layer in (0, 2):
        for part in WEIGHTS:
            sums_C = layers[layer].taylor.of("signed", part).flatten()
            channel = int(sums_C.abs().argmax())
            weights = channels_of(weight_of(model, layer, part), part)[channel]
            before, losses = weights.clone(), []
            for factor in (1 + step, 1 - step):
                weights.copy_(before * factor)
                losses.append(loss_of(model, row[0]))
            weights.copy_(before)
            slope = (losses[0] - losses[1]) / (2 * step)
            torch.testing.assert_close(sums_C[channel], slope, rtol=1e-5, atol=1e-9)


def test_other_sums_are_the_same_with_gradients_and_without(model):
    batches = [draw_tokens(2, 70), draw_tokens(1, 70, seed=1)]
    plain, told = run(model, batches), run(model, batches, gradients=True)
    for layer, statistics in plain.items():
        assert statistics.taylor is None
        for name, tensor in statistics.tensors().items():
            other = told[layer].tensors()[name]
            assert not other.requires_grad
            torch.testing.assert_close(other, tensor, rtol=1e-9, atol=1e-9)


def test_sums_add_over_batches_and_rows_are_samples(model):
    rows = draw_tokens(4, 20)
    whole, *single = (run(model, [taken], gradients=True) for taken in (rows, *rows.split(1)))
    split = run(model, rows.split([1, 3]), gradients=True)
    for layer, statistics in whole.items():
        for name, tensor in statistics.tensors().items():
            torch.testing.assert_close(split[layer].tensors()[name], tensor, rtol=1e-9, atol=1e-12)
        for part in WEIGHTS:
            signed = [one[layer].taylor.of("signed", part) for one in single]
            torch.testing.assert_close(statistics.taylor.of("signed", part), sum(signed))
            torch.testing.assert_close(statistics.taylor.of("squared", part), sum(s.square() for s in signed))


def state(model: torch.nn.Module) -> list:
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    hooks += ["forward" in vars(part) for part in model.modules()]
    return hooks + [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize("asks", [True, False])
def test_the_model_is_left_as_it_was(asks):
    model = build("delta_net").requires_grad_(asks)
    model.lm_head.weight.requires_grad_(not asks)
    before = state(model)
    run(model, [draw_tokens(2, 8)], gradients=True)
    assert state(model) == before
    with pytest.raises(IndexError):
        run(model, [draw_tokens(1, 8), torch.tensor([[1, 10**6]])], gradients=True)
    assert state(model) == before


def test_no_weight_asks_for_a_gradient(model):
    family, sizes = FAMILIES[model.config.model_type], FAMILIES[model.config.model_type].sizes(model.config.to_dict())
    with differentiating(model, family, {0: TaylorStatistics.zeros(sizes, torch.device("cpu"))}):
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_not_finite_is_refused():
    model = build("delta_net")
    torch.nn.init.constant_(model.lm_head.weight, 3e38)
    before = state(model)
    with pytest.raises(KeyreduceError, match="the loss of a row of the text is nan: .*try `dtype` float32.$"):
        run(model, [draw_tokens(1, 8)], gradients=True)
    assert state(model) == before


def test_a_single_token_has_nothing_to_predict():
    with pytest.raises(KeyreduceError, match="gradients need rows of at least 2 tokens"):
        run(build("delta_net"), [draw_tokens(1, 1)], gradients=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_rows():
    """400 rows against 20; the logits of all of them would be 27 MB, the gradients of their projections 6 MB."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    model, sizes = build("delta_net", num_hidden_layers=1), []
    batches = (draw_tokens(2, 64) for _ in range(200))
    run(model, batches, progress=lambda tokens: sizes.append(resident_bytes()), gradients=True)
    assert len(sizes) == 200
    assert max(sizes) - max(sizes[:10]) < 5e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    model, batches = build("gated_deltanet", initializer_range=0.1), [draw_tokens(4, 32)]
    expected = run(model, batches, gradients=True)[1].taylor
    found = run(model.to(dtype), batches, gradients=True)[1].taylor
    for form in FORMS:
        for part in WEIGHTS:
            wanted = expected.of(form, part)
            assert (found.of(form, part) - wanted).norm() / wanted.norm() < 0.1
