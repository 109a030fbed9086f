"""Whether vLLM serves pruned models right, and how fast: dense and cut in turns on one GPU.

    python benchmarks/vllm_serving.py --output DIR [--minutes 9.5] [--only right load ...] [--table]

It wants a GPU and vLLM, which may be unpacked on PYTHONPATH, and measures step by step, the most telling first. Each
result is written into the folder at once as a JSON file; what is there is not measured again, what failed is tried
again after all else, and no step begins that would end after ``--minutes``, so that the same command is given again
until nothing is left. At the end vllm_serving.json holds all of them, and tables are printed. Engines share the GPU,
each in a process of its own whose output is in the folder ``logs``; one that fails costs the others nothing.

- ``right``: a small Qwen3-Next with the heads of the real one (16 key, 32 value heads of 128 x 128), cut by keyreduce;
  log-probabilities and greedy tokens of prefill and decode, with CUDA graphs, against transformers in float32. Right
  means: the mean difference is under twice that of transformers in bfloat16.
- ``load``: 48 layers as Qwen3-Next with dummy weights and a pool of fixed size for states, keys and values: new tokens
  a second at full load at 512 tokens a sequence, sequences at once (as many as keyreduce's arithmetic admits), and the
  time to the first token of 2,048. Dense and cut engines work in turns.
- ``preparation``: the preparation of a prefill, by the plugin's kernel and by vLLM's, in microseconds.
- ``decode``: the time of one step for 64, 256 and 1,024 sequences of the same models, in turns.

64x128 runs with keyreduce's plugin, 64x128-mended with the line of vLLM's source mended instead (docs/vllm-fault.md).
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import vllm_engine
from vllm_capacity import qwen3_next
from vllm_report import DENSE, judged, put_together, table

from keyreduce.families import FAMILIES
from keyreduce.outputs import read_json, write_json
from keyreduce.serving.capacity import CacheLayout, vllm_pool

GIB = 2**30


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
KINDS = ("right", "load", "preparation", "decode")
PROMPTS = (1, 5, 63, 64, 65, 130, 200, 400)  # tokens; a chunk of a prefill has 64
SEQUENCE = (256, 256)  # prompt and new tokens at full load
FIRST_TOKEN = 2048
BATCHES = (64, 256, 1024)
DECODE_TOKENS = 256  # for which a pool has room; prompt and new tokens are fewer
BESIDE_POOL_GIB = 11  # weights, activations, CUDA graphs and context of a large engine, rounded up
# The mixers' heads are those of Qwen3-Next-80B, all else is small; only the last layer has experts, as vLLM wants one.
SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "mlp_only_layers": [0, 1, 2],
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "initializer_range": 0.05, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


Keep = Callable[[str, dict], None]
"""Writes the file of a result: its name, what was found."""


class Step(NamedTuple):
    """Results that are measured together, and about how many seconds that takes.

    ``measure`` is called with the names of those that are wanted, the time (``time.monotonic``) to stop at, and what
    writes them.
    """

    names: tuple[str, ...]
    measure: Callable[[list[str], float, Keep], None]
    seconds: float


class FailedStep(Exception):
    """What another process says of its end."""


def main() -> None:
    """Measure what is missing and there is time for; put all together."""
    asked, began, left = parser().parse_args(), time.monotonic(), []
    until = began + 60 * asked.minutes

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s: {text}", flush=True)

    def keep(name: str, found: dict) -> None:
        write_json(asked.output / f"{name}.json", found, overwrite=True)
        say(f"{name}: {json.dumps(found)[:500]}")

    for step, names in [] if asked.table else missing(asked.output, steps(asked)):
        started = time.monotonic()
        if started + step.seconds > until:
            left += names
            continue
        say(f"begins: {', '.join(names)}")
        try:
            step.measure(names, min(until, started + 1.7 * step.seconds), keep)
        except Exception as error:  # a step that fails must not cost the others
            traceback.print_exc()
            for name in (name for name in names if not (asked.output / f"{name}.json").exists()):
                keep(name, failure(error))
    everything = put_together(asked.output, KINDS)
    print(table(everything))
    if left:
        print(f"not measured yet, for want of time: {', '.join(left)}; give the command again")


def missing(folder: Path, planned: list[Step]) -> list[tuple[Step, list[str]]]:
    """Return what is to be measured: first what no file is there of, then what failed."""
    paths = {name: folder / f"{name}.json" for step in planned for name in step.names}
    failed = {name for name, path in paths.items() if path.exists() and "error" in read_json(path)}
    absent = {name for name, path in paths.items() if not path.exists()}
    chosen = [
        (step, [name for name in step.names if name in wanted]) for wanted in (absent, failed) for step in planned
    ]
    return [(step, names) for step, names in chosen if names]


def failure(error: Exception) -> dict:
    """Return what is written where nothing was found."""
    return {"error": str(error) if isinstance(error, FailedStep) else f"{type(error).__name__}: {error}"[:600]}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    found.add_argument("--output", type=Path, required=True, help="the folder of the results")
    found.add_argument("--minutes", type=float, default=9.5, help="begin no step that ends later")
    found.add_argument("--only", nargs="*", choices=KINDS, default=KINDS, metavar="KIND")
    found.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="KxV")
    found.add_argument("--prefill", choices=["auto", "triton"], default="triton", help="of the dense model")
    found.add_argument("--states", nargs="*", choices=STATES, default=STATES, metavar="DTYPE", help="of the state")
    found.add_argument("--at-once", type=int, default=7, help="engines of right that share the GPU")
    found.add_argument("--pool-gib", type=float, default=12, help="of each engine that shares the GPU, in load")
    found.add_argument("--decode-pool-gib", type=int, default=56, help="of an engine at most, in decode")
    found.add_argument("--memory-gib", type=float, default=76, help="of the GPU, which engines of decode share")
    found.add_argument("--rounds", type=int, default=3, help="of load, dense and cut in turns, if there is time")
    found.add_argument("--sequences", type=int, default=800, help="that are served in a round at least")
    found.add_argument("--table", action="store_true", help="measure nothing")
    return found


def steps(asked: argparse.Namespace) -> list[Step]:
    """Return all steps that are asked for, the most telling first."""
    found: dict[str, list[Step]] = {kind: [] for kind in KINDS}
    pairs = [(name, state) for state in asked.states for name in asked.variants]
    found["right"].append(Step(tuple(f"right-{name}-{state}" for name, state in pairs), partial(right, asked), 260))
    for group, state in itertools.product(GROUPS, asked.states):
        if chosen := [name for name in group if name in asked.variants]:
            file = f"load-{'-'.join(chosen)}-{state}"
            found["load"].append(Step((file,), partial(load, asked, chosen, state), 230))
    sizes = list(dict.fromkeys(VARIANTS[name][:2] for name in asked.variants))
    found["preparation"].append(Step(("preparation",), partial(preparation, sizes), 70))
    for state in asked.states:
        for names in shared(asked, [name for name in asked.variants if "mended" not in name], state):
            files = tuple(f"decode-{name}-{state}" for name in names)
            found["decode"].append(Step(files, partial(decode, asked), 75 + 25 * len(names)))
    # The first sizes in each dtype, and only then the others: no call may have time for all.
    firsts = found["load"][: len(asked.states)], found["decode"][: len(GROUPS[0]) + 1]
    order = [
        *found["right"], *firsts[0], *found["preparation"], *firsts[1], *found["load"][len(firsts[0]) :],
        *found["decode"][len(firsts[1]) :],
    ]  # fmt: skip
    return [step for step in order if step.names and step.names[0].split("-")[0] in asked.only]


def shared(asked: argparse.Namespace, names: list[str], state: str) -> list[list[str]]:
    """Return the engines of decode in groups that the GPU's memory has room for, in their order."""
    groups: list[list[str]] = []
    room = 0.0
    # Dense and the first sizes come first, as they do in load.
    for name in sorted(names, key=lambda name: name not in (DENSE, *GROUPS[0])):
        needed = decode_pool(asked, name, state) + BESIDE_POOL_GIB
        if needed > room:
            groups.append([])
            room = asked.memory_gib
        groups[-1].append(name)
        room -= needed
    return groups


