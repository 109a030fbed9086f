"""Decoding steps: what is timed is what the models compute, one token after the other."""

import pytest
import torch

from keyreduce.benchmarking import decode
from keyreduce.benchmarking.decode import NotRecordedError, capture
from keyreduce.benchmarking.steps import STEPS, mixer_steps, model_steps, operator_steps
from keyreduce.benchmarking.timed_models import random_models, sizes_named, timed_models
from keyreduce.benchmarking.timing import PeakMemory, RoundTimes
from keyreduce.errors import KeyreduceError

CPU = torch.device("cpu")
MODEL_TYPES = ("delta_net", "delta_net_2", "gated_deltanet")
SETTINGS = {"batch_size": 3, "scopes": tuple(STEPS), "rounds": 3, "seed": 0}


def time_decoding(models, roofline, *, scopes, **settings) -> list[dict]:
    return [entry for scope in scopes for entry in decode.time_decoding(models, roofline, scope, **settings)]


@pytest.fixture(params=[*MODEL_TYPES, "qwen3_next"])
def timed(request, loaded):
    """A tiny model of each family, and of one whose layers are those of transformers."""
    if request.param in MODEL_TYPES:
        return timed_models({"model": loaded(request.param)})[0]
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=4, vocab_size=64, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ).to_dict()  # fmt: skip
    return random_models(config, sizes_named(config, [(16, 16)]), CPU, torch.float32, whole=True, seed=0)[0]


def test_a_model_writes_one_token_after_the_other(timed):
    logits = []
    timed.model.register_forward_hook(lambda _, args, outputs: logits.append(outputs.logits))
    steps = model_steps(timed, 3, seed=0)
    steps.run()
    assert (len(logits), steps.count) == (5, 4)
    tokens_B1 = torch.randint(timed.vocabulary, (3, 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        at_once_BTV = timed.model(input_ids=tokens_B1.expand(3, 5), use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits[:5], dim=1), at_once_BTV, rtol=1e-3, atol=1e-3)


def test_a_mixer_takes_one_token_after_the_other(timed):
    outputs = []
    timed.mixer.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    steps = mixer_steps(timed, 3, seed=0)
    steps.run()
    assert (len(outputs), steps.count) == (4, 2)  # of two copies
    outputs, copies = [], outputs
    hidden_B1D = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        at_once = timed.mixer(hidden_states=hidden_B1D.expand(3, 2, 32))
    at_once_BTD = at_once[0] if isinstance(at_once, tuple) else at_once
    for position, (first, second) in enumerate((copies[:2], copies[2:])):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first[:, 0], at_once_BTD[:, position], rtol=1e-4, atol=1e-4)


def test_the_operator_is_called_as_the_mixer_calls_it(timed):
    reached = mixer_steps(timed, 3, seed=0)
    reached.run()
    results = operator_steps(timed, 3, seed=0).run()
    assert len(results) == 2
    sizes = timed.sizes
    for outputs, state in results:
        assert state.numel() == 3 * sizes.state_elements
        assert outputs.numel() == 3 * sizes.value_heads * sizes.head_v_dim
        assert any(torch.equal(state, tensor) for tensor in tensors_in(reached.reads()))


@pytest.mark.parametrize("scope", STEPS)
def test_what_steps_read_is_what_is_there_before_them(pair, scope):
    steps = STEPS[scope](pair[0], 2, 0)
    before = list(tensors_in(steps.reads()))
    assert any(tensor.numel() == 2 * pair[0].sizes.state_elements for tensor in before)
    steps.run()
    after = {id(tensor) for tensor in tensors_in(steps.reads())}
    replaced = [tensor for tensor in before if id(tensor) not in after]
    assert bool(replaced) == (scope != "operator")  # the operator starts from the same states every time


