"""How well the predicted loss ranks cuts, and what the corrections of a cut bring: a grid of sizes of one model.

    python benchmarks/state_budget.py --output FILE.json [--model PATH] [--calibration FILE] [--heldout FILE]
        [--num-batches 16] [--rows 32] [--recover least-squares]
    python benchmarks/state_budget.py --table FILE.json ...

For each pair of key and value channels of a grid, and for fewer heads, a cut is made in memory and measured on held-out
text: exact, with the corrections, and with --recover after that recovery. The file is written after each cut, and a run
that was cut off resumes from there. The table is Markdown: the rank correlation (Spearman) of predicted and measured
loss over all cuts, and the cuts themselves.
"""

import argparse
import itertools
import platform
from pathlib import Path

import torch
from result_tables import grid_table

from keyreduce.calibration.run import Settings, calibrate_loaded
from keyreduce.checkpoint.find import find_model
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.batches import SPREAD, token_rows
from keyreduce.data.text import text_source
from keyreduce.devices import pick_device
from keyreduce.evaluation.perplexity import Perplexity
from keyreduce.evaluation.windows import Window
from keyreduce.families import MixerSizes
from keyreduce.models.in_memory import ModuleCheckpoint
from keyreduce.models.loading import load_model
from keyreduce.outputs import read_json, write_json
from keyreduce.pruning.budget import SIZE_OF
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.prediction import predicted_loss, read_curves
from keyreduce.pruning.trial import ROW_LENGTH, Trial

KINDS = ("exact", "corrected")


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--calibration", type=Path, nargs="+", default=())
    parser.add_argument("--heldout", type=Path, nargs="+", default=())
    parser.add_argument("--num-batches", type=int, default=16, help="of 8 rows of 512 tokens, for calibration")
    parser.add_argument("--rows", type=int, default=32, help="of 1,024 tokens of held-out text")
    parser.add_argument("--recover", choices=["least-squares"])
    parser.add_argument("--device")
    options = parser.parse_args()
    for path in options.table or ():
        print("", *grid_table(read_json(path)), sep="\n")
    if options.output:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Measure all cuts of the grid that the output does not have yet."""
    device = pick_device(options.device)
    folder = find_model(options.model)
    dense = load_model(folder, device, torch.float32, gradients=True)
    module = ModuleCheckpoint(dense.model)
    text = text_source(options.calibration, None, None, None, default="calibration")
    settings = Settings(options.num_batches, 8, 512, 0)
    statistics = calibrate_loaded(dense, module, text, settings, torch.float32)
    heldout = text_source(options.heldout, None, None, None, default="heldout")
    rows = itertools.islice(token_rows(heldout.in_pieces(), dense.tokenizer, ROW_LENGTH), options.rows)
    windows = [Window(row_T, torch.zeros_like(row_T), 1) for row_T in rows]
    choose = {"method": METHODS["auto"], "options": {}, "seed": 0}
    trials = {
        kind: Trial(dense, module, statistics, windows, text, SPREAD, choose | {"correct": kind == "corrected"}, None)
        for kind in KINDS
    }
    if options.recover:
        trials[options.recover] = Trial(
            dense, module, statistics, windows, text, SPREAD, choose | {"correct": False}, options.recover
        )
    layers = dense.family.layer_sizes(module.config)
    before, curves = next(iter(layers.values())), read_curves(open_folder(folder), statistics)
    new = {"model": folder.name, "spread": SPREAD, "cuts": []}
    found = read_json(options.output) if options.output.exists() else new
    found |= {"calibration_tokens": statistics.tokens, "predictions": len(windows) * (ROW_LENGTH - 1)}
    found |= {"device": str(device), "processor": platform.machine(), "torch": torch.__version__}
    base = Perplexity.of(trials["exact"].costs(dense, "float32")).perplexity
    found["dense_perplexity"] = base
    done = {(cut["key_heads"], cut["head_k_dim"], cut["head_v_dim"]) for cut in found["cuts"]}
    for sizes in grid(before):
        if (sizes.key_heads, sizes.head_k_dim, sizes.head_v_dim) in done:
            continue
        numbers = {target: getattr(sizes, size) for target, size in SIZE_OF.items()}
        changed = {target: n for target, n in numbers.items() if n != getattr(before, SIZE_OF[target])}
        keep = {target: dict.fromkeys(layers, number) for target, number in changed.items()}
        cut: dict = {"key_heads": sizes.key_heads, "head_k_dim": sizes.head_k_dim, "head_v_dim": sizes.head_v_dim}
        cut["state"] = sizes.state_elements / before.state_elements
        cut["predicted"] = predicted_loss(curves, sizes)
        cut["predicted_recovered"] = predicted_loss(curves, sizes, "least-squares")
        for kind, trial in trials.items():
            cut[kind] = Perplexity.of(trial.candidate_costs(keep, "float32")).perplexity / base - 1
        found["cuts"].append(cut)
        write_json(options.output, found, overwrite=True)
        print(cut, flush=True)


def grid(before: MixerSizes) -> list[MixerSizes]:
    """Return sizes in steps of an eighth of a head whose state is 20% to 90% of the dense one's, and fewer heads."""
    keys, values = ([size * part // 8 for part in range(2, 9)] for size in (before.head_k_dim, before.head_v_dim))
    pairs = [before._replace(head_k_dim=key, head_v_dim=value) for key in keys for value in values]
    found = [sizes for sizes in pairs if 0.2 <= sizes.state_elements / before.state_elements < 0.9]
    found = [sizes for sizes in found if sizes.head_v_dim >= before.head_v_dim // 2]
    group = before.value_heads // before.key_heads
    for heads in range((before.key_heads + 1) // 2, before.key_heads):
        fewer = before._replace(key_heads=heads, value_heads=heads * group)
        found += [fewer, fewer._replace(head_k_dim=keys[-3]), fewer._replace(head_v_dim=values[-3])]
    return found


if __name__ == "__main__":
    main()
