"""Whether vLLM serves pruned models right, and how fast: dense and cut in turns on one GPU.

    python benchmarks/vllm_serving.py --output DIR [--minutes 9.5] [--only right load ...] [--table]

It wants a GPU and vLLM, which may be unpacked on PYTHONPATH, and measures step by step. Each step writes a JSON file
into the folder; what is there is not measured again, and no step begins that would end after ``--minutes``, so that the
same command is given again until nothing is left. At the end vllm_serving.json holds all of them, and a table is
printed.

- ``preparation``: the preparation of a prefill, by the plugin's kernel and by vLLM's, in microseconds.
- ``right``: a small Qwen3-Next with the heads of the real one (16 key, 32 value heads of 128 x 128), cut by keyreduce;
  log-probabilities and greedy tokens of prefill and decode, with CUDA graphs, against transformers in float32. Right
  means: the mean difference is under twice that of transformers in bfloat16.
- ``load``: 48 layers as Qwen3-Next with dummy weights and a pool of fixed size for states, keys and values: new tokens
  a second at full load at 512 tokens a sequence, sequences at once (as many as keyreduce's arithmetic admits), and the
  time to the first token of 2,048. Dense and cut engines share the GPU and work in turns.
- ``decode``: the time of one step for 64, 256 and 1,024 sequences of the same models, one engine at a time.

64x128 runs with keyreduce's plugin, 64x128-mended with the line of vLLM's source mended instead (docs/vllm-fault.md).
"""

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import vllm_engine
from vllm_capacity import qwen3_next
from vllm_report import judged, put_together, table

from keyreduce.families import FAMILIES
from keyreduce.outputs import read_json, write_json
from keyreduce.serving.capacity import CacheLayout, vllm_pool

GIB = 2**30
DENSE = "128x128"


class Variant(NamedTuple):
    """Sizes of a head, and how vLLM is made to run them: as it is, with the plugin, or with its source mended."""

    key: int
    value: int
    mend: str = "no"


VARIANTS = {
    DENSE: Variant(128, 128), "96x128": Variant(96, 128), "80x104": Variant(80, 104), "72x128": Variant(72, 128),
    "64x64": Variant(64, 64), "64x128": Variant(64, 128, "plugin"), "64x128-mended": Variant(64, 128, "source"),
}  # fmt: skip
GROUPS = (
    ("80x104", "72x128"),
    ("96x128", "64x64"),
    ("64x128", "64x128-mended"),
)  # that share the GPU with the dense model
STATES = ("auto", "float32")  # auto is the model's dtype, bfloat16
KINDS = ("preparation", "right", "load", "decode")
PROMPTS = (1, 5, 63, 64, 65, 130, 200, 400)  # tokens; a chunk of a prefill has 64
SEQUENCE = (256, 256)  # prompt and new tokens at full load
FIRST_TOKEN = 2048
BATCHES = (64, 256, 1024)
# The mixers' heads are those of Qwen3-Next-80B, all else is small; only the last layer has experts, as vLLM wants one.
SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "mlp_only_layers": [0, 1, 2],
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "initializer_range": 0.05, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


class Step(NamedTuple):
    """What is measured, and about how many seconds that takes."""

    measure: Callable[[], dict]
    seconds: float


class FailedStep(Exception):
    """What another process says of its end."""


def main() -> None:
    """Measure what is missing and there is time for; put all together."""
    asked, began, left = parser().parse_args(), time.monotonic(), []
    asked.until = began + 60 * asked.minutes
    for name, step in {} if asked.table else steps(asked).items():
        path = asked.output / f"{name}.json"
        if path.exists() and "error" not in read_json(path):
            continue
        if time.monotonic() + step.seconds > asked.until:
            left.append(name)
            continue
        print(f"{time.monotonic() - began:5.0f} s: {name}", flush=True)
        started = time.monotonic()
        try:
            found = step.measure()
        except FailedStep as error:
            found = {"error": str(error)}
        found["step_s"] = round(time.monotonic() - started, 1)
        write_json(path, found, overwrite=True)
        print(json.dumps(found)[:500], flush=True)
    everything = put_together(asked.output, KINDS)
    print(table(everything, DENSE))
    if left:
        print(f"not measured yet, for want of time: {', '.join(left)}; give the command again")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    found.add_argument("--output", type=Path, required=True, help="the folder of the results")
    found.add_argument("--minutes", type=float, default=9.5, help="begin no step that ends later")
    found.add_argument("--only", nargs="*", choices=KINDS, default=KINDS, metavar="KIND")
    found.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="KxV")
    found.add_argument("--prefill", choices=["auto", "triton"], default="triton", help="of the dense model")
    found.add_argument("--states", nargs="*", choices=STATES, default=STATES, metavar="DTYPE", help="of the state")
    found.add_argument("--pool-gib", type=float, default=10, help="of each engine that shares the GPU, in load")
    found.add_argument("--decode-pool-gib", type=float, default=56, help="of the only engine, in decode")
    found.add_argument("--rounds", type=int, default=2, help="of load, dense and cut in turns")
    found.add_argument("--sequences", type=int, default=1200, help="that are served in a round")
    found.add_argument("--table", action="store_true", help="measure nothing")
    return found


