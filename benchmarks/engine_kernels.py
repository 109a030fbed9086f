"""Which sizes the delta-rule kernels of an engine compile for, found out on a machine without a GPU.

    python benchmarks/engine_kernels.py vllm --output benchmarks/serving/kernels_vllm.json
    python benchmarks/engine_kernels.py vllm-plugin --output benchmarks/serving/kernels_vllm_plugin.json
    python benchmarks/engine_kernels.py fla --kernels kda --sizes 64x64 48x48 --architectures 90 --output found.json

The engine must be installed, as its wheel alone: fla, vLLM, or SGLang; vllm-plugin is vLLM with what keyreduce replaces
in it (keyreduce/serving/vllm_plugin.py). Its own functions for prefill and decode are called as the engine calls them,
with 16 key and 32 value heads where nothing else is said, and Triton compiles each kernel down to machine code for A100
(80), H100 (90) and B200 (100) without running it. Of the settings that a kernel tries in tuning, one is compiled for
each shape of its tiles; where none fits into the GPU's shared memory, the kernel counts as not compiled.

Each row is written as it is known, and an interrupted run resumes from there with the same versions.

A row has: the kernels, the architecture, K key and V value channels of a head, whether all compiled, and the first
error. What compiles need not be right, nor fast. keyreduce/serving/engines.py takes its "compiled" rows from here.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

KEY_HEADS, VALUE_HEADS = 16, 32
TOKENS = 192
DISTRIBUTIONS = {"fla": "flash-linear-attention", "vllm": "vllm", "vllm-plugin": "vllm", "sglang": "sglang"}
_QWEN = (
    *("128x128", "96x128", "72x128", "65x128", "64x128", "48x128", "32x128", "80x104", "64x104", "128x64", "96x64"),
    *("64x64", "48x64", "33x64", "32x64", "32x32", "256x256"),
)
# Engine -> its kernels -> the sizes that are asked about on an H100, and those on the others.
GRIDS = {
    "fla": {
        "gated_deltanet": (("128x128", "80x104", "64x128", "64x64", "48x48", "264x128"), ("64x128",)),
        "kda": (("64x64", "48x48", "64x128"), ("64x64",)),
    },
    "vllm": {
        "qwen": (_QWEN, ("128x128", "80x104", "72x128", "64x128", "64x64")),
        "olmo_hybrid": (("96x192", "64x192", "48x192", "32x192"), ("96x192", "48x192")),
        "kimi_linear": (("128x128", "96x96", "80x80", "64x64", "48x48", "32x32"), ("128x128", "64x64")),
    },
    "vllm-plugin": {
        "qwen": (
            ("64x128", "48x128", "32x128", "16x128", "64x104", "40x100", "128x64", "24x64", "128x256"),
            ("64x128", "48x128", "64x104"),
        )
    },
    "sglang": {
        "qwen3_next": (
            ("128x128", "96x128", "72x128", "64x128", "80x104", "64x96", "96x64", "48x64", "64x64", "32x32", "512x128"),
            ("96x128", "64x96", "64x64"),
        ),
        "qwen3_5": (("128x128", "96x128", "64x128", "64x96", "80x104"), ("96x128", "64x96", "64x128")),
        "kimi_linear": (("128x128", "64x64", "48x48"), ("64x64",)),
    },
}
_MOST_ASKED = 90


class DoesNotFit(Exception):
    """A kernel needs more shared memory than the GPU has."""


def watch_kernels(shared_limit: int) -> list[str]:
    """Have Triton compile every kernel that is called from now on, and run none; return the list of their names."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    names, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup=True, **settings):
        names.append(self.__name__)
        kernel = run(self, *args, grid=grid, warmup=True, **settings)
        if kernel is not None and kernel.metadata.shared > shared_limit:
            raise DoesNotFit(f"{self.__name__} wants {kernel.metadata.shared} bytes of shared memory")
        return kernel

    def one_of_each_shape(self, *args, **settings):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        shapes, last = set(), None
        for config in self.prune_configs(settings):
            shape = tuple(sorted(config.kwargs.items()))
            if shape in shapes:
                continue
            try:
                self.fn.run(*args, **settings, **config.all_kwargs())
            except DoesNotFit as error:
                last = error  # another setting of this shape may need less
                continue
            shapes.add(shape)
        self.nargs = None
        if not shapes:
            raise last

    JITFunction.run = compile_only
    for tuner in [Autotuner, *Autotuner.__subclasses__()]:
        tuner.run = one_of_each_shape
    return names


