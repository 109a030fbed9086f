"""Commands that start an engine, and the cuts that are looked at."""

import shlex

import pytest

from keyreduce.families import FAMILIES, MixerSizes, family_of
from keyreduce.serving.candidates import candidates
from keyreduce.serving.capacity import CacheLayout, sglang_pool, vllm_pool
from keyreduce.serving.engines import runs
from keyreduce.serving.launch import launch

GIB = 2**30
QWEN_NEXT = {"model_type": "qwen3_next", "num_hidden_layers": 48, "dtype": "bfloat16"}
CUT = dict.fromkeys(range(48), MixerSizes(16, 32, 80, 104))


def layout(config=QWEN_NEXT, cut=False):
    family = family_of(config)
    return CacheLayout.of(config, {layer: CUT[layer] for layer in family.mixer_layers(config)} if cut else None)


def test_a_command_says_its_settings():
    found = launch("vllm", "a folder/model", layout(cut=True), 40 * GIB, 4096, dtype="float32", gpus=2)
    words = shlex.split(found.command)
    assert words[:3] == ["vllm", "serve", "a folder/model"]
    settings = {name.removeprefix("--"): value for name, value in zip(words[3:], [*words[4:], ""], strict=True)}
    for name, value in found.settings.items():
        assert value is None or settings[name] == value
    assert found.settings == {
        "max-model-len": "4096",
        "max-num-seqs": str(found.sequences),
        "tensor-parallel-size": "2",
        "mamba-ssm-cache-dtype": "float32",
        "gdn-prefill-backend": "triton",
        "no-enable-prefix-caching": None,
    } | ({"max-cudagraph-capture-size": found.settings["max-cudagraph-capture-size"]} if found.sequences > 512 else {})
    assert found.sequences == vllm_pool(layout(cut=True), 40 * GIB, 4096, dtype="float32", gpus=2).sequences


def test_flashinfer_keeps_the_sizes_that_it_takes():
    assert "gdn-prefill-backend" not in launch("vllm", "m", layout(), 40 * GIB, 4096).settings
    # Other classes of vLLM do not ask for it.
    olmo = CacheLayout.of({"model_type": "olmo_hybrid"})
    assert "gdn-prefill-backend" not in launch("vllm", "m", olmo, 40 * GIB, 4096).settings


def test_kimi_linear_keeps_its_states_in_float32():
    kimi = CacheLayout.of({"model_type": "kimi_linear"})
    assert "mamba-ssm-cache-dtype" not in launch("vllm", "m", kimi, 40 * GIB, 4096, dtype="bfloat16").settings


def test_sglang_gets_the_share_at_which_nothing_is_left():
    found = launch("sglang", "m", layout(), 40 * GIB, 16_384, prefix_caching=True)
    share = float(found.settings["mamba-full-memory-ratio"])
    pool = sglang_pool(layout(), 40 * GIB, 16_384, share=share)
    assert found.sequences == pool.sequences >= found.with_prefix_caching
    assert pool.slots // 5 == pytest.approx(pool.tokens // 16_384, abs=2)
    without = launch("sglang", "m", layout(), 40 * GIB, 16_384)
    assert "--disable-radix-cache" in without.command
    assert without.sequences > found.sequences


@pytest.mark.parametrize("model_type", FAMILIES)
def test_candidates_cut_and_something_runs_them(model_type):
    family = FAMILIES[model_type]
    before = MixerSizes(2, 4 if model_type not in ("delta_net", "delta_net_2", "kimi_linear") else 2, 128, 128)
    found = candidates(family, {0: before, 1: before})
    assert found
    states = [cut[0].state_elements for cut in found]
    assert states == sorted(states, reverse=True)
    assert all(state < before.state_elements for state in states)
    for cut in found:
        assert cut[0] == cut[1]
        assert cut[0][:2] == before[:2]
        family.check_cut(cut[0])
    if family.shipped_by != "keyreduce":
        for share in (0.5, 0.75):  # not far from each share there is one that vLLM runs
            assert any(
                runs("vllm", family, cut[0]) and abs(cut[0].state_elements / before.state_elements - share) < 0.1
                for cut in found
            )


def test_layers_of_different_sizes_have_no_candidates():
    assert candidates(FAMILIES["delta_net_2"], {0: MixerSizes(2, 2, 64, 64), 1: MixerSizes(2, 2, 32, 64)}) == []