def decode_pool(asked: argparse.Namespace, name: str, state: str) -> int:
    """Return the GiB that the largest batch needs, or as many as are allowed."""
    layout = CacheLayout.of(large_config(name))
    sizes = range(1, asked.decode_pool_gib)
    pools = ((size, vllm_pool(layout, size * GIB, DECODE_TOKENS, dtype=asked_dtype(state))) for size in sizes)
    return next((size for size, pool in pools if pool.sequences >= max(BATCHES)), asked.decode_pool_gib)


def asked_dtype(state: str) -> str | None:
    """Return what keyreduce's arithmetic is asked for where vLLM is given this dtype of the state."""
    return None if state == "auto" else state


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
        except (EOFError, ConnectionError):
            raise FailedStep("the process died") from None
        if how == "failed":
            raise FailedStep(found)
        return found

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have the engine do something, and return what it found."""
        # Where nobody listens any more, the result says so.
        with contextlib.suppress(OSError):
            self._connection.send((name, arguments))
        return self.result()

    def stop(self) -> None:
        """End the process, which gives the GPU's memory back."""
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Fleet:
    """Engines that share the GPU; one that fails is stopped, and the others go on.

    Attributes:
        errors: why an engine failed, by its name.
    """

    def __init__(self, until: float, settings: dict[str, dict]):
        self._engines = {name: Apart(until, vllm_engine.serve, each) for name, each in settings.items()}
        self.errors: dict[str, str] = {}

    def facts(self) -> dict[str, dict]:
        """Wait for all to start; return what each says of itself."""
        return self._each(lambda name, engine: engine.result(), list(self._engines))

    def ask(self, what: str, arguments: Mapping[str, tuple]) -> dict[str, Any]:
        """Have one engine after another do something with arguments of its own; return what they found."""
        return self._each(lambda name, engine: engine.ask(what, *arguments[name]), arguments)

    def _each(self, call: Callable[[str, Apart], Any], names: Iterable[str]) -> dict[str, Any]:
        found = {}
        for name, engine in [(name, self._engines[name]) for name in names if name in self._engines]:
            try:
                found[name] = call(name, engine)
            except FailedStep as error:
                self.errors[name] = str(error)
                self._engines.pop(name).stop()
        return found

    def close(self) -> None:
        """End all."""
        for engine in self._engines.values():
            engine.stop()


