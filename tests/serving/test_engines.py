import itertools
import re
from pathlib import Path
from typing import get_args

import pytest

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.pruning.budget import sizes_after
from keyreduce.serving.engines import (
    ENGINES,
    NAMED,
    Known,
    check_engine,
    near_sizes,
    needs_plugin,
    runs,
    suited_engines,
)

REPOSITORY = Path(__file__).parents[2]

FLA = FAMILIES["delta_net"]
TRITON = {"fla", "vLLM (Triton)"}
WITH_PLUGIN = {"fla", "vLLM with keyreduce's plugin"}
SUITED = {
    128: TRITON | {"fla, 16-bit training", "SGLang", "MLX (Metal)", "llama.cpp", "FlashInfer, FlashQLA, CuteDSL"},
    96: TRITON | {"fla, 16-bit training", "MLX (Metal)"},
    72: TRITON | {"fla, 16-bit training"},
    64: WITH_PLUGIN | {"fla, 16-bit training", "SGLang", "MLX (Metal)"},
    48: WITH_PLUGIN | {"fla, 16-bit training"},
    31: WITH_PLUGIN,
    1: WITH_PLUGIN | {"SGLang"},
    512: {"MLX (Metal)"},
}


@pytest.mark.parametrize("head_k_dim", SUITED)
def test_engines_of_a_size(head_k_dim):
    suited, unsuited = suited_engines(FLA, [MixerSizes(2, 2, head_k_dim, 128)])
    assert set(suited) == SUITED[head_k_dim]
    # vLLM with the plugin is shown where it makes a difference.
    assert len(suited) + len(unsuited) == len(ENGINES) + ({*suited} >= WITH_PLUGIN)
    assert all("(" in told for told in unsuited)


def test_an_engine_must_run_every_layer():
    layers = (MixerSizes(2, 2, size, 128) for size in (128, 96))
    suited, unsuited = suited_engines(FLA, layers)
    assert set(suited) == SUITED[128] & SUITED[96]
    assert len(suited) + len(unsuited) == len(ENGINES)


def test_llama_cpp_wants_square_states():
    assert "llama.cpp" in suited_engines(FLA, [MixerSizes(2, 2, 64, 64)])[0]
    assert "llama.cpp" not in suited_engines(FLA, [MixerSizes(2, 2, 64, 128)])[0]


@pytest.mark.parametrize(
    ("model_type", "sizes", "suits"),
    [
        ("qwen3_next", (2, 2, 64, 64), True),
        ("qwen3_next", (2, 4, 64, 64), True),
        # Three value heads for a key head: the kernel that wants powers of two is not called.
        ("qwen3_next", (2, 6, 96, 64), True),
        ("qwen3_next", (2, 2, 64, 48), False),
        ("qwen3_next", (2, 2, 48, 64), False),
        # The 16 key and 48 value heads of Qwen3.5-27B, whose values are taken one head at a time.
        ("qwen3_5", (16, 48, 128, 128), True),
        ("qwen3_5", (16, 48, 64, 96), False),
        ("qwen3_5", (16, 48, 96, 128), False),
        ("qwen3_5", (16, 64, 64, 64), True),
    ],
)
def test_sglang_splits_the_values_of_a_key_head_too(model_type, sizes, suits):
    assert ("SGLang" in suited_engines(FAMILIES[model_type], [MixerSizes(*sizes)])[0]) == suits


NEWER = {
    "bailing_hybrid": ({"vllm": "0.28", "sglang": "0.5.23", "mlx": "0.32.2"}, {64: {"vllm", "mlx"}, 128: {"sglang"}}),
    "glm5_next": ({"vllm": "0.30", "sglang": "0.5.23"}, {64: {"vllm", "sglang"}, 256: set()}),
    "qwen4_exp": ({"vllm": "0.29", "sglang": "0.5.23"}, {64: {"vllm", "sglang"}, 96: {"vllm"}}),
    "minicpmv4_6": ({"vllm": "0.26", "sglang": "0.5.23"}, {64: {"vllm", "sglang"}}),
    "minicpmv4_7": ({"vllm": "0.32", "sglang": "0.5.23"}, {64: {"vllm", "sglang"}}),
    "minicpm_ocr": ({"vllm": "0.33"}, {64: {"vllm"}}),
    "jev": ({}, {}),
}


