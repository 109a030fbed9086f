"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), in this process."""

import contextlib
import copy
import difflib
import json
import logging
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keyreduce import __version__
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.record import Record
from keyreduce.errors import KeyreduceError, reason
from keyreduce.evaluation.perplexity import refuse_not_finite
from keyreduce.models.loading import LoadedModel
from keyreduce.outputs import appearing
from keyreduce.processes import Processes

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PAPER = "paper"
# The tasks of arXiv:2602.04852, each with the metric that the tables of DeltaNet and its successors show of it.
PAPER_TASKS = {
    "wikitext": "word_perplexity",
    "lambada_openai": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
}
PROVENANCE = "keyreduce"

_LIBRARIES = ("torch", "transformers", "flash-linear-attention", "lm_eval", "datasets")


class Tasks(NamedTuple):
    """Tasks that exist: their names, and the manager of the harness that builds them."""

    names: tuple[str, ...]
    manager: "TaskManager"


class TaskMetric(NamedTuple):
    """One metric of a task or group: its name, with the filter after a comma unless that is ``none``, and its value.

    Value and standard error are None where they are not finite, or no numbers.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Look up tasks by name, without reading their data or any model; it takes seconds.

    Args:
        names: tasks, groups, tags, patterns such as ``mmlu_*``, or ``.yaml`` files; ``paper`` is for `PAPER_TASKS`.
        include_path: a folder with further tasks, which replace those of the harness that have the same name.

    Raises:
        KeyreduceError: the harness is not installed, there is no such folder or task, or torchrun runs several
            processes: the harness does not distribute the work on a model that it is given.
    """
    if Processes.of_torchrun().number > 1:
        raise KeyreduceError("`tasks` run in one process: leave out torchrun; `base` takes several models at a time")
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise KeyreduceError(
            f"`tasks` needs lm-evaluation-harness ({reason(error)}); pip install 'keyreduce[harness]'"
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise KeyreduceError(f"there is no folder {include_path} of tasks")
    with _quiet():
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    wanted = [one for name in names for one in (PAPER_TASKS if name == PAPER else [name])]
    found = [task for name in wanted for task in _match(name, manager)]
    if not found:
        raise KeyreduceError("name a task of lm-evaluation-harness, or paper for those of the paper")
    return Tasks(tuple(dict.fromkeys(found)), manager)


def run_tasks(
    loaded: LoadedModel,
    tasks: Tasks,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 1,
    command: str | None = None,
) -> dict:
    """Run the tasks that :func:`find_tasks` found on a model, as ``lm_eval --model hf`` would, with its seeds.

    Args:
        num_fewshot: examples before each question; None leaves it to the task.
        limit: take only so many documents of each task, or that share of them where it is below 1.
        command: the command line, for the record.

    Returns:
        The content of the results file that ``lm_eval --output_path`` writes, unchanged, with one more key,
        ``keyreduce``: the model, its identity as in ``keyreduce.json``, versions and command.

    Raises:
        KeyreduceError: the harness stopped, as it does where the data of a task is not available; or a logit is NaN or
            inf.
    """
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    settings: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    provenance = _provenance(loaded, {"tasks": list(tasks.names), **settings}, command)
    # A choice or a perplexity of the harness would hide logits that are not finite.
    hook = loaded.model.register_forward_hook(
        lambda module, arguments, output: refuse_not_finite(output.logits, f"the logits of {loaded.folder}")
    )
    try:
        with _quiet(), tempfile.TemporaryDirectory(prefix="keyreduce-") as folder:
            tracker = EvaluationTracker(output_path=str(Path(folder, "results.json")))
            # A copy, since the harness gives the tokenizer a padding token where it has none.
            wrap: Any = HFLM
            evaluate: Any = lm_eval.simple_evaluate
            wrapped = wrap(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=batch_size)
            results = evaluate(
                model=wrapped,
                model_args={"pretrained": str(loaded.folder), "dtype": str(loaded.model.dtype).removeprefix("torch.")},
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                device=str(loaded.model.device),
                evaluation_tracker=tracker,
                **settings,
            )
            tracker.save_results_aggregated(results, results.pop("samples"))
            written = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    except KeyreduceError:
        raise
    except Exception as error:
        # Tasks are code and data of others, and the harness passes on whatever they raise.
        raise KeyreduceError(f"lm-evaluation-harness stopped: {reason(error)}") from error
    finally:
        hook.remove()
    if not written:
        raise KeyreduceError("lm-evaluation-harness could not save its results; make room for temporary files")
    return written[0] | {PROVENANCE: provenance}


def write_results(target: Path, results: dict, *, overwrite: bool = False) -> None:
    """Write what :func:`run_tasks` returned, formatted as the harness does; the file appears whole or not at all."""
    with appearing(target, folder=False, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def task_metrics(results: dict) -> list[TaskMetric]:
    """Return all metrics of a results file, in its order."""
    found = []
    for task, entries in results["results"].items():
        for key, value in entries.items():
            metric, comma, filter_ = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = entries.get(f"{metric}_stderr,{filter_}")
                label = metric if filter_ == "none" else f"{metric},{filter_}"
                found.append(TaskMetric(task, label, _number(value), _number(stderr)))
    return found


def main_metrics(found: Sequence[TaskMetric]) -> list[TaskMetric]:
    """Return one metric of each task: for a task of the paper the one that its tables show, else the first."""
    main = {}
    for one in found:
        if one.task not in main or one.metric == PAPER_TASKS.get(one.task):
            main[one.task] = one
    return list(main.values())


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _match(name: str, manager: "TaskManager") -> list[str]:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise KeyreduceError(f"there is no file {name} of a task")
        return [os.path.abspath(name)]
    if found := manager.match_tasks([name]):
        return sorted(found)
    near = difflib.get_close_matches(name, manager.all_tasks, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise KeyreduceError(
        f"lm-evaluation-harness has no task {name!r}{meant} (lm_eval ls tasks lists them, `include_path` adds a folder)"
    )


def _provenance(loaded: LoadedModel, settings: dict, command: str | None) -> dict:
    found = {"model": str(loaded.folder), "identity": open_folder(loaded.folder).identity}
    if (dense := Record.read(loaded.folder).dense) is not None:
        found["dense"] = dense
    versions = {"keyreduce": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in _LIBRARIES}
    return {**found, **settings, "versions": versions, **({"command": command} if command else {})}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log, and send what it prints to stderr, since stdout is for the result."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
