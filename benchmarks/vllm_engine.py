"""What benchmarks/vllm_serving.py has done in processes of their own: vLLM's engine, transformers' word, one kernel.

Nothing heavy is imported before a process has set what must be set first. T tokens of a sequence, U = T - 1.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREPARATION = "vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv"
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1", "TRITON_CACHE_AUTOTUNING": "1",
}  # fmt: skip
_STEADY = 0.95  # of the most sequences that ran at once: from there on the engine is full
_WARM_UP = 4  # steps of a batch that are not counted


def answer(connection: Any, function: Any, arguments: tuple) -> None:
    """Call a function in this process and send ``("done", its result)`` or ``("failed", why)``."""
    try:
        connection.send(("done", function(*arguments)))
    except BaseException as error:  # whatever vLLM, Triton or CUDA raise is a result
        connection.send(("failed", _reason(error)))


def serve(connection: Any, settings: dict) -> None:
    """Start an engine, send its facts, and then do what is asked: ``(name of a method, arguments)`` until None.

    What vLLM prints goes into the file ``log`` of the settings.
    """
    with open(settings["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        engine = Engine(settings)
        connection.send(("done", engine.facts))
        while (asked := connection.recv()) is not None:
            name, arguments = asked
            connection.send(("done", getattr(engine, name)(*arguments)))
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", _reason(error)))


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys([*lines[:1], *lines[-2:]]))}"[:600]


def mend(how: str) -> str:
    """Have vLLM prefill heads of unlike sizes; return how: "plugin", "source" (the line of docs/vllm-fault.md), "no".

    To be called before vLLM is imported.
    """
    os.environ["KEYREDUCE_VLLM_PLUGIN"] = "1" if how == "plugin" else "0"
    if how == "plugin":
        points = importlib.metadata.entry_points(group="vllm.general_plugins")
        if any(point.value.startswith("keyreduce.") for point in points):
            return "plugin, loaded by vLLM"
        from keyreduce.serving import vllm_plugin

        vllm_plugin.register()
        return "plugin, called: keyreduce is not installed here"
    if how == "source":
        import vllm.third_party

        path = Path(vllm.third_party.__path__[0], *PREPARATION.split(".")[2:]).with_suffix(".py")
        sys.modules[PREPARATION] = load_mended(path.read_text())
        return "source"
    return "no"


def load_mended(source: str, name: str = PREPARATION) -> types.ModuleType:
    """Return vLLM's module with the mask of the values under a name of its own, loaded from a file of its own."""
    head, marker, rest = source.partition("V head + gating processing ====")
    branch, after, tail = rest.partition("\ndef ")
    if branch.count("mask_2d") != 3:
        raise ValueError("this vLLM is not one of 0.26 to 0.33: the mend does not fit")
    path = Path(tempfile.mkdtemp(), "mended.py")
    path.write_text(head + marker + branch.replace("mask_2d", "mask_v2d") + after + tail)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """vLLM's engine in this process, and its scheduler's log."""

    def __init__(self, settings: dict):
        began = time.perf_counter()
        os.environ.update(_ENVIRONMENT)
        if importlib.util.find_spec("flashinfer") is None:
            os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        mended = mend(settings["mend"])
        import torch
        import vllm

        capture = capture_sizes(settings["max_num_seqs"], settings.get("capture"))
        self.llm = vllm.LLM(
            model=settings["folder"], load_format=settings["load_format"], skip_tokenizer_init=True, dtype="bfloat16",
            seed=0, max_model_len=settings["max_model_len"], max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=settings["batched_tokens"], gpu_memory_utilization=0.05,
            kv_cache_memory_bytes=settings["pool_bytes"], mamba_ssm_cache_dtype=settings["state"],
            enable_prefix_caching=False, disable_log_stats=True,
            additional_config={"gdn_prefill_backend": settings["prefill"]},
            compilation_config={
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": capture,
            },
        )  # fmt: skip
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        pool = self.scheduler.kv_cache_config
        self.facts = {
            "vllm": vllm.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name(0),
            "mend": mended, "prefill_asked": settings["prefill"], "state": settings["state"],
            "blocks": pool.num_blocks, "page_bytes": pool.kv_cache_groups[0].kv_cache_spec.page_size_bytes,
            "max_num_seqs": settings["max_num_seqs"], "startup_s": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        self.vocabulary, self.draw = settings["vocabulary"], random.Random(0)
        self.log: list[tuple[float, int, int, int, int]] = []
        self.preempted = 0
        self._watch()

    def _watch(self) -> None:
        """Log of each step: when, how many sequences run and wait, how many tokens it has, how many of them are new."""
        scheduler, schedule, preempt = self.scheduler, self.scheduler.schedule, self.scheduler._preempt_request

        def scheduled(*args: Any, **settings: Any) -> Any:
            out = schedule(*args, **settings)
            asked, requests = out.num_scheduled_tokens, scheduler.requests
            new = sum(
                count == 1 or requests[name].num_computed_tokens >= requests[name].num_prompt_tokens
                for name, count in asked.items()
            )
            step = (len(scheduler.running), len(scheduler.waiting), out.total_num_scheduled_tokens, new)
            self.log.append((time.perf_counter(), *step))
            return out

        def preempted(*args: Any, **settings: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **settings)

        scheduler.schedule, scheduler._preempt_request = scheduled, preempted

    def _generate(self, count: int, prompt_tokens: int, new_tokens: int) -> float:
        """Generate, and return the seconds that it took."""
        from vllm import SamplingParams

        draws = range(prompt_tokens)
        prompts = [{"prompt_token_ids": [self.draw.randrange(self.vocabulary) for _ in draws]} for _ in range(count)]
        settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self.log.clear()
        began = time.perf_counter()
        results = self.llm.generate(prompts, settings, use_tqdm=False)
        took = time.perf_counter() - began
        assert sum(len(one.outputs[0].token_ids) for one in results) == count * new_tokens
        return took

    def full_load(self, count: int, prompt_tokens: int, new_tokens: int) -> dict:
        """Return tokens a second, over all and while sequences wait, and how many sequences ran at once."""
        self.preempted = 0
        took = self._generate(count, prompt_tokens, new_tokens)
        overall = {"seconds": took, "tokens_per_s": count * new_tokens / took}
        return overall | busy(self.log) | {"preempted": self.preempted}

    def decode(self, batch: int, prompt_tokens: int, steps: int) -> dict:
        """Return the milliseconds of a step in which each of ``batch`` sequences gets one token."""
        self._generate(batch, prompt_tokens, steps)
        times = decode_times(self.log, batch)[_WARM_UP:]
        return {"ms": statistics.median(times), "least_ms": min(times), "steps": len(times)} if times else {"ms": None}

    def first_token(self, prompt_tokens: int, repeats: int) -> dict:
        """Return the milliseconds from a prompt to its first new token, with nothing else to do."""
        times = [1e3 * self._generate(1, prompt_tokens, 1) for _ in range(repeats + 1)][1:]
        return {"ms": statistics.median(times), "least_ms": min(times), "prompt_tokens": prompt_tokens}

    def logprobs(self, prompts: list[list[int]], new_tokens: int) -> list[dict]:
        """Return of each prompt the greedy tokens after it, and the log-probability of every token but the first."""
        from vllm import SamplingParams

        settings = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
        )
        found = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        answers = []
        for prompt, result in zip(prompts, found, strict=True):
            new = list(result.outputs[0].token_ids)
            found_U = [*(result.prompt_logprobs or [None])[1:], *result.outputs[0].logprobs]
            pairs = zip(found_U, [*prompt, *new][1:], strict=True)
            answers.append({"prompt": prompt, "new": new, "logprobs_U": [one[token].logprob for one, token in pairs]})
        return answers


