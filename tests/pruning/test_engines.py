import pytest

from keyreduce.families import MixerSizes
from keyreduce.pruning.engines import ENGINES, suited_engines

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
    suited, unsuited = suited_engines([MixerSizes(2, 2, head_k_dim, 128)])
    assert set(suited) == SUITED[head_k_dim]
    assert len(suited) + len(unsuited) == len(ENGINES)
    assert all("(" in told for told in unsuited)


def test_an_engine_must_run_every_layer():
    layers = (MixerSizes(2, 2, size, 128) for size in (128, 96))
    suited, unsuited = suited_engines(layers)
    assert set(suited) == SUITED[128] & SUITED[96]
    assert len(suited) + len(unsuited) == len(ENGINES)


def test_llama_cpp_wants_square_states():
    assert "llama.cpp" in suited_engines([MixerSizes(2, 2, 64, 64)])[0]
    assert "llama.cpp" not in suited_engines([MixerSizes(2, 2, 64, 128)])[0]
