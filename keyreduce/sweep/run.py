"""What a sweep does: it refuses a recipe that cannot work, then carries out each missing run in other processes."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from keyreduce import __version__
from keyreduce.api.convert import ConvertRequest
from keyreduce.api.prune import Cut
from keyreduce.api.request import Request
from keyreduce.api.tasks import Launch, do_tasks, is_done, write_failure, write_task
from keyreduce.checkpoint.find import model_name, open_model
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import claimed, write_json
from keyreduce.recovery.modes import RECONSTRUCT
from keyreduce.recovery.overlap import refuse_overlap
from keyreduce.sweep.recipe import NO_REPAIR, Combination, Recipe, named
from keyreduce.sweep.results import CALIBRATION, DENSE, PRUNED, SWEEP_NAME
from keyreduce.workspace import RECORD_NAME

_TOGETHER = 8  # runs that a process does: enough to make its start cheap, few enough to lose little when it dies
_CHECKPOINT_NAME = "checkpoint"
_CUT_NAME = "cut"  # the pruned checkpoint, where one that is recovered from it becomes the checkpoint of the run
_DCP_NAME = "dcp"
_CALIBRATION_NAME = "calibration.safetensors"


@dataclass(frozen=True)
class Run:
    """Requests that are carried out in turn, and whose results go into one folder.

    Attributes:
        kind: one of the kinds in :mod:`keyreduce.sweep.results`.
        title: what messages call it.
        folder: its folder, below the sweep's. A hash of ``settings``, a JSON object of all that decides the results,
            ends its name, so whatever is in there was made from these settings.
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
    needs: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """Return what the record of a sweep says of the run."""
        return {"kind": self.kind, "title": self.title, "folder": self.folder, **self.about, "needs": [*self.needs]}


class _Model(NamedTuple):
    """A model of a sweep: what tables and requests call it, and the hash of its config and tensors."""

    name: str
    path: str
    identity: str


def plan_sweep(
    recipe: Recipe, root: Path, *, calibration: TextSource, heldout: TextSource, device: str, dtype: str
) -> list[Run]:
    """Return the runs of a sweep: first the dense models and the calibrations, which the others need.

    All models are checked before for what a run would be refused for. ``root`` is the sweep's folder, by its real path.

    Raises:
        KeyreduceError: no model is named, one does not exist or cannot be pruned in one of the ways, or the texts
            overlap.
    """
    if not recipe.models:
        raise KeyreduceError(f"{recipe.path} names no models; name them in its list, or give `model`")
    refuse_overlap(calibration, heldout)
    models = []
    for name in recipe.models:
        source = open_model(name)
        for combination in recipe.combinations:
            with named(recipe.path, "prune"):
                Cut.of(combination.request).check(source)
        last = Path(name).name
        is_clear = bool(last) and [Path(other).name for other in recipe.models].count(last) == 1
        models.append(_Model(last if is_clear else name, model_name(name), source.identity))
    where = {"device": device, "dtype": dtype}
    recipe = replace(
        recipe,
        calibration=replace(recipe.calibration, **where),
        heldout=replace(recipe.heldout, **where),
        recover=replace(recipe.recover, device=device),
        combinations=[*dict.fromkeys(one.resolved(torch.device(device).type) for one in recipe.combinations)],
        benchmark=recipe.benchmark and replace(recipe.benchmark, **where),
    )
    planner, first, pruned = _Planner(recipe, calibration, heldout, root), [], []
    for model in models:
        calibrations = {seed: planner.calibrated(model, seed) for seed in map(recipe.calibration_seed, recipe.seeds)}
        first += [planner.dense(model), *calibrations.values()]
        for combination in recipe.combinations:
            for seed in recipe.seeds:
                needed = calibrations[recipe.calibration_seed(seed)].folder
                pruned.append(planner.pruned(model, combination, seed, needed))
    return [*first, *pruned]


