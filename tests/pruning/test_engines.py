import pytest

from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.pruning.engines import ENGINES, suited_engines

FLA = FAMILIES["delta_net"]
TRITON = {"fla", "vLLM (Triton)"}
SUITED = {
    128: TRITON | {"fla, 16-bit training", "SGLang", "MLX (Metal)", "llama.cpp", "FlashInfer, FlashQLA, CuteDSL"},
    96: TRITON | {"fla, 16-bit training", "MLX (Metal)"},
    64: TRITON | {"fla, 16-bit training", "SGLang", "MLX (Metal)"},
    48: TRITON | {"fla, 16-bit training"},
    31: TRITON,
    1: TRITON | {"SGLang"},
    512: {"SGLang", "MLX (Metal)"},
}


@pytest.mark.parametrize("head_k_dim", SUITED)
def test_engines_of_a_size(head_k_dim):
    suited, unsuited = suited_engines(FLA, [MixerSizes(2, 2, head_k_dim, 128)])
    assert set(suited) == SUITED[head_k_dim]
    assert len(suited) + len(unsuited) == len(ENGINES)
    assert all("(" in told for told in unsuited)


def test_an_engine_must_run_every_layer():
    layers = (MixerSizes(2, 2, size, 128) for size in (128, 96))
    suited, unsuited = suited_engines(FLA, layers)
    assert set(suited) == SUITED[128] & SUITED[96]
    assert len(suited) + len(unsuited) == len(ENGINES)


def test_llama_cpp_wants_square_states():
    assert "llama.cpp" in suited_engines(FLA, [MixerSizes(2, 2, 64, 64)])[0]
    assert "llama.cpp" not in suited_engines(FLA, [MixerSizes(2, 2, 64, 128)])[0]


def test_sglang_splits_the_values_of_a_key_head_too():
    for value_heads, head_v_dim, suits in [(2, 64, True), (4, 64, True), (6, 64, False), (2, 48, False)]:
        assert ("SGLang" in suited_engines(FLA, [MixerSizes(2, value_heads, 64, head_v_dim)])[0]) == suits


def test_no_engine_knows_what_fla_does_not_ship():
    suited, unsuited = suited_engines(FAMILIES["delta_net_2"], [MixerSizes(2, 2, 64, 64)])
    assert not suited
    assert "delta_net_2" in unsuited[0]
