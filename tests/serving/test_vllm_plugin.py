"""The plugin for vLLM: its kernel, and what it replaces in a vLLM that is made up here.

Where vLLM is installed, ``test_engine_kernels.py`` has its kernels compiled with the plugin.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from keyreduce.serving import vllm_plugin

REPOSITORY = Path(__file__).parents[2]
PREPARATION = "vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv"
LAYER = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
# The two modules, and those that take the names from them, as in vLLM 0.26 to 0.33.
SOURCES = {
    PREPARATION: """
def fused_post_conv_prep(conv_output, a, b, A_log, dt_bias, num_k_heads, head_k_dim, head_v_dim, apply_l2norm=True,
                         output_g_exp=False):
    return "vLLM's", head_k_dim, head_v_dim, apply_l2norm, output_g_exp
""",
    PREPARATION.rpartition(".")[0]: "from .fused_gdn_prefill_post_conv import fused_post_conv_prep",
    LAYER: """
from vllm.third_party.flash_linear_attention.ops import fused_post_conv_prep
chosen = "flashinfer"
def _resolve_gdn_prefill_backend(vllm_config):
    return "auto", chosen
""",
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Write a made-up vLLM; call it with other sources, and the plugin is registered."""
    found = list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vllm_plugin, "_has_warned", False)

    def write(sources=SOURCES):
        for name, text in sources.items():
            is_package = any(other.startswith(f"{name}.") for other in sources)
            path = tmp_path / name.replace(".", "/")
            path = path / "__init__.py" if is_package else path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    sys.meta_path[:] = found
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def load(name):
    __import__(name)
    return sys.modules[name]


def config(head_k_dim, head_v_dim, model_type="qwen3_next"):
    text = SimpleNamespace(model_type=model_type, linear_key_head_dim=head_k_dim, linear_value_head_dim=head_v_dim)
    return SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text))


@pytest.fixture
def prepared(monkeypatch):
    """Stand in for the kernel, which wants a GPU."""
    told = SimpleNamespace(prepare=lambda *arguments, **settings: ("ours", *arguments, settings))
    monkeypatch.setitem(sys.modules, "keyreduce.serving.vllm_preparation", told)


@pytest.mark.parametrize("is_loaded_before", [False, True])
def test_what_sizes_need_is_replaced(vllm, prepared, is_loaded_before):
    vllm()
    if is_loaded_before:
        load(LAYER)
    vllm_plugin.register()
    vllm_plugin.register()  # as in a process that loads plugins twice
    layer = load(LAYER)
    holders = (layer, load(PREPARATION), load(PREPARATION.rpartition(".")[0]))
    for holder in holders:
        assert holder.fused_post_conv_prep(*"xabAd", 16, 96, 128) == ("vLLM's", 96, 128, True, False)
        ours = holder.fused_post_conv_prep(
            conv_output="x", a="a", b="b", A_log="A", dt_bias="d", num_k_heads=16, head_k_dim=64, head_v_dim=128,
            apply_l2norm=False, output_g_exp=True,
        )  # fmt: skip
        settings = {"key_heads": 16, "head_k_dim": 64, "head_v_dim": 128, "normalize": False, "exponentiate": True}
        assert ours == ("ours", *"xabAd", settings)
    for sizes, chosen in {(128, 128): "flashinfer", (64, 128): "triton", (128, 64): "triton"}.items():
        assert layer._resolve_gdn_prefill_backend(config(*sizes)) == ("auto", chosen)
    for other in (config(96, 192, "olmo_hybrid"), config(None, None, "kimi_linear")):
        assert layer._resolve_gdn_prefill_backend(other) == ("auto", "flashinfer")
    layer.chosen = "cutedsl"
    assert layer._resolve_gdn_prefill_backend(config(64, 128)) == ("auto", "cutedsl")


def test_it_can_be_switched_off(vllm, monkeypatch):
    vllm()
    monkeypatch.setenv("KEYREDUCE_VLLM_PLUGIN", "0")
    vllm_plugin.register()
    assert load(LAYER).fused_post_conv_prep(*"xabAd", 16, 64, 128)[0] == "vLLM's"
    assert load(LAYER)._resolve_gdn_prefill_backend(config(64, 128)) == ("auto", "flashinfer")


