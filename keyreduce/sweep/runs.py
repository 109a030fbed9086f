"""The runs that a recipe asks for: each a folder, what decides its result, and the commands that make it."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from keyreduce import __version__
from keyreduce.calibration.run import Settings
from keyreduce.recovery.modes import RECONSTRUCT
from keyreduce.sweep.recipe import NO_REPAIR, Cell, Recipe, Recovery

CALIBRATION, DENSE, PRUNED = "calibration", "dense", "pruned"
CALIBRATION_NAME = "calibration.safetensors"
CUT_NAME = "cut"
CHECKPOINT_NAME = "checkpoint"
DCP_NAME = "dcp"


class Model(NamedTuple):
    """A model of a sweep.

    Attributes:
        name: what tables call it.
        path: what commands are given as ``--model``.
        identity: hash of its config and tensors.
    """

    name: str
    path: str
    identity: str


class Texts(NamedTuple):
    """One of the two texts: the files (none for the default), and their identity."""

    paths: tuple[str, ...]
    identity: str


class Place(NamedTuple):
    """Where runs compute: the device as ``--device`` takes it, and the dtype's name."""

    device: str
    dtype: str


@dataclass(frozen=True)
class Run:
    """Some commands, run in turn, whose figures go into one folder.

    Attributes:
        kind: `CALIBRATION`, `DENSE` or `PRUNED`.
        title: what messages call it.
        folder: its folder, below the sweep's; a hash of ``settings`` ends its name, so that whatever is in there was
            made from these.
        settings: all that decides its result, as JSON.
        steps: name of a step -> the arguments of ``keyreduce``.
        about: what tables say of it.
        needs: folders of the runs whose files it reads.
    """

    kind: str
    title: str
    folder: str
    settings: dict
    steps: dict[str, list[str]]
    about: dict
    needs: tuple[str, ...] = field(default=())

    def to_json(self) -> dict:
        """Return all of it but the steps, for the record of a sweep."""
        return {"kind": self.kind, "title": self.title, "folder": self.folder, **self.about, "needs": [*self.needs]}


def plan_runs(
    recipe: Recipe, models: Sequence[Model], calibration: Texts, heldout: Texts, place: Place, root: Path
) -> list[Run]:
    """Return all runs of a sweep: first those that others need, and the dense models.

    Args:
        recipe: what to compare.
        models: the models.
        calibration, heldout: the texts.
        place: where to compute.
        root: the sweep's folder, absolute.
    """
    planner = _Planner(recipe, calibration, heldout, place, Path(root))
    first = [run for model in models for run in planner.preparations(model)]
    pruned = [planner.pruned(model, cell, seed) for model in models for cell in recipe.cells for seed in recipe.seeds]
    return [*first, *pruned]


