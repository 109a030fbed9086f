import math

import hybrid_models
import pytest
import torch
from hybrid_models import CHANNEL_DECAY, LANGUAGE
from tiny_models import FAMILIES, build

from keyreduce.benchmarking import per_token
from keyreduce.benchmarking.per_token import time_per_token, token_entries
from keyreduce.benchmarking.timed_models import sizes_named, timed_models
from keyreduce.benchmarking.timing import RoundTimes
from keyreduce.errors import KeyreduceError

CPU = torch.device("cpu")
QUICK = {"seq_len": 70, "decode_batch_size": 2, "rounds": 2}


@pytest.mark.parametrize("model_type", [*FAMILIES, *LANGUAGE, *CHANNEL_DECAY])
def test_every_size_is_timed(model_type):
    config = (build(model_type) if model_type in FAMILIES else hybrid_models.build(model_type)).config.to_dict()
    given = sizes_named(config, [(8, 8), (5, 5), (5, 5)])
    given.append(given[0]._replace(key_heads=1, value_heads=given[0].value_heads // given[0].key_heads))
    ticks = []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    times = time_per_token(config, given, CPU, torch.float32, **QUICK, progress=ticks.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(times) == 4
    assert sum(ticks) == 2
    for one in times:
        assert len(one.prefill.seconds) == len(one.decode.seconds) == 2
        assert all(0 < seconds < math.inf for seconds in (*one.prefill.seconds, *one.decode.seconds))
    assert time_per_token(config, [], CPU, torch.float32) == []


def test_times_are_of_one_token_of_the_mixer_of_these_sizes(monkeypatch):
    """Each call takes as many seconds as its number says, and a decoding call is a step of each of two copies."""
    config, rows = build("delta_net").config.to_dict(), []

    def interleave(functions, device, *, rounds, progress):
        for function in functions.values():
            rows.append(seen(function))
        return {name: RoundTimes((number + 1.0,) * rounds) for number, name in enumerate(functions)}

    def seen(function):
        """The shapes of q and v projections that run, and of their input."""
        found = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: (
                found.append((tuple(inputs[0].shape), tuple(output.shape)))
                if isinstance(module, torch.nn.Linear)
                else None
            )
        )
        function()
        handle.remove()
        return found

    monkeypatch.setattr(per_token, "interleave", interleave)
    times = time_per_token(config, sizes_named(config, [(16, None), (6, 10)]), CPU, torch.float32, **QUICK)
    assert [(one.prefill.seconds, one.decode.seconds) for one in times] == [
        ((1.0 / 70,) * 2, (2.0 / 2,) * 2), ((3.0 / 70,) * 2, (4.0 / 2,) * 2),
    ]  # fmt: skip
    for row, tokens, (keys, values) in zip(
        rows, ((1, 70), (2, 1), (1, 70), (2, 1)), ((32, 32), (32, 32), (12, 20), (12, 20)), strict=True
    ):
        assert ((*tokens, 32), (*tokens, keys)) in row
        assert ((*tokens, 32), (*tokens, values)) in row
        assert ((*tokens, values), (*tokens, 32)) in row


def test_all_steps_are_recorded_or_none(monkeypatch):
    config, ran = build("delta_net").config.to_dict(), []
    names = {"graph": lambda: ran.append("graph")}
    monkeypatch.setattr(per_token, "capture", lambda run, device, reads: names["graph"])
    sizes = sizes_named(config, [(16, None), (6, None)])
    time_per_token(config, sizes, CPU, torch.float32, **QUICK)
    assert ran  # in place of the steps themselves
    ran.clear()

    def capture(run, device, reads):
        if len(ran) == 1:
            raise per_token.NotRecordedError("the second waits for the device")
        ran.append("recorded")
        return lambda: ran.append("graph")

    monkeypatch.setattr(per_token, "capture", capture)
    time_per_token(config, sizes, CPU, torch.float32, **QUICK)
    assert ran == ["recorded"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_batch_size": 10**12}, "decoding 1000000000000 sequences needs more memory"),
        ({"seq_len": 10**14}, "timing the mixer needs more memory"),
    ],
)
def test_more_than_fits_is_one_line(change, message):
    config = build("delta_net").config.to_dict()
    with pytest.raises(KeyreduceError, match=message):
        time_per_token(config, sizes_named(config, [(8, None)]), CPU, torch.float32, **QUICK | change)


def test_a_report_of_what_was_measured(loaded):
    (timed,) = timed_models({"dense": loaded("gated_deltanet")})
    latency = {"median": 8.0, "low": 4.0, "high": 16.0}
    passes = [
        {"label": label, "batch_size": 2, "seq_len": 4, "latency_seconds": latency} for label in ("dense", "other")
    ]
    ways = [{"latency_seconds": {"median": number}} for number in (3.0, 1.0)]
    steps = [
        {"label": "dense", "batch_size": 1, "eager": ways[0], "graph": None},
        {"label": "dense", "batch_size": 5, "eager": ways[0], "graph": ways[1]},
        {"label": "other", "batch_size": 5, "eager": ways[0], "graph": ways[1]},
    ]
    assert token_entries([timed], passes, steps) == [
        {
            "label": "dense",
            "head_k_dim": 12,
            "head_v_dim": 24,
            "state_bytes_per_sequence": 2 * 4 * 4 * 12 * 24,
            "prefill": [{"batch_size": 2, "seq_len": 4, "seconds_per_token": {"median": 1.0, "low": 0.5, "high": 2.0}}],
            "decode": [
                {"batch_size": 1, "seconds_per_step": {"median": 3.0}},
                {"batch_size": 5, "seconds_per_step": {"median": 1.0}},
            ],
        }
    ]