def steps(asked: argparse.Namespace) -> dict[str, Step]:
    """Return all steps that are asked for, by the names of their files."""
    found: dict[str, Step] = {}
    if "preparation" in asked.only:
        found["preparation"] = Step(partial(preparation, asked), 90)
    if "right" in asked.only:
        for name, state in itertools.product(asked.variants, asked.states):
            found[f"right-{name}-{state}"] = Step(partial(right, asked, name, state), 170)
    if "load" in asked.only:
        for state, group in itertools.product(asked.states, GROUPS):
            if chosen := [name for name in group if name in asked.variants]:
                found[f"load-{'-'.join(chosen)}-{state}"] = Step(partial(load, asked, chosen, state), 520)
    if "decode" in asked.only:
        for state, name in itertools.product(asked.states, asked.variants):
            found[f"decode-{name}-{state}"] = Step(partial(decode, asked, name, state), 270)
    return found


def apart(until: float, function: Callable, *arguments: Any) -> Any:
    """Return what a function returns in a process of its own. Raises FailedStep if it fails, dies or takes longer."""
    process = Apart(until, vllm_engine.answer, function, arguments)
    try:
        return process.result()
    finally:
        process.stop()


class Apart:
    """A process that answers until a time (``time.monotonic``); see ``vllm_engine.serve`` and ``answer``."""

    def __init__(self, until: float, target: Callable, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._until = until

    def result(self) -> Any:
        """Wait for the next answer. Raises FailedStep where it is none."""
        try:
            if not self._connection.poll(max(0.0, self._until - time.monotonic())):
                raise FailedStep("no answer in time")
            how, found = self._connection.recv()
        except EOFError:
            raise FailedStep("the process died") from None
        if how == "failed":
            raise FailedStep(found)
        return found

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have the engine do something, and return what it found."""
        self._connection.send((name, arguments))
        return self.result()

    def stop(self) -> None:
        """End the process, which gives the GPU's memory back."""
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def preparation(asked: argparse.Namespace) -> dict:
    """Time the kernel that prepares a prefill."""
    sizes = list(dict.fromkeys(VARIANTS[name][:2] for name in asked.variants))
    return {"rows": apart(asked.until, vllm_engine.time_preparation, sizes, [512, 2048, 8192], 5)}


def small_model(folder: Path, name: str, **changes: Any) -> Path:
    """Return the folder of a small model of a variant; it is made where it is not there, the cut ones by keyreduce."""
    target = folder / name.removesuffix("-mended")
    if target.exists():
        return target
    variant = VARIANTS[name]
    if name == DENSE:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3_next", **SMALL | changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(target)
        return target
    from keyreduce.api import prune

    dense = small_model(folder, DENSE, **changes)
    keeps = {part: size for part, size in zip(("key", "value"), variant[:2], strict=True) if size != 128}
    prune.run(
        prune.PruneRequest(
            model=str(dense), target=tuple(keeps), keep=tuple(map(str, keeps.values())), method="l1",
            uncorrected=True, output=target,
        )
    )  # fmt: skip
    return target


def right(asked: argparse.Namespace, name: str, state: str) -> dict:
    """Compare vLLM with transformers on a small model."""
    folder = small_model(asked.output / "models", name)
    draw = random.Random(0)
    prompts = [[draw.randrange(SMALL["vocab_size"]) for _ in range(count)] for count in PROMPTS]
    settings = engine_settings(asked, name, folder, SMALL["vocab_size"], state=state, pool_gib=1, sequences=8)
    engine = Apart(
        asked.until, vllm_engine.serve, settings | {"load_format": "auto", "max_model_len": 512, "batched_tokens": 512}
    )
    try:
        facts = engine.result()
        served = engine.ask("logprobs", prompts, 24)
    finally:
        engine.stop()
    return facts | judged(served, apart(asked.until, vllm_engine.reference, str(folder), served, "cuda"))


def large_config(name: str) -> dict:
    """Return the config of 48 layers as Qwen3-Next, of a variant's sizes; as wide as the experts that a token uses."""
    dense = qwen3_next(128, 128) | {"intermediate_size": 5632, "mlp_only_layers": list(range(47))}
    family = FAMILIES["qwen3_next"]
    after = {
        layer: sizes._replace(head_k_dim=VARIANTS[name].key, head_v_dim=VARIANTS[name].value)
        for layer, sizes in family.layer_sizes(dense).items()
    }
    return dense if name == DENSE else family.resized(dense, after)


def engine_settings(
    asked: argparse.Namespace, name: str, folder: Path, vocabulary: int, *, state: str, pool_gib: float, sequences: int
) -> dict:
    """Return what an engine of a variant is started with."""
    mend = VARIANTS[name].mend
    return {
        "folder": str(folder), "mend": mend, "state": state, "pool_bytes": int(pool_gib * GIB),
        "max_num_seqs": sequences, "vocabulary": vocabulary,
        # The plugin chooses by itself; a cut model without it must be told.
        "prefill": "auto" if mend == "plugin" else asked.prefill if name == DENSE else "triton",
        "load_format": "dummy", "max_model_len": FIRST_TOKEN + 64, "batched_tokens": 8192,
    }  # fmt: skip


def large_settings(
    asked: argparse.Namespace, name: str, state: str, pool_gib: float, tokens: int, most: int | None = None
) -> dict:
    """Return what a large engine is started with: as many sequences as fit, by keyreduce's arithmetic."""
    config, folder = large_config(name), asked.output / "models" / f"large-{name}"
    write_json(folder / "config.json", config, overwrite=True)
    dtype = None if state == "auto" else state
    pool = vllm_pool(CacheLayout.of(config), int(pool_gib * GIB), tokens, dtype=dtype)
    given = {"state": state, "pool_gib": pool_gib, "sequences": min(pool.sequences, most or pool.sequences)}
    return engine_settings(asked, name, folder, config["vocab_size"], **given)


def load(asked: argparse.Namespace, cuts: list[str], state: str) -> dict:
    """Serve many sequences with the dense and the cut engines in turns; keep what was measured before one failed."""
    engines: dict[str, Apart] = {}
    found: dict[str, Any] = {}
    failure: dict[str, str] = {}
    try:
        for name in (DENSE, *cuts):
            settings = large_settings(asked, name, state, asked.pool_gib, sum(SEQUENCE))
            engines[name] = Apart(asked.until, vllm_engine.serve, settings)
        for name, engine in engines.items():
            found[name] = engine.result() | {"rounds": []}
        for name, engine in engines.items():
            engine.ask("full_load", 64, 64, 8)  # warm
            found[name]["first_token"] = engine.ask("first_token", FIRST_TOKEN, 5)
        for _ in range(asked.rounds):
            for name, engine in engines.items():
                found[name]["rounds"].append(engine.ask("full_load", asked.sequences, *SEQUENCE))
    except FailedStep as error:
        failure = {"error": str(error)}
    finally:
        for engine in engines.values():
            engine.stop()
    whole = {name: row for name, row in found.items() if row["rounds"]}
    return {"pool_gib": asked.pool_gib, "sequences": asked.sequences, "engines": whole, **failure}


def decode(asked: argparse.Namespace, name: str, state: str) -> dict:
    """Time one step of decoding for batches of several sizes."""
    engine = Apart(
        asked.until, vllm_engine.serve, large_settings(asked, name, state, asked.decode_pool_gib, 256, max(BATCHES))
    )
    try:
        found = engine.result() | {"batches": {}}
        for batch in (batch for batch in BATCHES if batch <= found["max_num_seqs"]):
            found["batches"][str(batch)] = engine.ask("decode", batch, 128, 44)
    finally:
        engine.stop()
    return found


if __name__ == "__main__":
    main()