def capture_sizes(most: int, only: list[int] | None = None) -> list[int]:
    """Return the batches for which CUDA graphs are captured: those asked for, and the largest."""
    sizes = only or [*(1, 2, 4, 8, 16, 32, 64), *range(128, 1024, 128), *range(1024, 8193, 256)]
    return [size for size in sizes if size < most] + [most]


def busy(log: list[tuple[float, int, int, int, int]]) -> dict:
    """Return what a log says of the time in which all places are taken and others wait: a server at full load."""
    peak = max(running for _, running, *_ in log)
    full = [at for at, (_, running, waiting, *_) in enumerate(log) if running >= _STEADY * peak and waiting]
    found: dict[str, Any] = {"peak_running": peak, "busy_tokens_per_s": None, "busy_s": 0.0}
    if len(full) > 1:
        first, last = full[0], full[-1]
        seconds = log[last][0] - log[first][0]
        new = sum(step[4] for step in log[first:last])
        found |= {"busy_tokens_per_s": new / seconds, "busy_s": seconds}
    return found


def decode_times(log: list[tuple[float, int, int, int, int]], batch: int) -> list[float]:
    """Return the milliseconds of the steps in which each of ``batch`` sequences had one token."""
    return [
        1e3 * (after[0] - step[0]) for step, after in itertools.pairwise(log) if step[1] == step[3] == step[4] == batch
    ]


