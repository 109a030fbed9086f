"""``keyreduce eval --base``: every checkpoint below a folder, each measured by a process of its own."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from keyreduce import __version__
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.api.options import DEFAULT_WORK
from keyreduce.api.request import Report
from keyreduce.api.tasks import LOG_NAME, do_tasks, on_this_machine, write_task
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import claimed, read_json, refuse_existing, refuse_unwritable, write_json
from keyreduce.reporting import Reporter

_COSTS = ("perplexity_per_token", "perplexity_per_word", "bits_per_byte")
_INPUTS = "inputs"


def run(request: EvaluateRequest, reporter: Reporter = Reporter()) -> Report:
    """Measure each checkpoint below ``base``, and ``model`` where it is given, and write what was found.

    The metrics of a model called ``a/b`` are in ``eval/a/b.json`` in the work folder, and what else its process wrote
    is in ``eval/a/b.files``. A model that was measured before in the same way is not measured again.

    Returns:
        ``base``; ``text``, where the text is from; ``output``; and ``models``: for each its ``name``, the folder
        ``model``, its ``state``, and under ``figures`` a number for each metric. The state is ``measured``; ``kept``,
        where an earlier run had measured the model in the same way; or ``failed``. Models that failed have a
        ``message``, and a ``log`` where their process has begun; the others have a ``result``, the file that holds all
        of their metrics. The lowest perplexity comes first, and what failed is at the end.

    Raises:
        KeyreduceError: there is no checkpoint, or the output exists or cannot be written. A model that cannot be
            measured does not stop the others: see :func:`refuse_failed`.
    """
    from keyreduce.checkpoint.find import find_checkpoints
    from keyreduce.devices import pick_device

    if request.base is None:
        raise KeyreduceError("`base` is missing; it is a folder of checkpoints")
    workspace = request.workspace
    target, results = request.output or workspace.evaluation, workspace.root / "eval"
    refuse_existing(request.output, request.overwrite)
    text = request.text_source("heldout")
    models, dense = find_checkpoints(request.base), "dense"
    while dense in models:
        dense += "-model"
    if request.model is not None:
        models = {dense: request.model, **models}
    device = str(pick_device(request.device))
    launch, workers = on_this_machine(device, request.jobs)
    shared = {"base": None, "jobs": None, "compressed": None, "pruned": None, "device": device, "overwrite": True}
    # What decides the metrics beside the model and the text, whose hashes stand beside it.
    settings = replace(request, **shared, model=None, work=Path(DEFAULT_WORK), output=None, text=()).to_json()
    entries, tasks = [], {}
    with claimed(target, folder=False), reporter.progress("measuring", len(models), "models") as progress:
        for name, model in models.items():
            output, folder = results / f"{name}.json", results / f"{name}.files"
            refuse_unwritable(output, folder=False)
            inputs = {"settings": settings, "text": text.identity, "keyreduce": __version__}
            entry = {"name": name, "model": model, "result": str(output), _INPUTS: inputs}
            entries.append(entry)
            if not _is_settled(entry, again=request.overwrite):
                one = replace(request, **shared, model=model, work=folder, output=output)
                write_task(folder, {"eval": one})
                tasks[folder] = entry
        reporter.keep(f"the models in {results} that were measured; the same command measures the others")
        progress(len(models) - len(tasks))
        failures = do_tasks([*tasks], results / "logs", launch, workers, progress=progress)
        for folder, entry in tasks.items():
            _settle(entry, failures.get(folder), folder / LOG_NAME)
        _compare(entries, dense)
        for entry in entries:
            del entry[_INPUTS]
        report = {"base": str(request.base), "text": text.describe(), "models": sorted(entries, key=_order)}
        report["output"] = str(target)
        write_json(target, report, overwrite=True)
    return Report(content=report, output=target)


def refuse_failed(models: list[dict]) -> None:
    """Raise a KeyreduceError where models could not be measured, when all else is done."""
    failed = [entry for entry in models if entry["state"] == "failed"]
    if failed:
        first = failed[0]
        where = f"; see {first['log']}" if "log" in first else ""
        told = f"{len(failed)} of {len(models)} models could not be measured, {first['name']} among them"
        raise KeyreduceError(f"{told}: {first['message']}{where}")


def metrics_of(report: dict) -> dict[str, float]:
    """Return the metrics that a table shows of a result: those of its first model, and one for each task."""
    from keyreduce.evaluation.harness import TaskMetric, main_metrics

    entry = report["models"][0]
    found = {name: entry[name] for name in _COSTS if entry.get(name) is not None}
    for metric in main_metrics([TaskMetric(**metric) for metric in entry.get("tasks", [])]):
        if metric.value is not None:
            found[f"{metric.task} {metric.metric}"] = metric.value
    return found


def _is_settled(entry: dict[str, Any], *, again: bool) -> bool:
    """Return whether nothing is left to do for a model, and say in its entry why: it was measured, or cannot be."""
    from keyreduce.checkpoint.find import open_model

    try:
        entry[_INPUTS]["identity"] = open_model(entry["model"]).identity
    except KeyreduceError as error:
        _fail(entry, str(error))
        return True
    if again:
        return False
    try:
        report = read_json(Path(entry["result"]))
        entry |= {"state": "kept", "figures": metrics_of(report)}
        return report.get(_INPUTS) == entry[_INPUTS]
    except (KeyreduceError, AttributeError, LookupError, TypeError, ValueError):
        return False  # there is none, or it is damaged


def _settle(entry: dict[str, Any], failure: str | None, log: Path) -> None:
    """Complete the entry of a model whose process has ended, and write beside its metrics what they were made from."""
    output = Path(entry["result"])
    try:
        if failure is not None:
            raise KeyreduceError(failure)
        report = read_json(output)
        write_json(output, report | {_INPUTS: entry[_INPUTS]}, overwrite=True)
        entry |= {"state": "measured", "figures": metrics_of(report)}
    except KeyreduceError as error:
        _fail(entry, str(error))
        if log.is_file():
            entry["log"] = str(log)


def _fail(entry: dict[str, Any], message: str) -> None:
    entry.pop("result")
    entry |= {"state": "failed", "message": message, "figures": {}}


def _compare(entries: list[dict], dense: str) -> None:
    """Add the increase in perplexity over the dense model, where both were measured."""
    name = "perplexity_per_token"
    base = next((entry["figures"].get(name) for entry in entries if entry["name"] == dense), None)
    for entry in entries:
        if base and name in entry["figures"] and entry["name"] != dense:
            entry["figures"]["perplexity_increase"] = entry["figures"][name] / base - 1


def _order(entry: dict) -> tuple:
    return entry["state"] == "failed", entry["figures"].get("perplexity_per_token", math.inf), entry["name"]
