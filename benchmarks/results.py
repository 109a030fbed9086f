"""Make docs/results.md, and its pictures in docs/pictures, from the JSON that is committed in this folder.

    python benchmarks/results.py             # what `make results` does
    python benchmarks/results.py --check     # whether page and pictures are what would be made
    python benchmarks/results.py --keep FOLDER ... --output benchmarks/quality/NAME.json

A file's keys say of what kind it is; one of no known kind is an error, so that nothing is left out silently. Nothing is
measured, and no model is loaded. With --keep the results of sweeps (`keyreduce sweep`) become such a file: of what two
of them have, the one with more seeds counts.
"""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diagnosis_tables
import result_tables as tables
from recovery_tables import recovery_tables
from scale_picture import draw_by_bytes, draw_by_size
from scale_tables import scale_tables
from state_picture import Known, draw_state
from sweep_results import keep
from vllm_report import serving_tables

from keyreduce.benchmarking.plot import draw_report
from keyreduce.drawing import save_picture

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PICTURES = DOCS / "pictures"
PICTURED = "delta-net-21m"  # the model of state.png
CONFIGS = HERE.parent / "configs" / "benchmark"
_SHIPPED = HERE.parent / "keyreduce/models/shipped"
_NAMES = {"delta-net": "DeltaNet", "gated-deltanet": "Gated DeltaNet"}
# How benchmarks/decode's files call a rule -> how the command does.
_CASES = {"ungated, the kernel alone": "kernel", "gated, as fla's GatedDeltaNet calls it": "gated-delta-net"}


class Source(NamedTuple):
    """A file of results."""

    path: Path
    content: Any

    @property
    def name(self) -> str:
        """What commands and the page call it."""
        return self.path.relative_to(HERE.parent).as_posix()


class Picture(NamedTuple):
    """A picture of the page: the name of its file, what draws it, and the files that it is drawn from."""

    name: str
    draw: Callable[[], Any]
    sources: Sequence[Source]

    @property
    def made_from(self) -> str:
        """What the PNG says of where it is from; another one when the results are others."""
        digest = hashlib.sha256(json.dumps([one.content for one in self.sources], sort_keys=True).encode())
        return f"{', '.join(one.name for one in self.sources)} sha256 {digest.hexdigest()}"


# Kind -> the keys that only its files have; those of a kind are sorted by their paths.
KINDS = {
    "grid": {"model", "cuts", "dense_perplexity"},
    "study": {"model", "runs", "first_rows"},
    "scale": {"model", "config", "training", "left_out"},
    "precision": {"states", "seq_len", "parameters"},
    "benchmark": {"settings", "ceilings", "models"},
    "decode": {"search", "copy_bytes_per_second"},
    "formats": {"comparison", "copy_bytes_per_second"},
    "backend": {"setting", "forward_backward_milliseconds"},
    "backend_cuda": {"setting", "results"},
    "speed": {"ways", "gather", "least_squares"},
    "recoveries": {"recoveries", "dense", "model"},
    "diagnosis": {"variants", "few_rows", "sums"},
    "kernels": {"rows", "triton"},
    "capacity": {"configs", "settings", "made_up_gpu"},
    "serving": {"preparation", "right-128x128-auto"},
    "sweep": {"rows", "dense", "record"},
}