@pytest.mark.parametrize("model_type", NEWER)
def test_newer_architectures_are_known_since_a_version_and_their_rows_were_read(model_type):
    since, by_size = NEWER[model_type]
    # The plugin changes nothing in what vLLM knows.
    engines = {name: engine for name, engine in NAMED.items() if engine.knows and name != "vllm-plugin"}
    found = {name: engine.knows.get(model_type) for name, engine in engines.items()}
    assert {name: version for name, version in found.items() if version} == since
    for size, names in by_size.items():
        sizes = MixerSizes(16, 16, size, size)
        assert names <= {name for name in since if runs(name, FAMILIES[model_type], sizes)}
        assert not any(runs(name, FAMILIES[model_type], sizes) for name in since if not names)
    for name in since.keys() - {"mlx"}:
        row = NAMED[name].row(model_type)
        assert model_type in row.model_types and {one.how for one in row.evidence} == {"read"}


def test_sglang_takes_the_values_of_bailing_hybrid_from_softmax_attention():
    assert not runs("sglang", FAMILIES["bailing_hybrid"], MixerSizes(16, 16, 64, 64))


BAILING = {
    "model_type": "bailing_hybrid", "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 128,
    "layer_group_size": 6,
}  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "vllm-plugin", "sglang", "mlx"])
@pytest.mark.parametrize("config", [BAILING, BAILING | {"linear_num_heads": 3}], ids=["whole", "cut before"])
def test_heads_that_an_engine_takes_from_softmax_attention_are_refused(engine, config):
    """They read ``num_attention_heads``, which is as it was, in the mixers that have fewer."""
    family = FAMILIES["bailing_hybrid"]
    check_engine(engine, BAILING, family.layer_sizes(BAILING))
    fewer = {layer: MixerSizes(3, 3, 128, 128) for layer in range(5)}
    cause = "takes the number of heads of bailing_hybrid's mixers from num_attention_heads"
    with pytest.raises(KeyreduceError, match=f"`engine` {engine} {cause}.* stays 4; it cannot run mixers of 3: cut ch"):
        check_engine(engine, config, fewer)
    assert runs(engine, family, fewer[0]) and not runs(engine, family, fewer[0], config)
    assert runs(engine, family, MixerSizes(4, 4, 128, 128), config)


def test_heads_of_attention_are_among_the_demands():
    family, sizes = FAMILIES["bailing_hybrid"], [MixerSizes(3, 3, 128, 128)]
    suited, unsuited = suited_engines(family, sizes, BAILING)
    theirs = {"vLLM (Triton)", "SGLang", "MLX (Metal)"}
    assert theirs.isdisjoint(suited) and "transformers" in suited
    told = [one for one in unsuited if one.startswith(tuple(theirs))]
    assert len(told) == 3 and all("as many heads as num_attention_heads says" in one for one in told)
    assert theirs <= set(suited_engines(family, [MixerSizes(4, 4, 128, 128)], BAILING)[0])


def test_no_engine_knows_what_fla_does_not_ship():
    suited, unsuited = suited_engines(FAMILIES["delta_net_2"], [MixerSizes(2, 2, 64, 64)])
    assert not suited
    assert "delta_net_2" in unsuited[0]


def test_models_of_transformers_run_there_at_any_size():
    suited, _ = suited_engines(FAMILIES["qwen3_next"], [MixerSizes(2, 4, 31, 128)])
    assert suited == ["transformers", "fla", "vLLM with keyreduce's plugin"]


@pytest.mark.parametrize(
    ("model_type", "head_k_dim", "head_v_dim", "starts"),
    [
        # Run on an H100 with vLLM 0.26.0; OLMo-Hybrid compiled for it.
        ("qwen3_next", 128, 128, True),
        ("qwen3_next", 96, 128, True),
        ("qwen3_next", 72, 128, True),
        ("qwen3_next", 64, 64, True),
        ("qwen3_next", 64, 128, False),
        ("olmo_hybrid", 96, 192, True),
        ("olmo_hybrid", 48, 192, True),
    ],
)
def test_vllm_pads_both_sizes_alike(model_type, head_k_dim, head_v_dim, starts):
    suited, _ = suited_engines(FAMILIES[model_type], [MixerSizes(2, 2, head_k_dim, head_v_dim)])
    assert ("vLLM (Triton)" in suited) == starts
    assert runs("vllm", FAMILIES[model_type], MixerSizes(2, 2, head_k_dim, head_v_dim)) == starts


