"""The runs that a recipe asks for: each is a folder, what decides its result, and the requests that make it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from keyreduce import __version__
from keyreduce.api.convert import ConvertRequest
from keyreduce.api.request import Request
from keyreduce.recovery.modes import RECONSTRUCT
from keyreduce.sweep.recipe import NO_REPAIR, Combination, Recipe

CALIBRATION, DENSE, PRUNED = "calibration", "dense", "pruned"
CHECKPOINT_NAME = "checkpoint"
DCP_NAME = "dcp"
CUT_NAME = "cut"
"""The pruned checkpoint, where one that is recovered from it becomes the checkpoint of the run."""
_CALIBRATION_NAME = "calibration.safetensors"


class Model(NamedTuple):
    """A model of a sweep.

    Attributes:
        name: what tables call it.
        path: the field ``model`` of requests.
        identity: hash of its config and tensors.
    """

    name: str
    path: str
    identity: str


class Texts(NamedTuple):
    """One of the two texts.

    Attributes:
        paths: its files and folders; none for the text that comes with keyreduce.
        identity: hash of what it is made from.
    """

    paths: tuple[Path, ...]
    identity: str


@dataclass(frozen=True)
class Run:
    """Requests that are carried out in turn, and whose results go into one folder.

    Attributes:
        kind: `CALIBRATION`, `DENSE` or `PRUNED`.
        title: what messages call it.
        folder: its folder, below the sweep's. A hash of ``settings`` ends its name, so whatever is in there was made
            from these settings.
        settings: all that decides its result, as a JSON object.
        steps: name of a step -> its request.
        about: what tables say of it.
        needs: folders of the runs whose files it reads.
    """

    kind: str
    title: str
    folder: str
    settings: dict
    steps: dict[str, Request]
    about: dict
    needs: tuple[str, ...] = field(default=())

    def to_json(self) -> dict:
        """Return what the record of a sweep says of the run."""
        return {"kind": self.kind, "title": self.title, "folder": self.folder, **self.about, "needs": [*self.needs]}


@dataclass(frozen=True)
class Planner:
    """What makes the runs of a sweep.

    Attributes:
        recipe: what is compared.
        calibration, heldout: the texts.
        device, dtype: where runs compute and in what, as requests name them.
        root: the sweep's folder, absolute.
    """

    recipe: Recipe
    calibration: Texts
    heldout: Texts
    device: str
    dtype: str
    root: Path

    def runs(self, models: Sequence[Model]) -> list[Run]:
        """Return all runs: first the dense models and the calibrations, which the others need."""
        recipe = self.recipe
        seeds = dict.fromkeys(map(recipe.calibration_seed, recipe.seeds))
        first = [[self._dense(model), *(self._calibration(model, seed) for seed in seeds)] for model in models]
        pruned = [
            self._pruned(model, combination, seed)
            for model in models
            for combination in recipe.combinations
            for seed in recipe.seeds
        ]
        return [*(run for runs in first for run in runs), *pruned]

    def _dense(self, model: Model) -> Run:
        steps = {"eval": self._eval()}
        settings = _settings(model, steps, heldout=self.heldout.identity)
        folder = _folder("dense", model, (), settings)
        steps = _placed(steps, {"eval": {"model": model.path, **self._eval_places(folder)}})
        return Run(DENSE, f"{model.name}, dense", folder, settings, steps, {"model": model.name})

    def _calibrate(self, seed: int, *, gradients: bool) -> Request:
        where = {"device": self.device, "dtype": self.dtype}
        return replace(self.recipe.calibration, seed=seed, gradients=gradients, **where)

    def _calibration(self, model: Model, seed: int) -> Run:
        steps = {"calibrate": self._calibrate(seed, gradients=self.recipe.needs_gradients)}
        settings = _settings(model, steps, calibration=self.calibration.identity)
        folder = _folder("calibration", model, (f"seed{seed}",), settings)
        output = self.root / folder / _CALIBRATION_NAME
        places = {"model": model.path, "output": output, "text": self.calibration.paths}
        title, about = f"{model.name}, calibration, seed {seed}", {"model": model.name, "seed": seed}
        return Run(CALIBRATION, title, folder, settings, _placed(steps, {"calibrate": places}), about)

    def _pruned(self, model: Model, combination: Combination, seed: int) -> Run:
        target, label, ratio, repair = (getattr(combination, name) for name in ("target", "label", "ratio", "repair"))
        steps = self._pruned_steps(combination, seed)
        calibration_seed = self.recipe.calibration_seed(seed)
        settings = _settings(
            model,
            # Statistics of gradients come beside the others, and leave them as they are.
            {"calibrate": self._calibrate(calibration_seed, gradients=False), **steps},
            calibration=self.calibration.identity,
            heldout=self.heldout.identity,
        )
        words = (target.replace(",", "+"), label, ratio, repair, f"seed{seed}")
        folder, calibration = _folder("runs", model, words, settings), self._calibration(model, calibration_seed).folder
        here = self.root / folder
        checkpoint = here / CHECKPOINT_NAME
        cut = here / CUT_NAME if "recover" in steps else checkpoint
        pair = {"model": model.path, "compressed": str(checkpoint)}
        places = {
            "prune": {"model": model.path, "calibration": self.root / calibration / _CALIBRATION_NAME, "output": cut},
            "recover": {**pair, "compressed": str(cut), "output": checkpoint, "text": self.calibration.paths},
            "convert": {"source": str(checkpoint), "destination": here / DCP_NAME},
            "benchmark": {**pair, "output": here / "benchmark.json", "overwrite": True},
            "eval": {"model": str(checkpoint), **self._eval_places(folder)},
        }
        about = {"model": model.name, "target": target, "method": combination.request.method, "label": label}
        about |= {"ratio": ratio, "repair": repair, "seed": seed}
        told = f", {repair}" if "recover" in steps else ""
        title = f"{model.name}, {100 * ratio:g}% of {target} by {label}{told}, seed {seed}"
        return Run(PRUNED, title, folder, settings, _placed(steps, places), about, (calibration,))

    def _pruned_steps(self, combination: Combination, seed: int) -> dict[str, Request]:
        recipe, where = self.recipe, {"device": self.device, "dtype": self.dtype}
        steps: dict[str, Request] = {
            "prune": replace(combination.request, recover=None, seed=seed, device=self.device),
        }
        if combination.repair != NO_REPAIR:
            # There are gradient steps in no other mode.
            without = {} if combination.repair == RECONSTRUCT else dict.fromkeys(("steps", "lr", "scope"))
            drawn = {"seed": recipe.calibration_seed(seed), "device": self.device}
            steps["recover"] = replace(recipe.recover, mode=combination.repair, **drawn, **without)
        if recipe.convert:
            steps["convert"] = ConvertRequest()
        if recipe.benchmark is not None:
            steps["benchmark"] = replace(recipe.benchmark, **where)
        return {**steps, "eval": self._eval()}

    def _eval(self) -> Request:
        return replace(self.recipe.heldout, device=self.device, dtype=self.dtype)

    def _eval_places(self, folder: str) -> dict:
        here = self.root / folder
        # In the run's own folder there is no `pruned`, so that this one model alone is measured.
        return {"work": here, "output": here / "eval.json", "text": self.heldout.paths, "overwrite": True}


def _settings(model: Model, steps: Mapping[str, Request], **texts: str) -> dict:
    """Return what decides the results of requests that do not say yet where their files are."""
    requests = {name: request.to_json() for name, request in steps.items()}
    return {"keyreduce": __version__, "model": model.identity, **texts, "steps": requests}


def _folder(kind: str, model: Model, words: Sequence[object], settings: dict) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    return f"{kind}/{slug(model.name, *words)}-{digest}"


def _placed(steps: Mapping[str, Request], places: Mapping[str, dict]) -> dict[str, Request]:
    """Return the requests with the fields that say where files are."""
    return {name: replace(request, **places[name]) for name, request in steps.items()}


def slug(*words: object) -> str:
    """Return words as the name of a folder: letters, digits and what no shell minds, at most 120 of them."""
    return re.sub(r"[^\w.+]+", "-", "-".join(map(str, words))).strip("-")[:120]