def preparation(sizes: list[tuple[int, int]], names: list[str], until: float, keep: Keep) -> None:
    """Time the kernel that prepares a prefill."""
    keep(names[0], {"rows": apart(until, vllm_engine.time_preparation, sizes, [512, 2048, 8192], 5)})


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


def right(asked: argparse.Namespace, names: list[str], until: float, keep: Keep) -> None:
    """Compare vLLM with transformers on small models, some at once."""
    chosen = [name.removeprefix("right-").rpartition("-")[::2] for name in names]
    folders: dict[str, Path] = {}

    def compared(name: str, state: str) -> None:
        try:
            found = compare(asked, name, folders[name], state, until)
        except Exception as error:
            found = failure(error)
        keep(f"right-{name}-{state}", found)

    for name, state in chosen:
        try:
            folders[name] = small_model(asked.output / "models", name)
        except Exception as error:
            keep(f"right-{name}-{state}", failure(error))
    with ThreadPoolExecutor(asked.at_once) as pool:
        list(pool.map(compared, *zip(*(pair for pair in chosen if pair[0] in folders), strict=True)))


def compare(asked: argparse.Namespace, name: str, folder: Path, state: str, until: float) -> dict:
    """Return how a small model's log-probabilities and tokens in vLLM compare with those in transformers."""
    draw = random.Random(0)
    prompts = [[draw.randrange(SMALL["vocab_size"]) for _ in range(count)] for count in PROMPTS]
    settings = engine_settings(asked, name, folder, SMALL["vocab_size"], state=state, pool_gib=1, sequences=8)
    settings |= {"load_format": "auto", "max_model_len": 512, "batched_tokens": 512}
    engine = Apart(until, vllm_engine.serve, settings | {"log": log_of(asked, f"right-{name}-{state}")})
    try:
        facts = engine.result()
        served = engine.ask("logprobs", prompts, 24)
    finally:
        engine.stop()
    return facts | judged(served, apart(until, vllm_engine.reference, str(folder), served, "cuda"))