def check(engine, config, keep):
    """Ask for the sizes that so many kept channels leave."""
    after = {
        layer: sizes_after(sizes, {target: number_of[layer] for target, number_of in keep.items()})
        for layer, sizes in FAMILIES[config["model_type"]].layer_sizes(config).items()
        if keep
    }
    check_engine(engine, config, after)


def keep(key=None, value=None, layers=range(3)):
    numbers = {"key": key, "value": value}
    return {target: dict.fromkeys(layers, number) for target, number in numbers.items() if number}


QWEN = {
    "model_type": "qwen3_5_text", "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "numbers"),
    [
        ("fla", keep(97)), ("vllm", keep(97)), ("vllm-plugin", keep(64)), ("vllm-plugin", keep(64, 104)),
        ("transformers", keep(97)), ("sglang", keep(64)), ("mlx", keep(96)),
        ("llama.cpp", keep(64, 64)),
    ],
)  # fmt: skip
def test_sizes_that_an_engine_runs_pass(engine, numbers):
    check(engine, QWEN, numbers)


@pytest.mark.parametrize(
    ("engine", "numbers", "told"),
    [
        ("sglang", keep(96), r"leaves 96 x 128 channels a head; near it run 64 x 128 (`target` key, `keep` 64)"),
        ("mlx", keep(48), "run 64 x 96 (`target` key,value, `keep` 64,96), 64 x 128 (`target` key, `keep` 64)"),
        ("llama.cpp", keep(64), "near it run 64 x 64 (`target` key,value, `keep` 64,64)"),
        ("llama.cpp", keep(48, 48), "near it run 64 x 64 (`target` key,value, `keep` 64,64)"),
        ("sglang", keep(64, 96), "near it run 64 x 128 (`target` key, `keep` 64)"),
        (
            "vllm",
            keep(64),
            "80 x 104 (`target` key,value, `keep` 80,104), 72 x 128 (`target` key, `keep` 72), 64 x 64 (`target` "
            "key,value, `keep` 64,64); where keyreduce is installed beside vLLM, its plugin runs this cut too: "
            "`engine` vllm-plugin",
        ),
    ],
)
def test_other_sizes_are_refused_and_the_right_ones_named(engine, numbers, told):
    with pytest.raises(KeyreduceError, match=re.escape(told)):
        check(engine, QWEN, numbers)


def test_sizes_that_are_named_do_run_and_cut():
    family, before = FAMILIES["qwen3_next"], MixerSizes(16, 32, 128, 128)
    for name in NAMED:
        for key, value in itertools.product((31, 48, 64, 100, 127), repeat=2):
            for found in near_sizes(name, family, before, before._replace(head_k_dim=key, head_v_dim=value)):
                sizes = before._replace(head_k_dim=found[0], head_v_dim=found[1])
                assert runs(name, family, sizes)
                assert sizes.state_elements < before.state_elements


def test_the_plugin_changes_what_qwen_runs_alone():
    for model_type, sizes in {"qwen3_next": (64, 128), "kimi_linear": (64, 128), "olmo_hybrid": (64, 300)}.items():
        family, layer = FAMILIES[model_type], MixerSizes(2, 2, *sizes)
        assert not runs("vllm", family, layer)
        assert runs("vllm-plugin", family, layer) == needs_plugin(family, layer) == (model_type == "qwen3_next")


def test_a_family_of_one_size_is_named_one_size():
    before = MixerSizes(32, 32, 128, 128)
    assert near_sizes("vllm", FAMILIES["kimi_linear"], before, before._replace(head_k_dim=64)) == [(88, 88), (64, 64)]


def test_a_model_that_no_cut_fits():
    with pytest.raises(KeyreduceError, match="no cut of this model fits"):
        check("mlx", QWEN | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}, keep(8))


def test_every_row_says_how_it_is_known():
    for engine in (*ENGINES, *NAMED.values()):
        for row in engine.rows:
            assert row.evidence
            for one in row.evidence:
                assert one.how in get_args(Known) and one.version and one.what
                assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", one.when)
                if one.what.startswith("benchmarks/"):
                    assert (REPOSITORY / one.what).is_file(), one.what


def test_one_layer_that_does_not_fit_is_enough():
    numbers = keep(64)
    numbers["key"][2] = 48
    with pytest.raises(KeyreduceError, match="leaves 48"):
        check("mlx", QWEN, numbers)


def test_no_engine_is_asked_for_an_architecture_of_ours():
    with pytest.raises(KeyreduceError, match="it does not know delta_net_2"):
        check("fla", {"model_type": "delta_net_2"}, {})