def test_a_vllm_that_differs_is_left_alone_with_one_warning(vllm, caplog):
    other = SOURCES | {
        PREPARATION: "def fused_post_conv_prep(x, gates): return 'changed'",
        LAYER: f"from {PREPARATION} import fused_post_conv_prep\ndef _choose(vllm_config): return 'flashinfer'",
    }
    vllm(other)
    vllm_plugin.register()
    with caplog.at_level(logging.WARNING):
        layer = load(LAYER)
    assert layer.fused_post_conv_prep(1, 2) == "changed"
    assert not hasattr(layer, "_resolve_gdn_prefill_backend")
    assert len(caplog.records) == 1
    assert f"{PREPARATION}.fused_post_conv_prep is missing or takes other arguments" in caplog.text


def test_a_vllm_without_these_modules_is_no_matter(vllm, caplog):
    vllm({"vllm": "", "vllm.engine": "name = 1"})
    vllm_plugin.register()
    assert load("vllm.engine").name == 1
    assert not caplog.records


def test_vllm_finds_it_and_it_loads_nothing_heavy():
    """By the entry point, in a process without vLLM."""
    points = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]
    module, function = points["vllm.general_plugins"]["keyreduce"].split(":")
    program = f"import sys, {module}; {module}.{function}(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert not {"vllm", "torch", "triton", "numpy", "transformers"} & {*done.stdout.split()}


def test_the_kernel_is_right():
    program = Path(__file__).with_name("preparation_interpreted.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 12
    for worst in found:
        # bfloat16 keeps 8 bits; the interpreter cuts the others off.
        vectors = 2**-7 if worst["dtype"] == "torch.bfloat16" else 2e-6
        assert max(worst["query"], worst["key"]) < vectors
        assert worst["value"] == 0
        # A gate of -60 is a sum in float32, off by 4e-6; so is then its exponential, relatively.
        assert max(worst["decay"], worst["beta"]) < 1e-5


def test_the_reproduction_of_the_docs_fails_as_it_says(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget

    text = (REPOSITORY / "docs" / "vllm-fault.md").read_text()
    (snippet,) = re.findall(r"^```python\n(import torch\nimport triton\n.*?)^kernel\[", text, re.MULTILINE | re.DOTALL)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reproduction_of_the_docs.py").write_text(snippet)
    kernel = load("reproduction_of_the_docs").kernel

    def compiled(K, V):
        types = {"out": "*fp32", "K": "constexpr", "V": "constexpr"}
        source = triton.compiler.ASTSource(kernel, types, {"K": K, "V": V})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32))

    assert compiled(128, 128).asm["cubin"]
    with pytest.raises(triton.compiler.CompilationError, match="Mismatched type for mask"):
        compiled(64, 128)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_kernel_compiles_without_a_gpu(architecture):
    """For 64 x 128, in bfloat16; each number goes through 16-byte loads and stores, and no register is spilled."""
    pytest.importorskip("triton", reason="triton is not installed")
    import triton
    from triton.backends.compiler import GPUTarget

    from keyreduce.serving.vllm_preparation import EPSILON, preparation_kernel

    constants = {
        "H": 16, "W": 32, "K": 64, "V": 128, "K_TILE": 64, "V_TILE": 128, "TOKENS": 16, "NORMALIZE": True,
        "EXPONENTIATE": False, "EPS": EPSILON,
    }  # fmt: skip
    types = dict.fromkeys(preparation_kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("mixed_TC", "a_TW", "b_TW", "dt_bias_W", "query_key_2THK", "value_TWV"), "*bf16")
    types |= dict.fromkeys(("A_log_W", "decay_TW", "beta_TW"), "*fp32")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(preparation_kernel.arg_names)
        if name not in (*constants, "T")
    }
    source = triton.compiler.ASTSource(preparation_kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    assert compiled.asm["ptx"].count("ld.global.v4") == compiled.asm["ptx"].count("st.global.v4") == 3
    assert compiled.asm["cubin"]