class _Planner(NamedTuple):
    recipe: Recipe
    calibration: Texts
    heldout: Texts
    place: Place
    root: Path

    def preparations(self, model: Model) -> Iterator[Run]:
        yield self._dense(model)
        seeds = dict.fromkeys(self.recipe.calibration_seed(seed) for seed in self.recipe.seeds)
        yield from (self._calibration(model, seed) for seed in seeds)

    def pruned(self, model: Model, cell: Cell, seed: int) -> Run:
        calibration = self._calibration(model, self.recipe.calibration_seed(seed))
        is_repaired = cell.repair != NO_REPAIR
        timing = self.recipe.timing
        settings = {
            "model": model.identity,
            **cell._asdict(),
            "seed": seed,
            "calibration": {name: value for name, value in calibration.settings.items() if name in _OF_SUMS},
            "heldout": self._measured(),
            "timing": timing and timing._asdict(),
            "convert": self.recipe.convert,
            **({"recovery": [self.calibration.identity, *self.recipe.recovery]} if is_repaired else {}),
        }
        words = (cell.target.replace(",", "+"), cell.label, cell.ratio, cell.repair, f"seed{seed}")
        folder = self._folder("runs", model, words, settings)
        checkpoint = self.root / folder / CHECKPOINT_NAME
        cut = self.root / folder / CUT_NAME if is_repaired else checkpoint
        steps = {"prune": self._prune(model, cell, seed, calibration, cut)}
        if is_repaired:
            steps["recover"] = self._recover(model, cell, self.recipe.calibration_seed(seed), cut, checkpoint)
        if self.recipe.convert:
            steps["convert"] = ["convert-dcp", str(checkpoint), str(self.root / folder / DCP_NAME), "--json"]
        if timing:
            steps["benchmark"] = self._benchmark(model, folder, checkpoint)
        steps["eval"] = self._eval(str(checkpoint), folder)
        about = {
            "model": model.name,
            "target": cell.target,
            "method": cell.method,
            "label": cell.label,
            "ratio": cell.ratio,
            "repair": cell.repair,
            "seed": seed,
        }
        repair = f", {cell.repair}" if is_repaired else ""
        title = f"{model.name}, {100 * cell.ratio:g}% of {cell.target} by {cell.label}{repair}, seed {seed}"
        return Run(PRUNED, title, folder, settings, steps, about, (calibration.folder,))

    def _dense(self, model: Model) -> Run:
        settings = {"model": model.identity, "heldout": self._measured()}
        folder = self._folder("dense", model, (), settings)
        steps = {"eval": self._eval(model.path, folder)}
        return Run(DENSE, f"{model.name}, dense", folder, settings, steps, {"model": model.name})

    def _calibration(self, model: Model, seed: int) -> Run:
        gradients = self.recipe.needs_gradients
        drawn = self.recipe.calibration._replace(seed=seed)
        settings = {
            "model": model.identity,
            "text": self.calibration.identity,
            **drawn._asdict(),
            **self.place._asdict(),
            "gradients": gradients,
        }
        folder = self._folder("calibration", model, (f"seed{seed}",), settings)
        target = self.root / folder / CALIBRATION_NAME
        command = ["calibrate", "--model", model.path, "--output", str(target), *_sizes(drawn), "--seed", str(seed)]
        command += [*self._where(), *(["--gradients"] if gradients else []), *_text(self.calibration), "--json"]
        about = {"model": model.name, "seed": seed}
        return Run(
            CALIBRATION, f"{model.name}, calibration, seed {seed}", folder, settings, {"calibrate": command}, about
        )

    def _prune(self, model: Model, cell: Cell, seed: int, calibration: Run, checkpoint: Path) -> list[str]:
        sums = self.root / calibration.folder / CALIBRATION_NAME
        command = ["prune", "--model", model.path, "--method", cell.method, "--target", cell.target]
        command += ["--ratio", str(cell.ratio), "--seed", str(seed), "--calibration", str(sums)]
        command += [part for option in cell.changed_options.items() for part in ("--set", _setting(*option))]
        return [*command, "--device", self.place.device, "--output", str(checkpoint), "--json"]

    def _recover(self, model: Model, cell: Cell, seed: int, cut: Path, checkpoint: Path) -> list[str]:
        recovery = self.recipe.recovery
        command = ["recover", "--mode", cell.repair, "--compressed", str(cut), "--model", model.path]
        command += [*_sizes(recovery), "--seed", str(seed), *_text(self.calibration)]
        command += ["--repeats", str(recovery.repeats)]
        if cell.repair == RECONSTRUCT and recovery.steps is not None:
            command += ["--steps", str(recovery.steps)]
        return [*command, "--device", self.place.device, "--output", str(checkpoint), "--json"]

    def _benchmark(self, model: Model, folder: str, checkpoint: Path) -> list[str]:
        timing = self.recipe.timing
        command = ["benchmark", "--model", model.path, "--compressed", str(checkpoint)]
        command += [f"--{kind}" for kind in timing.kinds]
        command += ["--batch-size", str(timing.batch_size), "--seq-len", str(timing.seq_len)]
        command += ["--rounds", str(timing.rounds)]
        if "decode" in timing.kinds:
            sizes = ",".join(map(str, timing.decode_batch_sizes))
            command += ["--decode-batch-sizes", sizes, "--max-batch-size", "0"]
        output = str(self.root / folder / "benchmark.json")
        return [*command, *self._where(), "--output", output, "--overwrite", "--json"]

    def _eval(self, model: str, folder: str) -> list[str]:
        # In the run's own folder there is no `pruned`, so that eval looks at this one model alone.
        here = self.root / folder
        command = ["eval", "--model", model, "--work", str(here), *_sizes(self.recipe.heldout)]
        command += [*_text(self.heldout), *self._where()]
        return [*command, "--output", str(here / "eval.json"), "--overwrite", "--json"]

    def _measured(self) -> dict:
        sizes = {name: getattr(self.recipe.heldout, name) for name in ("num_batches", "batch_size", "seq_len")}
        return {"text": self.heldout.identity, **sizes, **self.place._asdict()}

    def _where(self) -> list[str]:
        return ["--device", self.place.device, "--dtype", self.place.dtype]

    def _folder(self, kind: str, model: Model, words: Sequence[object], settings: dict) -> str:
        content = json.dumps({**settings, "keyreduce": __version__}, sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        return f"{kind}/{slug(model.name, *words)}-{digest}"


# What decides the numbers of a calibration file; gradients come beside them.
_OF_SUMS = ("text", *Settings._fields, *Place._fields)


def slug(*words: object) -> str:
    """Return words as the name of a folder: letters, digits and what no shell minds, at most 120 of them."""
    return re.sub(r"[^\w.+]+", "-", "-".join(map(str, words))).strip("-")[:120]


def _sizes(settings: Settings | Recovery) -> list[str]:
    numbers = {"--num-batches": settings.num_batches, "--batch-size": settings.batch_size}
    return [
        part for option, number in (*numbers.items(), ("--seq-len", settings.seq_len)) for part in (option, str(number))
    ]


def _text(texts: Texts) -> list[str]:
    return [part for path in texts.paths for part in ("--text", path)]


def _setting(name: str, value: object) -> str:
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"
