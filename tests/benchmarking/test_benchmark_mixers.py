import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM

from keyreduce.benchmarking import mixer
from keyreduce.benchmarking.mixer import benchmark_mixers
from keyreduce.benchmarking.timing import Timing
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel

SIZES = {"hidden_size": 64, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 8, "intermediate_size": 32}
SETTINGS = {"batch_size": 2, "seq_len": 80, "rounds": 7, "seed": 0}


def delta_net(folder: str, **changes) -> LoadedModel:
    model = DeltaNetForCausalLM(DeltaNetConfig(**{**SIZES, **changes})).eval()
    return LoadedModel(model, None, FAMILIES["delta_net"], Path(folder))


def hybrid(folder: str, softmax_layers: list[int]) -> LoadedModel:
    """A model of which some layers are softmax attention."""
    return delta_net(folder, attn={"layers": softmax_layers, "num_heads": 2})


def gated_deltanet(folder: str) -> LoadedModel:
    config = GatedDeltaNetConfig(**SIZES, head_dim=16, num_v_heads=4, expand_v=2.0)
    return LoadedModel(GatedDeltaNetForCausalLM(config).eval(), None, FAMILIES["gated_deltanet"], Path(folder))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other at every small operation are slow where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report(one_thread) -> dict:
    models = {"dense": delta_net("d"), "pruned": delta_net("p", expand_k=0.5), "gated": gated_deltanet("g")}
    return benchmark_mixers(models, **SETTINGS)


def test_report_is_json_and_says_what_was_run(report):
    assert json.loads(json.dumps(report)) == report
    settings = report["settings"]
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert settings["dtype"] == "float32"
    assert "CPU" in settings["device"]
    assert settings["versions"]["torch"] == torch.__version__


def test_sizes_of_each_model(report):
    names = ("label", "folder", "layer", "key_heads", "value_heads", "head_k_dim", "head_v_dim")
    assert [tuple(entry[name] for name in names) for entry in report["models"]] == [
        ("dense", "d", 0, 2, 2, 32, 32),
        ("pruned", "p", 0, 2, 2, 16, 32),
        ("gated", "g", 0, 2, 4, 16, 32),
    ]
    # Two layers, 4 bytes a number.
    assert [entry["state_bytes_per_sequence"] for entry in report["models"]] == [
        2 * 4 * heads * head_k_dim * 32 for heads, head_k_dim in ((2, 32), (2, 16), (4, 16))
    ]
    # Projections of q, k, v and output, of beta; three convolutions of 4 taps; the output norm.
    parameters = [4 * 64 * 64 + 2 * 64 + 3 * 4 * 64 + 32, 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 + 4 * (32 + 32 + 64) + 32]
    assert [entry["mixer_parameters"] for entry in report["models"][:2]] == parameters


def test_figures_are_in_order(report):
    for entry in report["models"]:
        latency = entry["latency_seconds"]
        assert 0 < latency["low"] <= latency["median"] <= latency["high"]
        assert entry["tokens_per_second"] == pytest.approx(2 * 80 / latency["median"])


def test_ratios_are_dense_over_pruned(report):
    dense, pruned, gated = report["models"]
    assert not {"speedup", "memory_ratio", "state_ratio"} & dense.keys()
    assert (pruned["state_ratio"], gated["state_ratio"]) == (2.0, 1.0)
    for entry in (pruned, gated):
        assert 0 < entry["speedup"]["low"] <= entry["speedup"]["median"] <= entry["speedup"]["high"]


def test_speedup_is_taken_round_by_round(monkeypatch):
    timings = {"dense": Timing((6.0, 60.0, 8.0)), "pruned": Timing((3.0, 20.0, 8.0))}
    monkeypatch.setattr(mixer, "interleave", lambda contenders, device, **settings: timings)
    _, pruned = benchmark_mixers({"dense": delta_net("d"), "pruned": delta_net("p")}, **SETTINGS)["models"]
    assert pruned["speedup"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert pruned["latency_seconds"] == {"median": 8.0, "low": 3.0, "high": 20.0}
    assert pruned["tokens_per_second"] == 20.0


def test_memory_ratio(monkeypatch):
    remaining = iter((300, 200))
    monkeypatch.setattr(mixer, "peak_memory", lambda function, device: next(remaining))
    models = benchmark_mixers({"dense": delta_net("d"), "pruned": delta_net("p", expand_k=0.5)}, **SETTINGS)["models"]
    assert [entry["peak_memory_bytes"] for entry in models] == [300, 200]
    assert models[1]["memory_ratio"] == 1.5


def test_every_mixer_gets_the_same_input_and_is_the_first_delta_rule_layer():
    models = {"dense": delta_net("d"), "hybrid": hybrid("h", [0])}
    seen = {label: [] for label in models}
    for (label, loaded), layer in zip(models.items(), (0, 1), strict=True):
        timed = loaded.model.get_submodule(f"model.layers.{layer}.attn")
        timed.register_forward_pre_hook(
            lambda _, args, kwargs, label=label: seen[label].append(kwargs["hidden_states"]), with_kwargs=True
        )
    ticks = []
    report = benchmark_mixers(models, **SETTINGS, progress=ticks.append)
    assert [entry["layer"] for entry in report["models"]] == [0, 1]
    assert report["models"][1]["state_ratio"] == 2.0
    expected_BTD = torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(0))
    for inputs in seen.values():
        assert len(inputs) >= SETTINGS["rounds"]
        assert all(torch.equal(hidden_BTD, expected_BTD) for hidden_BTD in inputs)
        assert inputs[0].is_inference()
    assert sum(ticks) == SETTINGS["rounds"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: delta_net("o", hidden_size=32), "dense and other differ in hidden size .64 and 32."),
        (lambda: _with_model(delta_net("o"), lambda model: model.bfloat16()), "differ in dtype"),
        (lambda: _with_model(delta_net("o"), _on_another_device), "differ in device .cpu and meta."),
    ],
)
def test_models_that_differ_are_refused(other, message):
    with pytest.raises(KeyreduceError, match=message):
        benchmark_mixers({"dense": delta_net("d"), "other": other()}, **SETTINGS)


def test_model_without_a_delta_rule_layer_is_refused():
    with pytest.raises(KeyreduceError, match="s has no delta-rule layer"):
        benchmark_mixers({"dense": hybrid("s", [0, 1])}, **SETTINGS)


def _with_model(loaded: LoadedModel, change) -> LoadedModel:
    return loaded._replace(model=change(loaded.model))


def _on_another_device(model):
    return SimpleNamespace(config=model.config, device=torch.device("meta"), dtype=model.dtype)