def _inputs(key: int, value: int, heads: int = KEY_HEADS, value_heads: int = VALUE_HEADS, tokens: int = TOKENS) -> dict:
    """q, k, v, beta and the decay of a batch of one row, in which sequences lie one after another."""
    import torch

    def made(*shape, dtype=torch.bfloat16):
        return torch.zeros(1, tokens, *shape, dtype=dtype)

    return {
        "q": made(heads, key), "k": made(heads, key), "v": made(value_heads, value), "beta": made(value_heads),
        "g": made(value_heads, dtype=torch.float32),
    }  # fmt: skip


def _sequences() -> dict:
    import torch

    return {"cu_seqlens": torch.tensor([0, 64, TOKENS])}


def fla_gated_deltanet(key: int, value: int) -> None:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    for function in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule):
        function(**_inputs(key, value), output_final_state=True, use_qk_l2norm_in_kernel=True)


def fla_kda(key: int, value: int) -> None:
    import torch
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    for function in (chunk_kda, fused_recurrent_kda):
        inputs = _inputs(key, value, value_heads=KEY_HEADS)
        gate = {"A_log": torch.zeros(KEY_HEADS), "dt_bias": torch.zeros(KEY_HEADS * key), "use_gate_in_kernel": True}
        inputs["g"] = inputs["k"]
        function(**inputs, **gate, output_final_state=True, use_qk_l2norm_in_kernel=True)


