"""How gradient steps run: in mixed precision, and recorded, or not where that fails."""

import contextlib
import logging

import pytest
import torch
from tiny_models import build, draw_tokens

from keyreduce.families import FAMILIES
from keyreduce.models import miscompiled
from keyreduce.models.classes import family_in
from keyreduce.models.loading import prepare_backend
from keyreduce.models.miscompiled import torch_operations
from keyreduce.recovery.modes import Steps
from keyreduce.recovery.pace import Pace
from keyreduce.recovery.reconstruct import reconstruct
from keyreduce.recovery.streams import open_stream

CPU = torch.device("cpu")
MIXED = Pace(is_mixed=True)


def fit(device: torch.device, pace: Pace, scope: str = "mixer-in-block", steps: int = 24, **changes) -> dict:
    """Fit the first layer of a random model to that of another one; the last batch has fewer rows."""
    models = [build("delta_net", seed=seed, initializer_range=0.1, **changes).to(device) for seed in (0, 1)]
    batches = [draw_tokens(2, 70, seed=seed) for seed in range(3)] + [draw_tokens(1, 70, seed=3)]
    theirs, mine = (open_stream(model, family_in(model), batches, device, device) for model in models)
    targets = theirs.advance(0, keep_mixer=True)
    targets = targets if scope == "mixer" else theirs.hidden
    figures = reconstruct(mine, 0, targets, Steps(steps, 3e-3, scope), seed=0, pace=pace)
    return figures | {"weights": torch.cat([one.flatten() for one in mine.mixer(0).parameters()]).cpu()}


@pytest.mark.parametrize("scope", ["mixer", "mixer-in-block", "block"])
def test_mixed_precision_comes_as_near(scope):
    # fla's fused layer knows mixed precision on a GPU alone.
    exact, mixed = (fit(CPU, pace, scope, fuse_swiglu=False) for pace in (Pace(), MIXED))
    assert exact["error_last"] < 0.9 * exact["error_first"]
    assert mixed["error_last"] == pytest.approx(exact["error_last"], rel=0.02)
    assert not mixed["weights"].equal(exact["weights"])


def test_a_cpu_computes_in_float32():
    assert Pace.of(CPU) == Pace()
    assert fit(CPU, Pace.of(CPU), steps=4)["weights"].equal(fit(CPU, Pace(is_recorded=True), steps=4)["weights"])


class Refusing:
    """A recording that fails at its end, as one does in which something waited for the device."""

    def __init__(self, graph, pool, stream):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        raise RuntimeError("operation failed due to a previous error during capture\nmore")


class Stream:
    def __init__(self, device):
        pass

    def wait_stream(self, other):
        pass


def test_where_recording_fails_steps_run_one_by_one(monkeypatch, caplog):
    made_up = {"current_stream": Stream, "Stream": Stream, "CUDAGraph": object, "graph": Refusing}
    made_up |= {"graph_pool_handle": lambda: (0, 1), "stream": lambda stream: contextlib.nullcontext()}
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    pace, calls = Pace(is_recorded=True), []

    def double(tensor):
        calls.append(1)
        return 2 * tensor

    with caplog.at_level(logging.WARNING):
        for take in (pace.paced(double, torch.device("cuda")) for _ in range(2)):
            assert [float(take(torch.tensor(float(n)))) for n in range(6)] == [2.0 * n for n in range(6)]
    assert not pace.is_recorded
    (record,) = caplog.records
    assert record.message.endswith("operation failed due to a previous error during capture")
    assert len(calls) == 13  # what was recorded, had that worked, would not have been computed


@pytest.mark.parametrize(
    ("affected", "sizes", "expected"),
    [(False, (12, 16), False), (False, (12, 15), True), (True, (48, 16), True), (True, (48, 64), False)],
)
def test_what_runs_in_pytorch_beside_fla_kernels(monkeypatch, affected, sizes, expected):
    monkeypatch.setattr(miscompiled, "_is_affected", lambda device: affected)
    hidden = {"hidden_size": 2 * sizes[1], "expand_k": sizes[0] / sizes[1], "expand_v": 1.0, "num_heads": 2}
    config = build("delta_net", **hidden).config.to_dict()
    assert torch_operations(FAMILIES["delta_net"], config, CPU) is expected
    gated = build("gated_deltanet").config.to_dict()
    monkeypatch.setattr(miscompiled, "has_wrong_gated_gradients", lambda family, device: affected)
    assert torch_operations(FAMILIES["gated_deltanet"], gated, CPU) == (("gated_delta_rule",) if affected else False)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["mixer", "mixer-in-block", "block"])
def test_on_a_gpu_all_paces_come_as_near(scope, caplog):
    device, sizes = torch.device("cuda"), {"hidden_size": 128, "num_heads": 2}
    prepare_backend(device, gradients=True)
    paces = {"plain": Pace(), "recorded": Pace(is_recorded=True), "mixed": MIXED, "default": Pace.of(device)}
    paces["fla"] = Pace(is_mixed=True, is_recorded=True, kernels="fla")
    found = {name: fit(device, pace, scope, **sizes) for name, pace in paces.items()}
    assert paces["default"].is_recorded and paces["fla"].is_recorded and not caplog.records
    of_cpu = fit(CPU, Pace(), scope, **sizes)
    torch.testing.assert_close(found["plain"]["weights"], of_cpu["weights"], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found["recorded"]["weights"], found["plain"]["weights"], rtol=1e-3, atol=1e-4)
    for name in ("mixed", "default", "fla"):
        assert found[name]["error_last"] == pytest.approx(of_cpu["error_last"], rel=0.03), name