def log_of(asked: argparse.Namespace, name: str) -> str:
    """Return the path of the file that has what an engine prints."""
    folder = asked.output / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{name}.txt")


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
        # The plugin chooses by itself; a pruned model without it needs the option.
        "prefill": "auto" if mend == "plugin" else asked.prefill if name == DENSE else "triton",
        "load_format": "dummy", "max_model_len": FIRST_TOKEN + 64, "batched_tokens": 8192,
    }  # fmt: skip


def large_settings(
    asked: argparse.Namespace, name: str, state: str, pool_gib: float, tokens: int, most: int | None = None
) -> dict:
    """Return what a large engine is started with: as many sequences as fit, by keyreduce's arithmetic."""
    config, folder = large_config(name), asked.output / "models" / f"large-{name}"
    write_json(folder / "config.json", config, overwrite=True)
    pool = vllm_pool(CacheLayout.of(config), int(pool_gib * GIB), tokens, dtype=asked_dtype(state))
    given = {"state": state, "pool_gib": pool_gib, "sequences": min(pool.sequences, most or pool.sequences)}
    return engine_settings(asked, name, folder, config["vocab_size"], **given)


def load(asked: argparse.Namespace, cuts: list[str], state: str, names: list[str], until: float, keep: Keep) -> None:
    """Serve many sequences with the dense and the cut engines in turns; keep what was measured before one failed."""
    settings = {
        name: large_settings(asked, name, state, asked.pool_gib, sum(SEQUENCE))
        | {"log": log_of(asked, f"{names[0]}-{name}")}
        for name in (DENSE, *cuts)
    }
    # As many as keep every engine full for most of a round.
    counts = {name: max(asked.sequences, 2 * each["max_num_seqs"]) for name, each in settings.items()}
    with contextlib.closing(Fleet(until, settings)) as engines:
        found = {name: facts | {"sequences": counts[name], "rounds": []} for name, facts in engines.facts().items()}
        engines.ask("full_load", dict.fromkeys(found, (64, 64, 8)))  # warm
        for name, one in engines.ask("first_token", dict.fromkeys(found, (FIRST_TOKEN, 5))).items():
            found[name]["first_token"] = one
        took = 0.0
        for _ in range(asked.rounds):
            began = time.monotonic()
            if began + took > until:
                break
            for name, one in engines.ask("full_load", {name: (counts[name], *SEQUENCE) for name in found}).items():
                found[name]["rounds"].append(one)
            took = time.monotonic() - began
    whole = {name: row for name, row in found.items() if row["rounds"]}
    keep(names[0], {"pool_gib": asked.pool_gib, "engines": whole} | error_of(engines.errors))


def decode(asked: argparse.Namespace, names: list[str], until: float, keep: Keep) -> None:
    """Time one step of decoding for batches of several sizes, with all the engines in memory."""
    chosen = {file: file.removeprefix("decode-").rpartition("-")[::2] for file in names}
    settings = {
        file: large_settings(asked, name, state, decode_pool(asked, name, state), DECODE_TOKENS, max(BATCHES))
        | {"log": log_of(asked, file), "capture": list(BATCHES)}
        for file, (name, state) in chosen.items()
    }
    with contextlib.closing(Fleet(until, settings)) as engines:
        found = {file: facts | {"batches": {}} for file, facts in engines.facts().items()}
        for batch in BATCHES:
            admitting = [file for file in found if batch <= settings[file]["max_num_seqs"]]
            for file, one in engines.ask("decode", dict.fromkeys(admitting, (batch, 128, 44))).items():
                found[file]["batches"][str(batch)] = one
    for file in names:
        keep(file, found.get(file, {}) | error_of({file: engines.errors[file]} if file in engines.errors else {}))


def error_of(errors: dict[str, str]) -> dict[str, str]:
    """Return what is written of engines that failed."""
    return {"error": "; ".join(f"{name}: {error}" for name, error in errors.items())} if errors else {}


if __name__ == "__main__":
    main()
