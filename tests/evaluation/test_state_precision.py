"""Costs along the sequence, errors of heads and the choice for each head, against plain computations in float64.

Shapes: B rows, T tokens, H key heads, W value heads, K key channels, V value channels.
"""

import json
import math
from itertools import islice
from pathlib import Path

import hybrid_models
import numpy as np
import pytest
import torch
from tiny_models import build, draw_tokens

from keyreduce.errors import KeyreduceError
from keyreduce.evaluation import state_precision
from keyreduce.evaluation.state_precision import (
    StateSettings,
    bins_of,
    cheapest_choice,
    head_errors,
    measure_states,
    memory_correlation,
    position_costs,
    search_choice,
    state_metrics,
)
from keyreduce.evaluation.windows import Window
from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.models.loading import LoadedModel
from keyreduce.models.state_rounding import round_state
from keyreduce.models.state_storage import replaced_recurrences, stored_states
from keyreduce.processes import Processes
from keyreduce.reporting import Reporter
from keyreduce.serving.state_formats import bytes_of

VARIANTS = {
    "delta_net": (build, {}),
    "delta_net_2": (build, {"expand_k": [1.0, 0.25]}),
    "gated_deltanet": (build, {"allow_neg_eigval": True}),
    "kda": (hybrid_models.build, {}),
    "qwen3_5_text": (hybrid_models.build, {}),
}


def loaded(model_type: str, **changes) -> LoadedModel:
    make, variant = VARIANTS[model_type]
    model = make(model_type, **variant | changes).double()
    return LoadedModel(model, None, FAMILIES[model_type], Path("tiny"))


