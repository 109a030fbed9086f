"""What a budget for the state costs one model: sizes that are chosen for it, each recovery, each format of the state.

    python benchmarks/budget_study.py --output FILE.json --work FOLDER [--model PATH] [--calibration FILE]
        [--heldout FILE] [--heldout-rows 64] [--every 1] [--first-rows N] [--cuts state=0.5 state=0.75 key=0.5]
        [--repairs none least-squares reconstruct] [--state-dtypes bfloat16 int8] [--num-batches 64] [--seeds 0 1 2]
        [--batch-size 4] [--device cuda]
    python benchmarks/budget_study.py --table FILE.json ...

A cut is `state=SHARE`, whose sizes `keyreduce prune --state-ratio SHARE` chooses, `key=SHARE`, of key channels alone,
or the key and value channels of a head that stay, as `80x104`. Each is made of statistics of so many batches of 8 rows
of 512 tokens, repaired on the same text, and measured on rows of 1,024 held-out tokens, the first ones or, with
--every, every so many of them; and on the --first-rows of these alone. Without a repair the cut has its corrections;
with `exact` as the repair, it has none either. After the last repair the state of these sizes is also kept in the
formats of --state-dtypes, rounded after each token. A seed is another draw of calibration text. Recall is the share of
right answers among eight, and is not measured in other formats.

The file is written after each measurement, and a run that was cut off continues from there. Models lie in the work
folder.
"""

import argparse
import contextlib
import platform
import re
import time
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from result_tables import UNREPAIRED, study_table

from keyreduce.api import calibrate, prune, recover
from keyreduce.api.request import specs
from keyreduce.checkpoint.find import find_model, open_model
from keyreduce.data.batches import SPREAD, bytes_per_token
from keyreduce.data.text import TextSource, text_source
from keyreduce.devices import device_name, pick_device
from keyreduce.evaluation.perplexity import Perplexity, total, window_costs
from keyreduce.evaluation.recall import RecallProbes, RecallSettings, recall_metrics
from keyreduce.evaluation.windows import equal_length_batches, windows
from keyreduce.families import family_of
from keyreduce.models.loading import LoadedModel, load_model
from keyreduce.models.state_storage import stored_states
from keyreduce.outputs import read_json, write_json
from keyreduce.pruning.budget import SIZE_OF
from keyreduce.reporting import Reporter

BATCH, ROW = 8, 512
HELDOUT_ROW = 1024
DISTILLED = "-distilled"
RECALL = RecallSettings(("mqar", "needle"), (256, 1024), (4, 16), 16, 0)


