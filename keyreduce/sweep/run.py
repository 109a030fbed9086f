"""What a sweep does: it refuses what cannot be, then carries out in other processes each run that is not done yet."""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from keyreduce import __version__
from keyreduce.api.prune import Cut
from keyreduce.api.tasks import Launch, do_tasks, is_done, write_failure, write_task
from keyreduce.checkpoint.find import model_name, open_model
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import claimed, write_json
from keyreduce.recovery.overlap import refuse_overlap
from keyreduce.sweep.recipe import Recipe, named
from keyreduce.sweep.record import SWEEP_NAME
from keyreduce.sweep.runs import CHECKPOINT_NAME, CUT_NAME, DCP_NAME, PRUNED, Model, Planner, Run, Texts
from keyreduce.workspace import RECORD_NAME

_TOGETHER = 8  # runs that a process does: enough to make its start cheap, few enough to lose little when it dies


def plan_sweep(
    recipe: Recipe,
    root: Path,
    *,
    calibration: TextSource,
    heldout: TextSource,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Run]:
    """Return the runs of a sweep, after all models were checked for what a run would be refused for.

    Args:
        recipe: what to compare.
        root: the sweep's folder, by its real path.
        calibration, heldout: the texts.
        device, dtype: where models run, and what they compute in.

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
        models.append(Model(_short(name, recipe.models), model_name(name), source.identity))
    dtype_name = str(dtype).removeprefix("torch.")
    return Planner(recipe, _text(calibration), _text(heldout), str(device), dtype_name, root).runs(models)


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
    """Do the runs that have no result yet, those first that others need.

    Args:
        runs: as :func:`plan_sweep` returns them.
        root: the folder of the sweep; ``sweep.json`` is written there before the first run.
        about: what ``sweep.json`` says beside the list of runs.
        launch: what runs processes.
        workers: how many of them it runs at a time.
        keep_checkpoints: whether pruned checkpoints stay in the folders of the runs.
        again: whether runs that are done are done again.
        progress: called with numbers of runs that have ended, or were done already.

    Returns:
        Folder of a run -> why it has no result, of those that failed.

    Raises:
        KeyreduceError: ``root`` holds something else, another sweep is at work there, or it cannot be written.
    """
    if root.is_dir() and not (root / SWEEP_NAME).is_file() and any(root.glob("[!.]*")):
        raise KeyreduceError(f"{root} holds other things than a sweep; give another `output`")
    failures: dict[str, str] = {}
    remove = [] if keep_checkpoints else [CUT_NAME, CHECKPOINT_NAME, DCP_NAME]
    keep = {f"{CHECKPOINT_NAME}/{RECORD_NAME}": RECORD_NAME}
    with claimed(root / SWEEP_NAME, folder=False):
        versions = {"keyreduce": __version__, "python": platform.python_version(), "torch": torch.__version__}
        record = {**about, "versions": versions, "runs": [run.to_json() for run in runs]}
        write_json(root / SWEEP_NAME, record, overwrite=True)
        for stage in ([run for run in runs if run.kind != PRUNED], [run for run in runs if run.kind == PRUNED]):
            waiting = []
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
                    waiting.append(run)
            progress(len(stage) - len(waiting))
            folders = {root / run.folder: run.folder for run in waiting}
            failed = do_tasks([*folders], root / "logs", launch, workers, together=_TOGETHER, progress=progress)
            failures |= {folders[folder]: why for folder, why in failed.items()}
    return failures


def _text(text: TextSource) -> Texts:
    return Texts(tuple(Path(os.path.realpath(path)) for path in text.describe().get("paths", ())), text.identity)


def _short(name: str, names: Sequence[str]) -> str:
    """Return what tables call a model: the last part of its path, where no other model has the same."""
    last = Path(name).name or name
    return last if [Path(other).name for other in names].count(last) == 1 else name