def rows(*shapes: tuple[int, int], first: int = 1) -> list[list[Window]]:
    """Batches of random rows."""
    batches = (draw_tokens(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return [[Window(tokens_T, torch.zeros_like(tokens_T), first) for tokens_T in batch] for batch in batches]


@pytest.mark.parametrize(
    ("seq_len", "bins"),
    [
        (2, [(1, 2)]),
        (64, [(1, 64)]),
        (65, [(1, 64), (64, 65)]),
        (300, [(1, 64), (64, 128), (128, 256), (256, 300)]),
        (32768, [(1, 64), *((2**n, 2 ** (n + 1)) for n in range(6, 15))]),
    ],
)
def test_bins_double(seq_len, bins):
    assert bins_of(seq_len) == bins


@pytest.mark.parametrize("first", [1, 60])
@torch.no_grad()
def test_costs_by_position(first, monkeypatch):
    monkeypatch.setattr("keyreduce.evaluation.perplexity._AT_ONCE", 50)
    tiny, batches, ticks = loaded("delta_net"), rows((2, 150), (1, 150), (1, 40), first=first), []
    batches = batches[:2] if first > 40 else batches
    found = position_costs(tiny, batches, bins_of(150), ticks.append)
    windows = [window for batch in batches for window in batch]
    assert len(found) == len(windows) and sum(ticks) == sum(len(window.tokens_T) for window in windows)
    for (tokens_T, _, _), costs in zip(windows, found, strict=True):
        log_probabilities = tiny.model(tokens_T[None]).logits[0].log_softmax(dim=-1)
        for (start, end), cost in zip(bins_of(150), costs, strict=True):
            places = range(max(first, start), min(end, len(tokens_T)))
            expected = -sum(float(log_probabilities[place - 1, tokens_T[place]]) for place in places)
            assert cost.predictions == len(places)
            assert cost.nats == pytest.approx(expected, rel=1e-5)


def operands_of(tiny: LoadedModel, tokens_BT: torch.Tensor) -> dict[int, tuple]:
    """What the rule of each layer is given: layer -> q, k, v, beta, log decay and scale, in float64."""
    from fla_torch.stored_state import stored_delta_rule

    seen = {}

    def recurrence_of(layer):
        def recurrence(*operands, scale, initial_state_BWKV):
            seen[layer] = (*(None if x is None else x.double().numpy() for x in operands), scale)
            return stored_delta_rule(*operands, scale=scale, initial_state_BWKV=initial_state_BWKV)

        return recurrence

    with replaced_recurrences(tiny.model, tiny.family, recurrence_of), torch.no_grad():
        tiny.model.base_model(tokens_BT, use_cache=False)
    return seen


def readouts(operands, store) -> tuple[np.ndarray, np.ndarray]:
    """``[B, T, W, V]``, and what is left of the squared norm of a state at each token, ``[B, T, W]``."""
    query, key, value, beta, log_decay, scale = operands
    (B, T, H, K), (W, V) = key.shape, value.shape[2:]
    output, kept = np.zeros((B, T, W, V)), np.zeros((B, T, W))
    for row in range(B):
        for head in range(W):
            S = np.zeros((K, V))
            for t in range(T):
                k, q = key[row, t, head * H // W], query[row, t, head * H // W]
                decay = np.ones((K, 1)) if log_decay is None else np.exp(log_decay[row, t, head]) * np.ones((K, 1))
                transition = (np.eye(K) - beta[row, t, head] * np.outer(k, k)) @ np.diag(decay[:, 0])
                S = transition @ S + beta[row, t, head] * np.outer(k, value[row, t, head])
                output[row, t, head] = scale * q @ S
                kept[row, t, head] = np.trace(transition.T @ transition) / K
                S = store(S)
    return output, kept


def normed(output: np.ndarray) -> np.ndarray:
    return output / np.sqrt((output**2).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("model_type", VARIANTS)
def test_errors_and_memory_of_heads(model_type):
    tiny, batches = loaded(model_type), [draw_tokens(2, 30), draw_tokens(1, 20, seed=1)]
    found = head_errors(tiny, batches, ["int4", "bfloat16"])
    per_batch = [operands_of(tiny, batch) for batch in batches]
    assert sorted({entry["layer"] for entry in found}) == sorted(per_batch[0])
    for entry in found:
        layer, head = entry["layer"], entry["head"]
        for dtype in ("int4", "bfloat16"):
            squares, log_kept, decays = [], [], []
            for operands in (batch[layer] for batch in per_batch):

                def store(S, dtype=dtype):
                    return round_state(torch.from_numpy(S)[None, None], dtype)[0, 0].numpy()

                exact, kept = readouts(operands, lambda S: S)
                stored, _ = readouts(operands, store)
                squares.append(((normed(stored) - normed(exact))[:, :, head] ** 2).mean(-1).ravel())
                log_kept.append(np.log(kept[:, :, head]).ravel())
                if operands[4] is not None:
                    decays.append(np.exp(operands[4][:, :, head]).mean((-2, -1)).ravel())
            expected = math.sqrt(np.concatenate(squares).mean())
            assert entry["errors"][dtype] == pytest.approx(expected, rel=1e-4)
            assert expected > 1e-4
        assert entry["memory_tokens"] == pytest.approx(-2 / np.concatenate(log_kept).mean(), rel=1e-5)
        if decays:
            assert entry["decay"] == pytest.approx(np.concatenate(decays).mean(), rel=1e-5)
        else:
            assert entry["decay"] is None


def test_a_format_that_overflows_is_refused():
    tiny = loaded("delta_net")
    tiny.model.model.layers[1].attn.v_proj.weight.data *= 1e7
    with pytest.raises(KeyreduceError, match="layer 1 of tiny, its state in float16, hold NaN or inf"):
        head_errors(tiny, [draw_tokens(1, 8)], ["float16"])


def test_correlation_with_memory():
    heads = [{"memory_tokens": memory, "errors": {"int8": error}} for memory, error in ((1, 3), (5, 2), (9, 1))]
    assert memory_correlation(heads, "int8") == pytest.approx(-1)
    assert memory_correlation([*heads, {"memory_tokens": None, "errors": {"int8": 7}}], "int8") == pytest.approx(-1)
    assert memory_correlation([heads[0] | {"memory_tokens": 2}, heads[0] | {"memory_tokens": 1}], "int8") is None


SIZES = {0: MixerSizes(2, 2, 8, 8), 2: MixerSizes(1, 1, 8, 8)}
ERRORS = [
    (0, 0, {"bfloat16": 0.02, "float16": 0.01, "int8": 0.1}),
    (0, 1, {"bfloat16": 0.002, "float16": 0.001, "int8": 0.01}),
    (2, 0, {"bfloat16": 0.2, "float16": 0.3, "int8": 0.9}),
]
HEADS = [{"layer": layer, "head": head, "errors": errors} for layer, head, errors in ERRORS]
FORMATS = ("bfloat16", "float16", "int8")


@pytest.mark.parametrize(
    ("limit", "choice"),
    [
        (1.0, {0: ["int8", "int8"], 2: ["int8"]}),
        (0.5, {0: ["int8", "int8"], 2: ["bfloat16"]}),
        (0.02, {0: ["float16", "int8"], 2: ["float32"]}),
        (0.0, {0: ["float32", "float32"], 2: ["float32"]}),
    ],
)
def test_the_cheapest_within_a_limit(limit, choice):
    assert cheapest_choice(HEADS, FORMATS, limit, SIZES) == choice


def cost_of(choice) -> float:
    """A model in which the squares of errors add up."""
    errors = {(head["layer"], head["head"]): head["errors"] | {"float32": 0.0} for head in HEADS}
    return sum(errors[layer, head][name] ** 2 for layer, names in choice.items() for head, name in enumerate(names))


@pytest.mark.parametrize("tolerance", [0.0, 1e-5, 1e-3, 0.02, 0.06, 1.0])
def test_the_search_finds_the_cheapest_that_is_allowed(tolerance):
    best, tried = search_choice(HEADS, FORMATS, SIZES, cost_of, tolerance)
    limits = [-1.0, *sorted({error for head in HEADS for error in head["errors"].values()})]
    allowed = [choice for choice in (cheapest_choice(HEADS, FORMATS, limit, SIZES) for limit in limits)]
    allowed = [choice for choice in allowed if cost_of(choice) <= tolerance]
    assert bytes_of(best, SIZES) == min(bytes_of(choice, SIZES) for choice in allowed)
    assert cost_of(best) <= tolerance
    assert all(one["bytes_per_sequence"] and one["perplexity_increase"] >= 0 for one in tried)
    assert len(tried) <= 4


def test_the_search_measures_few_choices_and_survives_what_is_beyond_a_float():
    heads = [{"layer": 0, "head": n, "errors": {"int8": n / 100, "int4": 1 + n / 100}} for n in range(1000)]
    sizes = {0: MixerSizes(1000, 1000, 8, 8)}
    best, tried = search_choice(heads, ("int8", "int4"), sizes, lambda choice: None, 0.1)
    assert best == {0: ["float32"] * 1000}
    assert len(tried) == 8


def test_no_choice_is_measured_twice():
    seen = []
    heads = [{"layer": 0, "head": 0, "errors": dict(zip(FORMATS, range(3), strict=True))}]
    search_choice(heads, FORMATS, {0: MixerSizes(1, 1, 8, 8)}, lambda choice: seen.append(choice) or 1.0, 0.1)
    assert seen == [{0: ["int8"]}, {0: ["bfloat16"]}]


def found_by(tiny, batches, settings, seq_len, number=1):
    shares = []
    for rank in range(number):
        processes = Processes(rank, number)
        own = list(processes.own(batches))
        share = measure_states(tiny, own, settings, seq_len, Reporter(), processes=processes)
        shares.append(json.loads(json.dumps(share)))  # as it goes from process to process
    return state_metrics(shares, seq_len)


@pytest.mark.parametrize("chunk", [None, 32])
def test_all_formats_of_a_model(chunk):
    tiny, batches = loaded("gated_deltanet"), rows((2, 100), (1, 100), (1, 100))
    settings = StateSettings(("int4", "float32", "int8", "int8"), chunk)
    found = found_by(tiny, batches, settings, 100)
    sizes = tiny.family.layer_sizes(tiny.model.config.to_dict())
    assert [state["dtype"] for state in found["states"]] == ["float32", "int4", "int8"]
    exact = found["states"][0]
    assert exact["perplexity_increase"] == 0 and all(part["difference"] == 0 for part in exact["drift"])
    for state in found["states"]:
        with stored_states(tiny.model, tiny.family, state["dtype"], chunk):
            costs = position_costs(tiny, batches, [(1, 64), (64, 100)])
        nats = [math.fsum(row[place].nats for row in costs) for place in (0, 1)]
        assert state["perplexity_per_token"] == pytest.approx(math.exp(sum(nats) / (4 * 99)))
        assert state["bytes_per_sequence"] == bytes_of(state["dtype"], sizes)
        assert [(part["start"], part["end"], part["predictions"]) for part in state["drift"]] == [
            (1, 64, 4 * 63), (64, 100, 4 * 36),
        ]  # fmt: skip
        assert [part["nats"] for part in state["drift"]] == pytest.approx([nats[0] / (4 * 63), nats[1] / (4 * 36)])
        increase = state["perplexity_per_token"] / exact["perplexity_per_token"] - 1
        assert state["perplexity_increase"] == pytest.approx(increase)
    assert len({state["perplexity_per_token"] for state in found["states"]}) == 3
    assert found["memory_correlation"].keys() == {"int4", "int8"}
    first = torch.stack([window.tokens_T for window in batches[0]])
    assert found["heads"] == head_errors(tiny, [first], ["int4", "int8"], chunk)


def test_several_processes_find_the_same():
    tiny, batches = loaded("delta_net"), rows((1, 80), (1, 80), (1, 80))
    alone, shared = (found_by(tiny, batches, StateSettings(("int4",)), 80, number) for number in (1, 2))
    assert alone == shared


def test_the_choice_is_measured_and_written():
    tiny, batches = loaded("gated_deltanet"), rows((2, 100))
    settings = StateSettings(("int4", "bfloat16"), tolerance=0.05)
    found = found_by(tiny, batches, settings, 100)
    *_, int4, _, auto = found["states"]
    sizes = tiny.family.layer_sizes(tiny.model.config.to_dict())
    choice = {entry["layer"]: entry["formats"] for entry in auto["choice"]}
    assert auto["dtype"] == "auto" and auto["tolerance"] == 0.05
    assert auto["perplexity_increase"] <= 0.05
    assert auto["bytes_per_sequence"] == bytes_of(choice, sizes)
    assert int4["bytes_per_sequence"] <= auto["bytes_per_sequence"] <= max(bytes_of("float32", sizes), 1)
    assert {name for names in choice.values() for name in names} <= {"float32", "bfloat16", "int4"}
    assert auto["tried"][0]["bytes_per_sequence"] == int4["bytes_per_sequence"]
    with stored_states(tiny.model, tiny.family, choice):
        costs = position_costs(tiny, batches, [(1, 100)])
    assert auto["perplexity_per_token"] == pytest.approx(math.exp(sum(row[0].nats for row in costs) / 198))


def test_float32_alone_needs_no_heads(monkeypatch):
    monkeypatch.setattr(state_precision, "head_errors", lambda *args: pytest.fail("not needed"))
    found = found_by(loaded("delta_net"), rows((1, 20)), StateSettings(()), 20)
    assert found.keys() == {"states"} and len(found["states"]) == 1


@pytest.mark.parametrize("batches", [rows((1, 1)), []])
@pytest.mark.parametrize("settings", [StateSettings(()), StateSettings(("int8",), tolerance=0.1)])
def test_text_of_one_token_or_none_is_refused(batches, settings):
    with pytest.raises(KeyreduceError, match="nothing to predict"):
        found_by(loaded("delta_net"), batches, settings, 20)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds():
    tiny, batches = loaded("gated_deltanet"), rows((2, 100))
    expected = found_by(tiny, batches, StateSettings(("int8", "bfloat16")), 100)
    import fla_torch

    tiny.model.cuda()
    fla_torch.enable(cuda=True)
    try:
        found = found_by(tiny, batches, StateSettings(("int8", "bfloat16")), 100)
    finally:
        fla_torch.enable()
    for state, wanted in zip(found["states"], expected["states"], strict=True):
        assert state["perplexity_per_token"] == pytest.approx(wanted["perplexity_per_token"], rel=1e-4)
    for head, wanted in islice(zip(found["heads"], expected["heads"], strict=True), 8):
        assert head["errors"] == pytest.approx(wanted["errors"], rel=1e-2)