class _Planner(NamedTuple):
    recipe: Recipe
    calibration: TextSource
    heldout: TextSource
    root: Path

    def dense(self, model: _Model) -> Run:
        steps = {"eval": self.recipe.heldout}
        folder, settings = _folder("dense", model, (), steps, heldout=self.heldout.identity)
        steps = _placed(steps, {"eval": self._eval_places(folder, model.path)})
        return Run(DENSE, f"{model.name}, dense", folder, settings, steps, {"model": model.name})

    def calibrated(self, model: _Model, seed: int) -> Run:
        steps = {"calibrate": replace(self.recipe.calibration, seed=seed, gradients=self.recipe.needs_gradients)}
        words = (f"seed{seed}",)
        folder, settings = _folder("calibration", model, words, steps, calibration=self.calibration.identity)
        output, text = self.root / folder / _CALIBRATION_NAME, _paths(self.calibration)
        steps = _placed(steps, {"calibrate": {"model": model.path, "output": output, "text": text}})
        title, about = f"{model.name}, calibration, seed {seed}", {"model": model.name, "seed": seed}
        return Run(CALIBRATION, title, folder, settings, steps, about)

    def pruned(self, model: _Model, combination: Combination, seed: int, calibration: str) -> Run:
        target, label, ratio, repair = combination.target, combination.label, combination.ratio, combination.repair
        steps = self._pruning_steps(combination, seed)
        # Statistics of gradients come beside the others, and leave them as they are.
        calibrate = replace(self.recipe.calibration, seed=self.recipe.calibration_seed(seed), gradients=False)
        words = (target.replace(",", "+"), label, ratio, repair, f"seed{seed}")
        texts = {"calibration": self.calibration.identity, "heldout": self.heldout.identity}
        folder, settings = _folder("runs", model, words, {"calibrate": calibrate, **steps}, **texts)
        here = self.root / folder
        checkpoint = here / _CHECKPOINT_NAME
        cut = here / _CUT_NAME if "recover" in steps else checkpoint
        pair = {"model": model.path, "compressed": str(checkpoint)}
        places = {
            "prune": {"model": model.path, "calibration": self.root / calibration / _CALIBRATION_NAME, "output": cut},
            "recover": {**pair, "compressed": str(cut), "output": checkpoint, "text": _paths(self.calibration)},
            "convert": {"source": str(checkpoint), "destination": here / _DCP_NAME},
            "benchmark": {**pair, "output": here / "benchmark.json", "overwrite": True},
            "eval": self._eval_places(folder, str(checkpoint)),
        }
        about = {"model": model.name, "target": target, "method": combination.request.method, "label": label}
        about |= {"ratio": ratio, "repair": repair, "seed": seed}
        told = f", {repair}" if "recover" in steps else ""
        title = f"{model.name}, {100 * ratio:g}% of {target} by {label}{told}, seed {seed}"
        return Run(PRUNED, title, folder, settings, _placed(steps, places), about, (calibration,))

    def _pruning_steps(self, combination: Combination, seed: int) -> dict[str, Request]:
        recipe, device = self.recipe, self.recipe.recover.device
        steps: dict[str, Request] = {"prune": replace(combination.request, recover=None, seed=seed, device=device)}
        if combination.repair != NO_REPAIR:
            # There are gradient steps in no other mode.
            without = {} if combination.repair == RECONSTRUCT else dict.fromkeys(("steps", "lr", "scope"))
            drawn = {"mode": combination.repair, "seed": recipe.calibration_seed(seed)}
            steps["recover"] = replace(recipe.recover, **drawn, **without)
        if recipe.convert:
            steps["convert"] = ConvertRequest()
        if recipe.benchmark is not None:
            steps["benchmark"] = recipe.benchmark
        return {**steps, "eval": recipe.heldout}

    def _eval_places(self, folder: str, model: str) -> dict:
        work, text = self.root / folder, _paths(self.heldout)
        # In the run's own folder there is no `pruned`, so that this one model alone is measured.
        return {"model": model, "work": work, "output": work / "eval.json", "text": text, "overwrite": True}


def _folder(
    kind: str, model: _Model, words: Sequence[object], steps: Mapping[str, Request], **texts: str
) -> tuple[str, dict]:
    """Return a run's folder, and what decides its result; the requests do not say yet where their files are."""
    requests = {name: request.to_json() for name, request in steps.items()}
    settings = {"keyreduce": __version__, "model": model.identity, **texts, "steps": requests}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    return f"{kind}/{slug(model.name, *words)}-{digest}", settings


def _placed(steps: Mapping[str, Request], places: Mapping[str, dict]) -> dict[str, Request]:
    """Return the requests with the fields that say where files are."""
    return {name: replace(request, **places[name]) for name, request in steps.items()}


def _paths(text: TextSource) -> tuple[Path, ...]:
    """Return the files and folders of a text; none of the one that comes with keyreduce."""
    return tuple(Path(os.path.realpath(path)) for path in text.describe().get("paths", ()))


def slug(*words: object) -> str:
    """Return words as the name of a folder: letters, digits and what no shell minds, at most 120 of them."""
    return re.sub(r"[^\w.+]+", "-", "-".join(map(str, words))).strip("-")[:120]


def run_sweep(
    runs: Sequence[Run],
    root: Path,
    *,
    about: dict,
    launch: Launch,
    workers: int,
    keep_checkpoints: bool = False,
    again: bool = False,
    progress: Callable[[int], None] = lambda amount: None,
) -> dict[str, str]:
    """Do the runs that have no result yet, those first that others need; return folder -> why, of those that failed.

    Before the first run, ``about`` and the list of runs are written into ``sweep.json``. ``launch`` runs ``workers``
    processes at a time. With ``keep_checkpoints`` the pruned checkpoints stay in the folders of the runs; with
    ``again`` the runs that are done are done again. ``progress`` is called with numbers of runs that have ended, or
    were done already.

    Raises:
        KeyreduceError: ``root`` holds something else, another sweep is at work there, or it cannot be written.
    """
    if root.is_dir() and not (root / SWEEP_NAME).is_file() and any(root.glob("[!.]*")):
        raise KeyreduceError(f"{root} holds other things than a sweep; give another `output`")
    failures: dict[str, str] = {}
    remove = [] if keep_checkpoints else [_CUT_NAME, _CHECKPOINT_NAME, _DCP_NAME]
    keep = {f"{_CHECKPOINT_NAME}/{RECORD_NAME}": RECORD_NAME}
    with claimed(root / SWEEP_NAME, folder=False):
        versions = {"keyreduce": __version__, "python": platform.python_version(), "torch": torch.__version__}
        record = {**about, "versions": versions, "runs": [run.to_json() for run in runs]}
        write_json(root / SWEEP_NAME, record, overwrite=True)
        for stage in ([run for run in runs if run.kind != PRUNED], [run for run in runs if run.kind == PRUNED]):
            folders: dict[Path, str] = {}
            for run in stage:
                folder = root / run.folder
                if is_done(folder) and not again:
                    continue
                write_task(folder, run.steps, result={"settings": run.settings}, keep=keep, remove=remove)
                reasons = [failures[needed] for needed in run.needs if needed in failures]
                if reasons:
                    failures[run.folder] = f"its calibration failed: {reasons[0]}"
                    write_failure(folder, failures[run.folder])
                else:
                    folders[folder] = run.folder
            progress(len(stage) - len(folders))
            failed = do_tasks([*folders], root / "logs", launch, workers, together=_TOGETHER, progress=progress)
            failures |= {folders[folder]: why for folder, why in failed.items()}
    return failures