def test_figures_of_each_scope(pair, roofline):
    ticks = []
    entries = time_decoding(pair, roofline, **SETTINGS, progress=ticks.append)
    assert sum(ticks) == 3 * len(STEPS)
    assert [(entry["scope"], entry["label"]) for entry in entries] == [
        (scope, label) for scope in STEPS for label in ("dense", "pruned")
    ]
    for entry in entries:
        eager = entry["eager"]
        assert entry["graph"] is None
        assert entry["graph_note"] == "CUDA graphs are for a GPU"
        assert eager["times_floor"] == pytest.approx(eager["latency_seconds"]["median"] / entry["floor_seconds"])
        assert eager["times_floor"] == pytest.approx(1 / eager["bandwidth_share"])
        assert eager["tokens_per_second"] == pytest.approx(3 / eager["latency_seconds"]["median"])
        assert ("speedup" in eager) == (entry["label"] == "pruned")
    # The operator moves its states in and out, and q, k, v and its output, at 1 GB/s.
    assert entries[-1]["floor_seconds"] == pytest.approx(3 * 4 * (2 * 2 * 8 * 16 + 2 * 2 * 8 + 2 * 2 * 16) / 1e9)


def test_both_ways_are_told_where_steps_record(pair, roofline, monkeypatch):
    """With a recording that takes half as long, as a graph may where Python is what takes long."""
    seconds = ({"dense": 8.0, "pruned": 4.0}, {"dense": 4.0, "pruned": 1.0})
    timings = [{label: RoundTimes((one,)) for label, one in times.items()} for times in seconds]
    recorded = []

    def interleave(functions, device, **settings):
        if len(timings) == 1:
            assert list(functions.values()) == recorded
        return timings.pop(0)

    def record(run, device, reads):
        recorded.append(lambda: run)
        return recorded[-1]

    monkeypatch.setattr(decode, "interleave", interleave)
    monkeypatch.setattr(decode, "capture", record)
    monkeypatch.setattr(decode, "peak_memory", lambda function, device: PeakMemory(1, 1))
    _, pruned = time_decoding(pair, roofline, **SETTINGS | {"scopes": ("model",)})
    assert pruned["graph_note"] is None
    # A call is four steps.
    assert (pruned["eager"]["latency_seconds"]["median"], pruned["eager"]["speedup"]["median"]) == (1.0, 2.0)
    assert (pruned["graph"]["latency_seconds"]["median"], pruned["graph"]["speedup"]["median"]) == (0.25, 4.0)


def test_why_steps_do_not_record_is_told(pair, roofline, monkeypatch):
    def record(run, device, reads):
        raise NotRecordedError("the layer waits for the device")

    monkeypatch.setattr(decode, "capture", record)
    entries = time_decoding(pair, roofline, **SETTINGS | {"scopes": ("mixer",)})
    assert {entry["graph_note"] for entry in entries} == {"the layer waits for the device"}
    assert all(entry["eager"] and entry["graph"] is None for entry in entries)


def test_more_sequences_than_memory_are_one_line(pair, roofline):
    with pytest.raises(KeyreduceError, match="decoding 1000000000000 sequences needs more memory"):
        time_decoding(pair, roofline, **SETTINGS | {"batch_size": 10**12})


def test_nothing_records_on_a_cpu():
    with pytest.raises(NotRecordedError):
        capture(lambda: None, CPU)


@pytest.mark.gpu
def test_a_graph_starts_from_the_same_tensors_at_each_replay():
    device = torch.device("cuda")
    state, seen = [torch.ones(1 << 20, device=device)], torch.empty(1, device=device)

    def chain():
        for _ in range(3):
            state[0] = 2 * state[0]
        seen.copy_(state[0][:1])

    reads = list(state)
    replay = capture(chain, device, reads)
    del reads
    torch.cuda.empty_cache()
    for _ in range(3):
        seen.zero_()
        replay()
        assert seen.item() == 8.0


@pytest.mark.gpu
def test_what_waits_for_the_device_does_not_record():
    device = torch.device("cuda")
    number = torch.ones((), device=device)
    with pytest.raises(NotRecordedError):
        capture(lambda: number.item(), device)
    assert number.item() == 1.0


def tensors_in(value: object):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