def vllm_qwen(key: int, value: int) -> None:
    """Qwen3-Next and Qwen3.5: what prepares a prefill, the prefill, and both ways of decoding."""
    import torch
    from vllm.third_party.flash_linear_attention import ops

    raw = torch.zeros(TOKENS, 2 * KEY_HEADS * key + VALUE_HEADS * value, dtype=torch.bfloat16)
    a = torch.zeros(TOKENS, VALUE_HEADS, dtype=torch.bfloat16)
    weights = {"A_log": torch.zeros(VALUE_HEADS), "dt_bias": torch.zeros(VALUE_HEADS, dtype=torch.bfloat16)}
    q, k, v, g, beta = ops.fused_post_conv_prep(
        conv_output=raw, a=a, b=a, **weights, num_k_heads=KEY_HEADS, head_k_dim=key, head_v_dim=value
    )
    states = torch.zeros(4, VALUE_HEADS, value, key, dtype=torch.bfloat16)
    ops.chunk_gated_delta_rule(
        q[None], k[None], v[None], g[None], beta[None], initial_state=states[:2], output_final_state=True,
        **_vllm_sequences(),
    )  # fmt: skip
    indices, out = torch.arange(1, 3, dtype=torch.int32), torch.zeros(2, 1, VALUE_HEADS, value, dtype=torch.bfloat16)
    ops.fused_recurrent_gated_delta_rule_packed_decode(
        mixed_qkv=raw[:2], a=a[:2], b=a[:2], **weights, scale=key**-0.5, initial_state=states, out=out,
        ssm_state_indices=indices, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    ops.fused_sigmoid_gating_delta_rule_update(
        **weights, a=a[:2], b=a[:2], q=q[None, :2], k=k[None, :2], v=v[None, :2], initial_state=states,
        inplace_final_state=True, cu_seqlens=torch.arange(3, dtype=torch.int32), ssm_state_indices=indices,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def vllm_olmo_hybrid(key: int, value: int) -> None:
    """OLMo-Hybrid: its own class, with as many key as value heads."""
    import torch
    from vllm.third_party.flash_linear_attention import ops

    inputs = _inputs(key, value, 30, 30)
    inputs["beta"] = inputs["beta"].float()
    states = torch.zeros(4, 30, value, key, dtype=torch.bfloat16)
    more = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, **_vllm_sequences(with_chunks=False)}
    ops.chunk_gated_delta_rule(**inputs, initial_state=states[:2], **more)
    ops.fused_recurrent_gated_delta_rule(
        **{name: one[:, :2] for name, one in inputs.items()}, initial_state=states, inplace_final_state=True,
        cu_seqlens=torch.arange(3, dtype=torch.int32), ssm_state_indices=torch.arange(1, 3, dtype=torch.int32),
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def vllm_kimi_linear(key: int, value: int) -> None:
    """Kimi Linear, whose heads have one size for keys and values."""
    import torch
    from vllm.third_party.flash_linear_attention.ops.kda import (
        chunk_kda_with_fused_gate,
        fused_kda_gate,
        fused_recurrent_kda,
    )

    inputs = _inputs(key, value, 32, 32)
    gate = inputs.pop("k").clone()
    inputs = inputs | {"k": gate, "beta": inputs["beta"].float()}
    del inputs["g"]
    weights = {"A_log": torch.zeros(1, 1, 32, 1), "g_bias": torch.zeros(32 * key)}
    states = torch.zeros(4, 32, value, key)
    chunk_kda_with_fused_gate(
        **inputs, raw_g=gate, **weights, initial_state=states[:2], output_final_state=True,
        use_qk_l2norm_in_kernel=True, **_vllm_sequences(with_chunks=False),
    )  # fmt: skip
    decay = fused_kda_gate(gate[0, :2].flatten(1), weights["A_log"], key, g_bias=weights["g_bias"])[None]
    fused_recurrent_kda(
        **{name: one[:, :2] for name, one in inputs.items()}, g=decay, initial_state=states,
        use_qk_l2norm_in_kernel=True, cu_seqlens=torch.arange(3, dtype=torch.int32),
        ssm_state_indices=torch.arange(1, 3, dtype=torch.int32),
    )  # fmt: skip


def _vllm_sequences(with_chunks: bool = True) -> dict:
    import torch
    from vllm.third_party.flash_linear_attention.ops import index

    ends = torch.tensor([0, 64, TOKENS], dtype=torch.int32)
    if not with_chunks:
        return {"cu_seqlens": ends}
    chunks = {name: getattr(index, f"prepare_{name}")(ends, 64) for name in ("chunk_indices", "chunk_offsets")}
    return {"cu_seqlens": ends, **chunks}


def sglang_qwen3_next(key: int, value: int) -> None:
    """Qwen3-Next: the projections, packed by key head, taken apart, the prefill and the decoding."""
    _sglang_qwen("fused_qkvzba_split_reshape_cat", key, value, VALUE_HEADS)


def sglang_qwen3_5(key: int, value: int) -> None:
    """Qwen3.5, with three value heads for each key head as in 27B: its projections are taken apart otherwise."""
    _sglang_qwen("fused_qkvzba_split_reshape_cat_contiguous", key, value, 3 * KEY_HEADS)


def _sglang_qwen(split: str, key: int, value: int, heads: int) -> None:
    import torch
    from sglang.kernels.ops.attention import triton_gdn_fused_proj as projections
    from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule
    from sglang.kernels.ops.attention.fla.fused_recurrent import fused_recurrent_gated_delta_rule_packed_decode

    packed = torch.zeros(2, 2 * KEY_HEADS * key + 2 * heads * value, dtype=torch.bfloat16)
    ba = torch.zeros(2, 2 * heads, dtype=torch.bfloat16)
    raw, _, b, a = getattr(projections, split)(packed, ba, KEY_HEADS, heads, key, value)
    states, indices = torch.zeros(4, heads, value, key), torch.arange(1, 3, dtype=torch.int32)
    chunk_gated_delta_rule(
        **_inputs(key, value, value_heads=heads), initial_state=states, initial_state_indices=indices,
        head_first=False, use_qk_l2norm_in_kernel=True, cu_seqlens=_sequences()["cu_seqlens"].int(),
    )  # fmt: skip
    fused_recurrent_gated_delta_rule_packed_decode(
        mixed_qkv=raw, a=a, b=b, A_log=torch.zeros(heads), dt_bias=torch.zeros(heads), scale=key**-0.5,
        initial_state=states, out=torch.zeros(2, 1, heads, value, dtype=torch.bfloat16), ssm_state_indices=indices,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def sglang_kimi_linear(key: int, value: int) -> None:
    """Kimi Linear: the prefill and the decoding."""
    import torch
    from sglang.kernels.ops.attention.fla.kda import chunk_kda, fused_recurrent_kda

    inputs = _inputs(key, value, 32, 32)
    inputs["g"], inputs["beta"] = inputs["k"].float(), inputs["beta"].float()
    states, indices = torch.zeros(4, 32, value, key), torch.arange(1, 3, dtype=torch.int32)
    more = {"initial_state": states, "initial_state_indices": indices, "use_qk_l2norm_in_kernel": True}
    chunk_kda(**inputs, **more, cu_seqlens=_sequences()["cu_seqlens"].int())
    fused_recurrent_kda(
        **{name: one[:, :2] for name, one in inputs.items()}, initial_state=states, ssm_state_indices=indices,
        use_qk_l2norm_in_kernel=True, cu_seqlens=torch.arange(3, dtype=torch.int32),
    )  # fmt: skip


@functools.cache
def prepared(engine: str, architecture: int) -> list[str]:
    """Make up a GPU for this process, which changes torch and Triton; return the names of the kernels to be called."""
    from made_up_gpu import GPUS, make_up, make_up_for_vllm

    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    (make_up_for_vllm if DISTRIBUTIONS[engine] == "vllm" else make_up)(architecture)
    if engine == "vllm-plugin":
        from keyreduce.serving import vllm_plugin

        vllm_plugin.register()
    return watch_kernels(GPUS[architecture][2])


def compiled(engine: str, kernels: str, architecture: int, key: int, value: int) -> dict:
    """Return the row of one size; to be called in a process of its own, for one architecture."""
    names = prepared(engine, architecture)
    began, error = time.perf_counter(), None
    names.clear()
    try:
        globals()[f"{engine.removesuffix('-plugin')}_{kernels}"](key, value)
    except Exception as raised:  # what a kernel or its caller raises is anything
        error = f"{names[-1] if names else 'no kernel'}: {_last_line(raised)}"
    row = {
        "kernels": kernels, "architecture": architecture, "head_k_dim": key, "head_v_dim": value,
        "compiles": error is None, "error": error,
    }  # fmt: skip
    print(f"{time.perf_counter() - began:5.0f} s, {len(names)} calls", row, flush=True)
    return row


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=GRIDS)
    parser.add_argument("--kernels", nargs="*", help="some of the engine's; by default all")
    parser.add_argument("--sizes", nargs="*", help="such as 64x128; by default a grid for each")
    parser.add_argument("--architectures", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    found = {asked.engine: version(DISTRIBUTIONS[asked.engine]), "triton": version("triton"), "torch": version("torch")}
    rows = made_before(asked.output, found)
    for kernels in asked.kernels or GRIDS[asked.engine]:
        grid = GRIDS[asked.engine][kernels]
        for architecture in asked.architectures:
            have = {tuple(row.values())[2:4] for row in rows if tuple(row.values())[:2] == (kernels, architecture)}
            names = asked.sizes or grid[architecture != _MOST_ASKED]
            sizes = [size for name in names if (size := tuple(map(int, name.split("x")))) not in have]
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                for size in sizes:
                    rows.append(pool.apply(compiled, (asked.engine, kernels, architecture, *size)))
                    write(asked.output, found, rows)


def made_before(path: Path, found: dict) -> list[dict]:
    """Return the rows of a file of the same versions, which a run that was cut off has left."""
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    return content.pop("rows") if content == found | {"rows": content["rows"]} else []


def write(path: Path, found: dict, rows: list[dict]) -> None:
    """Write the versions and a line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(found)[:-1]}, "rows": [\n  {lines}\n ]}}\n')


if __name__ == "__main__":
    main()