class Lines(Reporter):
    """Remarks as lines of the log."""

    def note(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    """Measure what is missing, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, default=Path("keyreduce-out/budget-study"))
    parser.add_argument("--model")
    parser.add_argument("--calibration", type=Path, nargs="+", default=())
    parser.add_argument("--heldout", type=Path, nargs="+", default=())
    parser.add_argument("--heldout-rows", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="take every so many of the held-out rows")
    parser.add_argument("--first-rows", type=int, help="of the held-out rows, whose figures are given too")
    parser.add_argument("--cuts", nargs="+", default=["state=0.5", "state=0.75", "key=0.5"])
    parser.add_argument("--repairs", nargs="+", default=["none", "least-squares", "reconstruct"])
    parser.add_argument("--state-dtypes", nargs="*", default=["bfloat16", "int8"])
    parser.add_argument("--num-batches", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=4, help="held-out rows at a time")
    parser.add_argument("--device")
    options = parser.parse_args()
    for path in options.table or ():
        print("\n".join(study_table(read_json(path))))
    if options.output:
        study(options)


def study(options: argparse.Namespace) -> None:
    """Measure everything that the output does not have yet."""
    folder = find_model(options.model)
    new = {"model": folder.name, "spread": SPREAD, "runs": []}
    found = read_json(options.output) if options.output.exists() else new
    found |= {"calibration_tokens": options.num_batches * BATCH * ROW, "heldout_rows": options.heldout_rows}
    found |= {name: getattr(options, name) for name in ("every", "first_rows")}
    found |= {"device": device_name(pick_device(options.device))}
    found |= {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
    if "dense" not in found:
        found["dense"] = measure(options, folder, "float32")
        write_json(options.output, found, overwrite=True)
    for seed in options.seeds:
        for cut in options.cuts:
            for repair in options.repairs:
                more = options.state_dtypes if repair == options.repairs[-1] and cut.startswith("state=") else ()
                for dtype in ("float32", *more):
                    key = {"seed": seed, "cut": cut, "repair": repair, "state_dtype": dtype}
                    if any(key.items() <= run.items() for run in found["runs"]):
                        continue
                    made = make(options, seed, cut, repair)
                    run = key | made | measure(options, options.work / name_of(seed, cut, repair), dtype)
                    found["runs"].append(run)
                    write_json(options.output, found, overwrite=True)
                    loss = run["perplexity"] / found["dense"]["perplexity"] - 1
                    print(f"{seed} {cut} {repair} {dtype}: {loss:+.2%} {run.get('recall', '')}", flush=True)


def name_of(seed: int, cut: str, repair: str) -> str:
    """Return the name of a model's folder."""
    return re.sub(r"[^\w.-]", "-", f"{seed}-{cut}-{repair}")


def make(options: argparse.Namespace, seed: int, cut: str, repair: str) -> dict:
    """Prune and repair a model, unless that was done, and return its sizes and how long it took."""
    folder = options.work / name_of(seed, cut, repair)
    about = folder.with_name(f"{folder.name}.json")
    if about.exists():
        return read_json(about)
    common = {"work": options.work, "device": options.device, "seed": seed}
    text = {"text": tuple(options.calibration)}
    amount = {"num_batches": options.num_batches, "batch_size": BATCH, "seq_len": ROW}
    calibration = options.work / f"calibration-{seed}.safetensors"
    calibrate.run(
        calibrate.CalibrateRequest(
            model=options.model, output=calibration, gradients=False, dtype="float32", **text, **amount, **common
        )
    )
    how = {"model": options.model, "calibration": calibration, **text, **common}
    sizes = chosen_sizes(options.work, cut, repair, how)
    bare = folder if repair in UNREPAIRED else folder.with_name(f"{folder.name}-cut")
    request = prune.PruneRequest(output=bare, uncorrected=repair != "none", **sizes, **how)
    started = time.perf_counter()
    result = prune.run(request)
    if bare != folder:
        recover.run(
            recover.RecoverRequest(
                compressed=str(bare), output=folder, **text, **common, **amount | recovery_of(repair)
            )
        )
    seconds = time.perf_counter() - started
    assert isinstance(result, prune.PruneResult)
    found = {"sizes": [result.key_heads[1], result.head_k_dim[1], result.head_v_dim[1]], "seconds": seconds}
    write_json(about, found)
    return found


def recovery_of(text: str) -> dict:
    """Return the fields of a recovery from ``mode[-distilled]`` or ``mode[-distilled]:field=value,...``."""
    name, _, rest = text.partition(":")
    given = dict(part.split("=") for part in rest.split(",") if part)
    fields = specs(recover.RecoverRequest)
    taught = {"distill_weight": 1.0} if name.endswith(DISTILLED) else {}
    values = {field: fields[field].kind(value) for field, value in given.items()}
    return {"mode": name.removesuffix(DISTILLED), **taught, **values}


def chosen_sizes(work: Path, cut: str, repair: str, how: dict) -> dict:
    """Return the fields of a request that say what a cut keeps; for a budget what the search chooses.

    What is found is kept in the work folder, and ``how`` are the fields that say what is searched.
    """
    target, is_share, share = cut.partition("=")
    if not is_share:
        return keeping(how["model"], dict(zip(("key", "value"), map(int, cut.split("x")), strict=True)))
    if target != "state":
        return {"target": (target,), "ratio": (share,)}
    recovery = None if repair in UNREPAIRED else repair.partition(":")[0]
    path = work / f"search-{how['seed']}-{share}-{recovery or 'none'}.json"
    if not path.exists():
        request = prune.PruneRequest(state_ratio=share, dry_run=True, recover=recovery, **how)
        found = prune.run(request, Lines())
        assert isinstance(found, prune.DryRunResult)
        write_json(path, found.state_budget)
    best = read_json(path)["chosen"]
    return keeping(how["model"], {target: best[size] for target, size in SIZE_OF.items()})


def keeping(model: str | None, keep: dict[str, int]) -> dict:
    """Return the fields of a request that keep so many of each target of a model."""
    source = open_model(model)
    sizes = next(iter(family_of(source.config).layer_sizes(source.config).values()))
    kept = {target: number for target, number in keep.items() if number != getattr(sizes, SIZE_OF[target])}
    return {"target": tuple(kept), "keep": tuple(map(str, kept.values()))}


def row_costs(options: argparse.Namespace, loaded: LoadedModel, text: TextSource) -> list[Perplexity]:
    """Return what each of the held-out rows costs a model."""
    rows = windows(text.in_pieces(), loaded.tokenizer, HELDOUT_ROW, HELDOUT_ROW)
    taken = islice(rows, 0, options.every * options.heldout_rows, options.every)
    batches = equal_length_batches(taken, options.batch_size)
    return window_costs(loaded.model, batches, bytes_per_token(loaded.tokenizer), name=str(loaded.folder))


def measure(options: argparse.Namespace, folder: Path, dtype: str) -> dict:
    """Return perplexity of the held-out text, of all rows and of the first ones, and recall."""
    device = pick_device(options.device)
    loaded = load_model(folder, device, torch.float32)
    text = text_source(options.heldout, default="heldout")
    with contextlib.ExitStack() as stack:
        if dtype != "float32":
            stack.enter_context(stored_states(loaded.model, loaded.family, dtype))
        rows = row_costs(options, loaded, text)
    found: dict = {"perplexity": total(rows).perplexity}
    if options.first_rows:
        found["perplexity_first"] = total(rows[: options.first_rows]).perplexity
    if dtype == "float32":
        cells = recall_metrics([RecallProbes(loaded, text, RECALL).ask(batch_size=16)])
        found["recall"] = {kind: mean(cell["choice_accuracy"] for cell in of_kind) for kind, of_kind in cells.items()}
    return found


if __name__ == "__main__":
    main()