def read_sources(folder: Path = HERE) -> dict[str, list[Source]]:
    """Return the files of each kind; ValueError names one of no kind, or of two."""
    found: dict[str, list[Source]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        keys = set(content) if isinstance(content, Mapping) else set()
        kinds = [kind for kind, needed in KINDS.items() if needed <= keys]
        if len(kinds) != 1:
            raise ValueError(f"{path} is of no known kind of result; add it to KINDS of {Path(__file__).name}")
        found[kinds[0]].append(Source(path, content))
    # The parts of a report that h100.py put together are in it.
    whole = {one.path.with_suffix("") for one in found["benchmark"]}
    found["benchmark"] = [one for one in found["benchmark"] if one.path.parent not in whole]
    return found


def make_page(sources: Mapping[str, list[Source]]) -> tuple[str, list[Picture]]:
    """Return the page as Markdown, and its pictures."""
    pictures: list[Picture] = []
    parts = [
        "# Results",
        "Made by `make results` from the JSON in `benchmarks/`: change a script or measure again, not this page. What "
        "each table needs is in the command above it; `PATH` and `FILE` stand for a model and text of your own.",
    ]
    for write in (
        _scale,
        _state,
        _grids,
        _studies,
        _precision,
        _sweeps,
        _recoveries,
        _diagnoses,
        _speed,
        _benchmarks,
        _decode,
        _formats,
        _backend,
        _kernels,
        _capacity,
        _serving,
    ):
        parts += write(sources, pictures)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n", pictures


def _scale(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    measured = [one for one in sources["scale"] if one.content.get("runs")]
    if not measured:
        return
    found = [one.content for one in sources["scale"]]
    first = found[0]
    yield "## Quality by the size of the model"
    folder = measured[0].path.parent.relative_to(HERE.parent).as_posix()
    yield _command(
        f"benchmarks/scale_study.py --minutes {first['minutes']:g}{_words(first['options'])} --output {folder}"
    )
    yield (
        f"{first['gpus']} x {first['training']['device']}, torch {first['torch']}. Models that the study trains, on "
        "text of the packages that are installed on the machine; sizes that the search for a budget chooses."
    )
    yield from (one["remark"] for one in found if "remark" in one)
    yield from _text(scale_tables(found))
    if len({one.content["training"]["parameters"] for one in measured}) > 1:
        pictures.append(Picture("scale-size.png", partial(draw_by_size, [one.content for one in measured]), measured))
        yield "![Perplexity over dense against the number of parameters](pictures/scale-size.png)"
    most = max(one.content["training"]["parameters"] for one in measured)
    largest = [one for one in measured if one.content["training"]["parameters"] > 0.9 * most]
    contents = [one.content for one in largest]
    pictures.append(Picture("scale-bytes.png", partial(draw_by_bytes, contents), largest))
    yield "![Perplexity over dense against the bytes of the state of the largest models](pictures/scale-bytes.png)"


def _words(options: Mapping) -> str:
    """Return options as they are given on a command line."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return "".join(f" --{name.replace('_', '-')} {' '.join(map(str, values))}" for name, values in lists.items())


def _state(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    used = [one for kind in ("precision", "grid", "study") for one in sources[kind] if one.content["model"] == PICTURED]
    by_kind = {kind: [one.content for one in sources[kind] if one in used] for kind in ("precision", "grid", "study")}
    if not by_kind["precision"]:
        return
    known = Known(PICTURED, by_kind["precision"][0], by_kind["grid"], by_kind["study"])
    pictures.append(Picture("state.png", partial(draw_state, known), used))
    yield "## Bytes of state against perplexity"
    yield f"![Perplexity over dense against the bytes of the state, {PICTURED}](pictures/state.png)"
    left_out = [one["dtype"] for one in known.precision["states"] if one["perplexity_increase"] > 0.6]
    beyond = f" Beyond the picture: {', '.join(f'`{name}`' for name in left_out)}." if left_out else ""
    yield (
        f"One model of {known.precision['parameters'] / 1e6:.1f}M parameters, in float32; the tables below have "
        f"the figures, devices and commands.{beyond}"
    )


def _grids(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if sources["grid"]:
        yield "## What each size costs, and how well that is predicted"
    for source in sources["grid"]:
        found = source.content
        yield f"### {_titled(found['model'], sources)}: sizes of a head"
        more = f"--num-batches {found['calibration_tokens'] // (8 * 512)} --rows {found['predictions'] // 1023}"
        more += " --recover least-squares" if "least-squares" in found["cuts"][0] else ""
        yield _command(f"benchmarks/state_budget.py --output {source.name} {_model(found['model'])} {more}")
        yield f"{found['device']}, {found['processor']}, torch {found['torch']}, float32.{_side_by_side(found)}"
        yield from _text(tables.grid_table(found))


def _studies(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if sources["study"]:
        yield "## Budgets: sizes, repairs and formats together"
    for source in sources["study"]:
        found = source.content
        every = found.get("every", 1)
        yield f"### {_titled(found['model'], sources)}: budgets" + (f", every {every}th row" if every > 1 else "")
        runs = found["runs"]
        asked = {name: dict.fromkeys(str(run[key]) for run in runs) for name, key in _ASKED.items()}
        asked["--state-dtypes"].pop("float32", None)
        more = [f"{name} {' '.join(values)}" for name, values in asked.items() if values]
        more.append(f"--heldout-rows {found['heldout_rows']} --num-batches {found['calibration_tokens'] // (8 * 512)}")
        more += [
            f"--{name.replace('_', '-')} {found[name]}"
            for name in ("every", "first_rows")
            if (found.get(name) or 1) != 1
        ]
        yield _command(
            f"benchmarks/budget_study.py --output {source.name} --work FOLDER {_model(found['model'])} {' '.join(more)}"
        )
        made = f"{found['device']}, {found['processor']}, torch {found['torch']}, Python {found['python']}, float32."
        yield made + _side_by_side(found)
        yield from _text(tables.study_table(found))


_ASKED = {"--cuts": "cut", "--repairs": "repair", "--state-dtypes": "state_dtype", "--seeds": "seed"}


def _precision(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if sources["precision"]:
        yield "## Formats of the state"
        yield "Each is one command; all are made by"
        yield _command("benchmarks/state_precision.py --model PATH --heldout FILE")
        yield "on a CPU in float32, the state rounded after every token, or after each chunk where the command has one."
    for source in sources["precision"]:
        yield f"### {_titled(source.content['model'], sources)}: {source.path.stem}"
        yield from _text(tables.precision_table(source.content))


def _sweeps(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    for source in sources["sweep"]:
        found = source.content
        record, name = found["record"], f"{source.path.stem}.png"
        yield f"## Sweep: {source.path.stem}"
        yield _command("".join(f"{command}\n" for command in record["commands"]).strip(), program="")
        sizes = ", ".join(_titled(model, sources) for model in found["dense"])
        yield f"{sizes}; {record['device']}, {record['dtype']}; {record['words']}. Perplexity over dense."
        for target in dict.fromkeys(row["target"] for row in found["rows"]):
            yield from _text(tables.methods_table(found, target))
        if found["failed"]:
            yield "Failed: " + "; ".join(f"{title}: {why}" for title, why in found["failed"].items()) + "."
        pictures.append(Picture(name, partial(_draw_sweep, found), [source]))
        yield f"![Perplexity against the share removed, {source.path.stem}](pictures/{name})"


def _draw_sweep(found: Mapping) -> Any:
    from keyreduce.sweep.plots import draw_perplexity
    from keyreduce.sweep.results import Results

    return draw_perplexity(Results.of_json(found, found["record"]))


def _benchmarks(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    for number, source in enumerate(sources["benchmark"]):
        found, name = source.content, f"{source.path.parent.name}-{source.path.stem}"
        first = next(iter(found["settings"].values()))
        if not number:
            yield "## Time and memory on a GPU"
            yield _command("benchmarks/h100.py")
            yield "What has fewer columns was made with `--only`, `--config` and `--key-sizes`."
        title = benchmark_title(source.path.stem)
        yield f"### {title}"
        versions = ", ".join(f"{library} {version}" for library, version in first["versions"].items())
        yield f"{first['device']}, {first['dtype']}; {versions}. Medians of rounds in turns, with 95% intervals."
        yield "Whole sequences; beside the time the speed, as a multiple of the first column's."
        yield from _text(tables.sequences_table(found))
        yield "A decoding step as a CUDA graph; beside it the time over the bound, of weights and states moved once."
        yield from _text(tables.decode_table(found))
        if "largest_batch" in found:
            yield "The largest batch that fits beside the model, launched by Python; in brackets against the first."
            yield from _text(tables.largest_table(found))
        pictures.append(Picture(f"{name}.png", partial(draw_report, found | {"settings": first}, title), [source]))
        yield f"![{title}: time and memory](pictures/{name}.png)"


def benchmark_title(config: str) -> str:
    """Return what page and pictures call the random models of a config of configs/benchmark."""
    sizes = json.loads((CONFIGS / f"{config}-2048.json").read_text())
    layers, heads = sizes["num_hidden_layers"], sizes["num_heads"]
    return f"{_NAMES[config]} of {layers} layers, hidden size {sizes['hidden_size']}, {heads} heads, random weights"


def _decode(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if sources["decode"]:
        yield "## keyreduce's decode kernel"
        yield (
            "The delta-rule operator alone, 16 heads, bfloat16 inputs, as nodes of a CUDA graph, in turns with a copy "
            "of as many bytes and with fla's kernel, whose state is float32. The best tiling of a search."
        )
    for source in sources["decode"]:
        found = source.content
        parts = [row["size"].rsplit(", ", 3) for row in found["search"]]
        cases, keys, values, dtypes = (list(dict.fromkeys(column)) for column in zip(*parts, strict=True))
        numbers = [" ".join(one.partition("=")[2] for one in channels) for channels in (keys, values)]
        yield _command(
            f"flash-linear-attention/decode_benchmark.py --search --batches --cases "
            f"{' '.join(_CASES[case] for case in cases)} --state-dtype {' '.join(dtypes)} --key-channels {numbers[0]} "
            f"--value-channels {numbers[1]} --output {source.name}"
        )
        copy = f"a large copy moves {found['copy_bytes_per_second'] / 1e12:.2f} TB/s"
        yield f"{found['device']}, torch {found['torch']}, triton {found['triton']}; {copy}."
        yield from _text(tables.search_table(found["search"]))


def _formats(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    for source in sources["formats"]:
        found = source.content
        rows = found["comparison"]
        asked = {name: " ".join(dict.fromkeys(str(row[key]) for row in rows)) for name, key in _COMPARED.items()}
        cases = " ".join(dict.fromkeys(_CASES[row["case"]] for row in rows))
        yield "### Formats and sizes"
        words = " ".join(f"{name} {values}" for name, values in asked.items())
        yield _command(f"flash-linear-attention/decode_benchmark.py --cases {cases} {words} --output {source.name}")
        copy = f"a large copy moves {found['copy_bytes_per_second'] / 1e12:.2f} TB/s"
        yield f"{found['device']}, torch {found['torch']}, triton {found['triton']}; {copy}. No search for a tiling."
        yield from _text(tables.formats_table(rows))


_COMPARED = {"--state-dtype": "state_dtype", "--key-channels": "K", "--value-channels": "V", "--batches": "B"}


def _backend(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if sources["backend"] or sources["backend_cuda"]:
        yield "## The PyTorch backend"
    for source in sources["backend"]:
        setting = source.content["setting"]
        yield _command(f"flash-linear-attention/benchmark.py --rounds {setting['rounds']} --output {source.name}")
        yield (
            f"CPU, {setting['threads']} threads, torch {setting['torch']}, {setting['dtype']}; {setting['tokens']:,} "
            f"tokens, {setting['heads']} heads of {setting['key']} x {setting['value']}. A ratio is how many times as "
            "long as ours another function takes; for the floor, a matrix product of as many operations, how many "
            "times as long ours takes."
        )
        yield from _text(tables.backend_table(source.content))
    for source in sources["backend_cuda"]:
        setting = source.content["setting"]
        yield _command(
            f"flash-linear-attention/cuda_benchmark.py --rounds {setting['rounds']} --variants {setting['variants']} "
            f"--output {source.name}"
        )
        yield (
            f"{setting['device']}, torch {setting['torch']}, {setting['dtype']}; {setting['batch']} sequences of "
            f"{setting['tokens']:,} tokens, {setting['heads']} heads. Launches are included, and fla's kernels tuned "
            f"among {setting['variants']} variants of each."
        )
        yield from _text(tables.backend_cuda_table(source.content))


def _speed(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    for source in sources["speed"]:
        found = source.content
        setting, sizes = found["settings"], found["sizes"]
        yield "## Time of reconstruct"
        yield _command(f"benchmarks/recover_speed.py --config configs/scale/{found['config']} --output {source.name}")
        yield (
            f"{found['device']}, torch {found['torch']}; {found['config'].removesuffix('.json')} with random weights, "
            f"{found['layers']} layers, cut to {sizes['head_k_dim']} x {sizes['head_v_dim']}; "
            f"{setting['num_batches']} batches of {setting['batch_size']} x {setting['seq_len']} tokens. The last "
            "column is 512 steps a layer with all else that the recovery does, added up from its parts, without what "
            "the first layer takes besides (Triton compiles). `recorded` is as a CUDA graph, `mixed` PyTorch's kernels "
            "in mixed precision, `fla` fla's kernels likewise. `recover` takes `fla-recorded` on a GPU for 8,192 "
            "steps or more in all layers, else `mixed-recorded`."
        )
        yield from _text(tables.speed_table(found))


def _recoveries(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if sources["recoveries"]:
        yield "## Training after a repair"
    for source in sources["recoveries"]:
        found, asked = source.content, {"--methods": "method", "--ratios": "ratio", "--repairs": "repair"}
        asked |= {"--kinds": "kind", "--tokens": "tokens"}
        runs = found["recoveries"]
        given = {name: dict.fromkeys(run[key] for run in runs if run[key]) for name, key in asked.items()}
        given |= {"--sizes-for": [found["sizes_for"]]} if found["sizes_for"] else {}
        given |= {"--recall": ()} if found["dense"]["recall"] else {}
        words = " ".join(" ".join([name, *map(str, values)]) for name, values in given.items())
        yield f"### {_titled(found['model'], sources)}: training"
        yield _command(
            f"benchmarks/recovery_study.py --output FOLDER --summary {source.name} {_model(found['model'])} {words} "
            f"--heldout-rows {found['heldout_rows']} --num-batches {found['calibration_tokens'] // (8 * 512)}"
        )
        made = f"{found['device']}, torch {found['torch']}; {found['heldout_rows']} held-out rows of 1,024 tokens."
        yield made + _side_by_side(found)
        if "remark" in found:
            yield found["remark"]
        if "from_scratch" in found:
            yield _from_scratch(found["from_scratch"], found["dense"])
        yield from _text(recovery_tables(found))


def _from_scratch(one: Mapping, dense: Mapping) -> str:
    """Return what a model is like that has the sizes of a cut from the beginning."""
    config = ", ".join(f"{name} {value}" for name, value in one["config"].items())
    recall = ", ".join(f"{100 * right:.1f}% in {kind}" for kind, right in one["recall"].items())
    return (
        f"The same config with {config}, which is {one['parameters'] / 1e6:.1f}M parameters, trained likewise from "
        f"scratch on {one['tokens_seen'] / 1e6:.1f}M tokens in {one['seconds'] / 60:.1f} minutes, has a perplexity of "
        f"{one['perplexity']:.4f} ({100 * (one['perplexity'] / dense['perplexity'] - 1):+.2f}%), and {recall}."
    )


def _diagnoses(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if sources["diagnosis"]:
        yield "## What least squares leaves of the damage"
    for source in sources["diagnosis"]:
        found = source.content
        sizes, few = found["sizes"], found["few_rows"]
        spread = found.get("spread", 1)
        title = f"{found['model']} ({found['parameters'] / 1e6:.1f}M parameters): least squares, layer by layer"
        yield f"### {title}{', rows side by side' if spread == 1 else ''}"
        _, *asked = found["variants"]  # the first is least squares, which is always made
        amount = f"--num-batches {found['calibration_tokens'] // (8 * 512)} --heldout-rows"
        amount += f" {found['heldout_tokens'] // 1024} --spread {spread}"
        amount += f" --layer-rows {found['layer_rows']}" if found.get("layer_rows", 16) != 16 else ""
        amount += f" --only {shlex.join(asked)}"
        yield _command(f"benchmarks/repair_diagnosis.py --output {source.name} {_model(found['model'])} {amount}")
        if "remark" in found:
            yield found["remark"]
        yield (
            f"{found['device']}; cut to {sizes['head_k_dim']} x {sizes['head_v_dim']}. Perplexity over dense; recall "
            "is the loss over dense, in nats, on random tokens that repeat. Removed: of what the mixers' outputs miss "
            "of the dense ones, in squares, the share that the refit gives back, as the mean of the layers; in sample "
            "on the calibration text, out of sample on held-out text. `VARIANTS` in the script says what each is."
        )
        yield from _text(diagnosis_tables.variants_table(found))
        cut, repaired = (diagnosis_tables.rise(few[name], few["dense"]) for name in ("pruned", "repaired"))
        yield (
            f"Layers, on the first rows of the held-out text: there the whole cut costs {cut}, and {repaired} after "
            "least squares. Alone: only this layer is cut, against the dense model. Spared: all layers but this one "
            "are cut, against all. Undone: all layers but this one are refitted, against all. Missing: the share of "
            "the dense mixer's output that the cut one misses, in squares. Condition is the condition number of the "
            "Gram matrix of the regression; strength that of the penalty, in multiples of the inputs' mean square."
        )
        yield from _text(diagnosis_tables.layers_table(found))
        yield (
            "The error of the hidden states behind each block, in squares, over the dense ones: of the model with all "
            "layers cut; the sum over models with one layer cut; and of the sum of the errors of these. If errors "
            "neither add up nor cancel, all three are alike."
        )
        yield from _text(diagnosis_tables.sums_table(found))


def _kernels(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    if not sources["kernels"]:
        return
    yield "## Which sizes engines' kernels compile for"
    yield "Compiled for the GPU without running; no model."
    commands = []
    for source in sources["kernels"]:
        engine = next(name for name in tables.ENGINES if name in source.content)
        commands.append(f"python benchmarks/engine_kernels.py {engine} --output {source.name}")
    yield _command("\n".join(commands), program="")
    yield from _text(tables.kernels_table(one.content for one in sources["kernels"]))


def _capacity(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    for source in sources["capacity"]:
        found = source.content
        yield "## How many sequences vLLM takes"
        yield _command(f"benchmarks/vllm_capacity.py --output {source.name}")
        yield (
            f"vLLM {found['vllm']}'s own cache manager, on a machine without a GPU that is taken for one with an "
            f"{found['made_up_gpu']}; configs with the mixers and attention of the large models, no weights. One GPU, "
            "no prefix caching; the file has two GPUs and prefix caching too."
        )
        yield from _text(tables.capacity_table(found))


def _serving(sources: Mapping[str, list[Source]], pictures: list[Picture]) -> Iterator[str]:
    for source in sources["serving"]:
        yield "## Pruned models served by vLLM"
        yield _command("benchmarks/vllm_serving.py --output FOLDER --memory-gib 136")
        yield "Given again until nothing is left; it writes `FOLDER/vllm_serving.json`."
        for title, lines in serving_tables(source.content):
            yield f"### {title}"
            yield from _text(iter(lines))


def _side_by_side(found: Mapping) -> str:
    """Return what to know of recoveries that took rows side by side, as all did before ``spread`` was written."""
    runs = [run for name in ("runs", "recoveries") for run in found.get(name, ())]
    if "spread" in found or (
        runs and all("spread" in run for run in runs if run["repair"] not in tables.UNREPAIRED and not run.get("kind"))
    ):
        return ""
    return (
        " Recoveries took rows of text side by side then, of few documents; now these are spread, which changes what "
        "is left ([recover](recover.md#layer-by-layer))."
    )


def _text(lines: Iterator[str]) -> Iterator[str]:
    yield "\n".join(lines)


def _command(words: str, program: str = "python ") -> str:
    lines = "\n".join(f"    {program}{' '.join(line.split())}" for line in words.splitlines())
    return lines


def _model(name: str) -> str:
    """Return the arguments that name a model; one that does not ship comes with its text."""
    return f"--model {name}" if (_SHIPPED / name).is_dir() else "--model PATH --calibration FILE --heldout FILE"


def _titled(model: str, sources: Mapping[str, list[Source]]) -> str:
    """Return a model's name with its size, which files of state precision know."""
    sizes = {one.content["model"]: one.content["parameters"] for one in sources["precision"]}
    return f"{model} ({sizes[model] / 1e6:.1f}M parameters)" if model in sizes else model


def draw(pictures: Sequence[Picture]) -> None:
    """Draw the pictures whose results have changed, and remove those that the page has no more."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        target = PICTURES / picture.name
        save_picture(picture.draw(), target, made_from=picture.made_from)
    for path in PICTURES.glob("*.png"):
        if path.name not in {picture.name for picture in pictures}:
            path.unlink()


def made_from(path: Path) -> str:
    """Return what a PNG of this script says of where it is from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Description", "")


def stale(page: str, pictures: Sequence[Picture]) -> list[str]:
    """Return what is not as it would be made."""
    target = DOCS / "results.md"
    found = [] if target.is_file() and target.read_text(encoding="utf-8") == page else [target.name]
    there = {path.name: path for path in PICTURES.glob("*.png")}
    for picture in pictures:
        path = there.pop(picture.name, None)
        if path is None or made_from(path) != picture.made_from:
            found.append(picture.name)
    return [*found, *there]


def main() -> None:
    """Make the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; exit code 1 if something is out of date.")
    parser.add_argument("--keep", type=Path, nargs="+", metavar="FOLDER", help="Folders of sweeps.")
    parser.add_argument("--output", type=Path, help="For --keep.")
    options = parser.parse_args()
    if options.keep:
        if options.output is None:
            parser.error("--keep needs --output")
        keep(options.keep, options.output)
        return
    page, pictures = make_page(read_sources())
    if options.check:
        if found := stale(page, pictures):
            sys.exit(f"not what `make results` would make: {', '.join(found)}")
        return
    (DOCS / "results.md").write_text(page, encoding="utf-8")
    draw(pictures)


if __name__ == "__main__":
    main()
