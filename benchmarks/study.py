"""What the studies of repair have in common: a model, the text that it is pruned and repaired by, and other text."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.find import find_model
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.stdlib import Split
from keyreduce.data.text import FileText, StdlibText
from keyreduce.devices import pick_device
from keyreduce.evaluation.perplexity import text_costs, total
from keyreduce.evaluation.recall import KINDS, RecallProbes, recall_metrics
from keyreduce.models.loading import load_model
from keyreduce.pruning.budget import Budget
from keyreduce.pruning.methods import method_named
from keyreduce.pruning.planning import make_plan
from keyreduce.pruning.prune import write_pruned
from keyreduce.recovery.layers import Recovered, recover_checkpoint
from keyreduce.recovery.modes import REPEATS, make_steps
from keyreduce.recovery.overlap import refuse_overlap
from keyreduce.recovery.writing import write_recovered


def add_arguments(parser: argparse.ArgumentParser, *, ratios: Sequence[str], repairs: Sequence[str]) -> None:
    """Add the options that every study takes, with these ratios and repairs by default."""
    parser.add_argument("--model")
    parser.add_argument("--calibration", type=Path, nargs="+", help="text; by default the standard library's source")
    parser.add_argument("--heldout", type=Path, nargs="+", help="other text; by default other files of that")
    parser.add_argument("--heldout-rows", type=int, help="rows of 1,024 tokens to measure on, by default all")
    parser.add_argument("--ratios", nargs="+", default=ratios)
    parser.add_argument("--repairs", nargs="+", default=repairs)
    parser.add_argument("--num-batches", type=int, default=64, help="of a repair")
    parser.add_argument("--calibration-batches", type=int, help="of the choice of channels; by default as many")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device")


def parse_options(text: str, kinds: dict[str, type]) -> tuple[str, dict]:
    """Return the name and the options of ``name`` or ``name:option=value,...``; ``kinds`` makes values of text."""
    name, _, rest = text.partition(":")
    given = dict(option.split("=") for option in rest.split(",") if option)
    return name, {option: kinds[option](value) for option, value in given.items()}


class Study:
    """One dense model, and what is done to it and measured.

    Args:
        arguments: of :func:`add_arguments`.
        split: of the standard library's source, where no text is named.

    Raises:
        KeyreduceError: a model or text is not there, or a document is in both texts.
    """

    def __init__(self, arguments: argparse.Namespace, split: Split = "calibration"):
        self.device = pick_device(arguments.device)
        self.dense = open_folder(find_model(arguments.model))
        self.text = FileText(arguments.calibration) if arguments.calibration else StdlibText(split)
        self.heldout = FileText(arguments.heldout) if arguments.heldout else StdlibText("heldout")
        self.heldout_rows = arguments.heldout_rows
        self._rows = (arguments.batch_size, arguments.seq_len)
        self._repair_batches = arguments.num_batches
        self._calibration_batches = arguments.calibration_batches or arguments.num_batches
        refuse_overlap(self.text, self.heldout)

    def settings(self, seed: int) -> Settings:
        """Return how much text a repair takes, in the order of a seed."""
        return Settings(self._repair_batches, *self._rows, seed)

    def measure(self, folder: Path) -> float:
        """Return the perplexity per token of the held-out text, in rows of 1,024 tokens."""
        loaded = load_model(folder, self.device, torch.float32, gradients=True)
        rows = text_costs(loaded, self.heldout, seq_len=1024, batch_size=8, num_rows=self.heldout_rows)
        return total(rows).perplexity

    def recall(self, folder: Path) -> dict[str, float]:
        """Return, for each kind of recall, how often a model prefers the right answer to seven others, over the grid.

        Lengths, numbers of pairs and of sequences are those of `keyreduce eval --recall`, the haystacks held-out text.
        """
        loaded = load_model(folder, self.device, torch.float32, gradients=True)
        settings = EvaluateRequest(recall=tuple(KINDS)).recall_settings()
        metrics = recall_metrics([RecallProbes(loaded, self.heldout, settings).ask(batch_size=16)])
        return {kind: mean(cell["choice_accuracy"] for cell in cells) for kind, cells in metrics.items()}

    def calibrate(self, seed: int) -> Statistics:
        """Return the sums that methods choose by."""
        # With gradients, fla's kernels leave the place to PyTorch's, which take float32 on any device.
        gradients = self.device.type != "cpu"
        settings = Settings(self._calibration_batches, *self._rows, seed)
        return calibrate(
            self.dense, self.text, settings, device=self.device, dtype=torch.float32, gradients=gradients
        )

    def prune(self, statistics: Statistics, method: str, ratio: str, seed: int, target: Path) -> Checkpoint:
        """Write the model without a share of its key channels, and return it."""
        chosen = method_named(method)
        numbers = Budget.of(["key"], ratio=[ratio]).numbers(self.dense.config, statistics, chosen, chosen.options)
        inputs = {"method": method, "target": ["key"], "ratio": ratio}
        plan = make_plan(self.dense, chosen, numbers, seed=seed, statistics=statistics, inputs=inputs)
        write_pruned(self.dense, plan, target, dense=str(self.dense.path))
        return open_folder(target)

    def repair(self, pruned: Checkpoint, text: str, seed: int, target: Path) -> tuple[Recovered, float]:
        """Write the pruned model repaired by a mode of `keyreduce recover`, with options; return how, and in how long.

        Args:
            pruned: what :meth:`prune` gave.
            text: ``mode`` or ``mode:option=value,...``.
            seed: of the order of the text.
            target: the folder to make.
        """
        mode, options = parse_options(text, {"steps": int, "lr": float, "scope": str, "repeats": float})
        start = time.perf_counter()
        repeats = options.pop("repeats", REPEATS)
        steps = make_steps(mode, options)
        amounts = {"steps": steps, "repeats": repeats, "device": self.device}
        recovered = recover_checkpoint(self.dense, pruned, self.text, self.settings(seed), **amounts)
        seconds = time.perf_counter() - start
        write_recovered(pruned, recovered, target, inputs={"mode": mode}, seconds=seconds)
        return recovered, seconds