def reference(folder: str, served: list[dict], device: str) -> list[dict]:
    """Return what transformers gives each token but the first, in float32 and bfloat16, and its own first choice.

    Without fla, of which its Gated DeltaNet would take functions: engines are held against its own PyTorch code.
    """
    _hide("fla", "causal_conv1d")
    import torch
    from transformers import AutoModelForCausalLM

    def logits(dtype: torch.dtype) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        rows = [torch.tensor([[*one["prompt"], *one["new"]]], device=device) for one in served]
        return [model(tokens_1T).logits[0, :-1].float().log_softmax(-1).cpu() for tokens_1T in rows]

    found = []
    with torch.no_grad():
        for one, exact_UV, rough_UV in zip(served, logits(torch.float32), logits(torch.bfloat16), strict=True):
            tokens_U1 = torch.tensor([*one["prompt"], *one["new"]])[1:, None]
            taken = {name: row.gather(1, tokens_U1)[:, 0] for name, row in (("exact", exact_UV), ("rough", rough_UV))}
            found.append(
                {f"{name}_U": row.tolist() for name, row in taken.items()}
                | {"best_U": exact_UV.max(-1).values.tolist(), "choice_U": exact_UV.argmax(-1).tolist()}
            )
    return found


def _hide(*packages: str) -> None:
    """Have this process find no such packages."""
    find_spec = importlib.util.find_spec

    def hidden(name: str) -> bool:
        return name.split(".")[0] in packages

    class Hidden:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if hidden(name):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hidden())  # type: ignore[arg-type]
    importlib.util.find_spec = lambda name, *rest: None if hidden(name) else find_spec(name, *rest)


def time_preparation(sizes: list[tuple[int, int]], tokens: list[int], rounds: int) -> list[dict]:
    """Return microseconds of the preparation of a prefill: ours, vLLM's, and vLLM's mended, in turns.

    vLLM's own runs sizes whose next powers of two are alike.
    """
    os.environ["KEYREDUCE_VLLM_PLUGIN"] = "0"
    own = importlib.import_module(PREPARATION)
    mended = load_mended(Path(own.__file__).read_text(), "mended_preparation")
    pairs = [(pair, count) for pair in sizes for count in tokens]
    return [_timed(own.fused_post_conv_prep, mended.fused_post_conv_prep, *pair, T, rounds) for pair, T in pairs]


def _timed(own: Callable, mended: Callable, K: int, V: int, T: int, rounds: int) -> dict:
    import torch
    from triton.testing import do_bench

    from keyreduce.serving.vllm_plugin import needs_own_preparation
    from keyreduce.serving.vllm_preparation import prepare

    H, W = 16, 32
    mixed_TC = torch.randn(T, 2 * H * K + W * V, device="cuda").bfloat16()
    a_TW, b_TW = (torch.randn(T, W, device="cuda").bfloat16() for _ in range(2))
    given = (mixed_TC, a_TW, b_TW, torch.randn(W, device="cuda"), torch.randn(W, device="cuda"))
    ways: dict[str, Callable] = {
        "ours": lambda: prepare(*given, key_heads=H, head_k_dim=K, head_v_dim=V),
        "mended": lambda: mended(*given, H, K, V),
    }
    if not needs_own_preparation(K, V):
        ways["vllm"] = lambda: own(*given, H, K, V)
    off = [float((x.float() - y.float()).abs().max()) for x, y in zip(ways["ours"](), ways["mended"](), strict=True)]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(1e3 * do_bench(way, warmup=5, rep=50, return_mode="median"))
    found = {name: statistics.median(each) for name, each in times.items()}
    moved = 2 * 2 * mixed_TC.numel() + 2 * 2 * T * W + 2 * 4 * T * W  # vectors, both gates as they were, as they become
    return {
        "head_k_dim": K, "head_v_dim": V, "tokens": T, "us": found, "largest_difference": max(off),
        "ours_bytes_per_s": moved / found["ours"] * 1e6, "device": torch.cuda.get_device_name(0),
    }  # fmt: skip
