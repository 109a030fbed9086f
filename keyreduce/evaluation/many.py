"""Every checkpoint below a folder, each measured by a ``keyreduce eval`` of its own."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from keyreduce import __version__
from keyreduce.checkpoint.find import open_model
from keyreduce.checkpoint.folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from keyreduce.checkpoint.source import METADATA_NAME
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.harness import Figure, main_figures
from keyreduce.jobs import Job, Outcome, keyreduce_command, run_jobs
from keyreduce.outputs import read_json, refuse_unwritable, write_json

INPUTS = "inputs"

_COSTS = ("perplexity_per_token", "perplexity_per_word", "bits_per_byte")
# The harness's bars would fill the logs.
_ENVIRONMENT = {"TQDM_MININTERVAL": "60"}


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
        name: what tables call it, and its files are named after; it may hold slashes.
        model: where it is, as ``--model`` takes it.
    """

    name: str
    model: str


@dataclass(frozen=True)
class Measured:
    """What became of a subject.

    Attributes:
        subject: the model.
        state: ``measured``; ``kept``, where an earlier run had measured this very model in the same way; or ``failed``.
        result: the file of its figures, as ``keyreduce eval`` writes it.
        message: why it failed, or nothing.
        figures: what was measured: figure -> number. Of each task of lm-evaluation-harness there is one figure.
    """

    subject: Subject
    state: str
    result: Path
    message: str
    figures: Mapping[str, float]


def find_checkpoints(base: Path) -> list[Subject]:
    """Return every checkpoint at or below a folder, by name: Hugging Face folders, and all steps of a DCP.

    Hidden folders are passed over: they hold what has not been finished. Links are followed.

    Raises:
        KeyreduceError: there is no such folder, or no checkpoint in it.
    """
    base = Path(base)
    if not base.is_dir():
        raise KeyreduceError(f"there is no folder {base} of checkpoints")
    found, seen = [], set()
    for folder, subfolders, files in os.walk(base, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()  # a link to what was walked already
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        is_hf = CONFIG_NAME in files and (SINGLE_NAME in files or INDEX_NAME in files)
        if is_hf or METADATA_NAME in files:
            name = Path(folder).relative_to(base).as_posix()
            found.append(Subject(base.resolve().name if name == "." else name, folder))
    if not found:
        raise KeyreduceError(f"{base} holds no checkpoint: neither a Hugging Face folder with safetensors nor a DCP")
    return sorted(found)


def measure_all(
    subjects: Sequence[Subject],
    results: Path,
    arguments: Sequence[str],
    *,
    settings: Mapping[str, object],
    environment: Mapping[str, str] | None = None,
    workers: int | None = None,
    devices: Sequence[str] = (),
    again: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Measure models by child processes, several at a time; one that fails does not stop the others.

    The figures of a model called ``a/b`` are in ``results/a/b.json``, with what they were made from under ``inputs``;
    what its process said is in ``a/b.log``, and what else it wrote in ``a/b.files``. A model whose file is there
    already and was made from the same inputs is left as it is.

    Args:
        subjects: the models.
        results: the folder of the results.
        arguments: options of ``keyreduce eval`` that say how to measure.
        settings: what else decides the figures, such as the identity of the text, as JSON.
        environment: variables for the processes.
        workers: how many at a time, and
        devices: on which GPUs, as :func:`keyreduce.jobs.run_jobs` takes them.
        again: whether to measure what is done as well.
        progress: called as each model is over, with 1.

    Returns:
        What became of each: the best perplexity first, then by name; those that failed at the end.

    Raises:
        KeyreduceError: the results cannot be written.
    """
    tell = progress or (lambda amount: None)
    over: list[Measured] = []
    jobs: dict[str, tuple[Job, Subject, dict]] = {}
    for subject in subjects:
        result = results / f"{subject.name}.json"
        refuse_unwritable(result, folder=False)
        try:
            identity = open_model(subject.model).identity
        except KeyreduceError as error:
            over.append(Measured(subject, "failed", result, str(error), {}))
            tell(1)
            continue
        inputs = {"identity": identity, "arguments": list(arguments), **settings, "keyreduce": __version__}
        if not again and _inputs_of(result) == inputs:
            over.append(Measured(subject, "kept", result, "", figures_of(read_json(result))))
            tell(1)
            continue
        job = Job(
            subject.name,
            keyreduce_command(
                "eval",
                *("--model", subject.model, "--work", results / f"{subject.name}.files"),
                *("--output", result, "--overwrite"),
                *arguments,
            ),
            results / f"{subject.name}.log",
            {**_ENVIRONMENT, **(environment or {})},
        )
        jobs[subject.name] = (job, subject, inputs)

    def ended(outcome: Outcome) -> None:
        _, subject, inputs = jobs[outcome.job.name]
        over.append(_finish(outcome, subject, results / f"{subject.name}.json", inputs))
        tell(1)

    run_jobs([job for job, *_ in jobs.values()], workers=workers, devices=devices, progress=ended)
    return sorted(over, key=_order)


def figures_of(report: dict) -> dict[str, float]:
    """Return the figures that a table shows of a result: those of its first model, and one for each task."""
    (entry, *_) = report["models"]
    found = {name: entry[name] for name in _COSTS if entry.get(name) is not None}
    for figure in main_figures([Figure(**figure) for figure in entry.get("tasks", [])]):
        if figure.value is not None:
            found[f"{figure.task} {figure.metric}"] = figure.value
    return found


def _finish(outcome: Outcome, subject: Subject, result: Path, inputs: dict) -> Measured:
    if not outcome.ok:
        return Measured(subject, "failed", result, outcome.message, {})
    try:
        report = read_json(result)
        write_json(result, report | {INPUTS: inputs}, overwrite=True)
        return Measured(subject, "measured", result, "", figures_of(report))
    except KeyreduceError as error:
        return Measured(subject, "failed", result, str(error), {})


def _inputs_of(result: Path) -> object:
    """Return what an earlier result was made from; None where there is none, or it is damaged, so that it is redone."""
    try:
        report = read_json(result)
        figures_of(report)
        return report.get(INPUTS)
    except (KeyreduceError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _order(measured: Measured) -> tuple:
    cost = measured.figures.get("perplexity_per_token", math.inf)
    return measured.state == "failed", cost, measured.subject.name
