"""Models and text to perplexity, recall, and the metrics of lm-evaluation-harness."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyreduce.api import options
from keyreduce.api.pair import load_pair
from keyreduce.api.request import Report, option
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import claimed, refuse_existing, write_json
from keyreduce.processes import Processes, command_line
from keyreduce.reporting import Reporter
from keyreduce.serving.state_formats import StateChoice

if TYPE_CHECKING:
    from keyreduce.data.text import TextSource
    from keyreduce.evaluation.harness import Tasks
    from keyreduce.evaluation.perplexity import Perplexity
    from keyreduce.evaluation.recall import RecallProbes, RecallSettings
    from keyreduce.evaluation.state_precision import StateSettings
    from keyreduce.models.loading import LoadedModel

_RECALL = {"panel": "Recall"}
_STATES = {"panel": "Precision of the state"}
_TASKS = {"panel": "Tasks of lm-evaluation-harness"}
_MANY = {"panel": "Many models"}
_AUTO_FORMATS = ("bfloat16", "float16", "fp8", "int8")  # which auto chooses from where no others are named


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(options.OfRun, options.OfText, options.OfPair):
    """Measure held-out perplexity, and recall, of the dense and of the pruned model.

    Text is taken in its own order: --seed draws what --recall asks, and nothing else.

    Under torchrun the processes divide the batches, and the figures stay the same.
    """

    compressed: str | None = options.compressed(instead_of=("base",))
    num_batches: int = options.num_batches(8, "Batches to measure on; 0 takes all the text.", minimum=0)
    batch_size: int = options.batch_size(4)
    seq_len: int = options.seq_len(1024, minimum=2)
    stride: int | None = option(
        None,
        "Tokens between the starts of rows; the last N are scored.",
        metavar="N",
        minimum=1,
        shown_default="no overlap",
    )
    by_document: bool = option(False, "Score each document whole and alone, as lm-evaluation-harness does.")
    recall: tuple[Literal["mqar", "needle"], ...] = option(
        (),
        "Multi-query associative recall, a needle in a haystack of text, or both: mqar,needle.",
        commas=True,
        **_RECALL,
    )
    recall_lengths: tuple[int, ...] = option(
        (256, 1024), "Tokens in a sequence.", metavar="T,...", **_RECALL, **options.COUNTS
    )
    recall_pairs: tuple[int, ...] = option(
        (1, 4, 16, 64), "Keys with a value in a sequence.", metavar="N,...", **_RECALL, **options.COUNTS
    )
    recall_probes: int = option(16, "Sequences for each length and number of pairs.", **_RECALL, **options.COUNT)
    state_dtype: tuple[StateChoice, ...] = option(
        (),
        "Keep the state in these too: float32, bfloat16, float16, fp8, int8, int4; auto: the cheapest a head.",
        commas=True,
        metavar="DTYPE,...",
        **_STATES,
    )
    state_chunk: int | None = option(
        None, "Round it after every N tokens, as in prefill.", metavar="N", shown_default="each token", **_STATES,
        **options.COUNT,
    )  # fmt: skip
    state_tolerance: float = option(0.001, "Increase in perplexity that auto may cost.", minimum=0, **_STATES)
    tasks: tuple[str, ...] = option(
        (),
        "Names, patterns or .yaml files; 'paper' is wikitext, lambada_openai, piqa, hellaswag, winogrande, arc_easy, "
        "arc_challenge.",
        env="TASKS",
        metavar="NAME,...",
        commas=True,
        **_TASKS,
    )
    include_path: Path | None = option(None, "A folder with tasks of your own.", metavar="DIR", **_TASKS)
    num_fewshot: int | None = option(
        None, "Examples before a question.", metavar="N", minimum=0, shown_default="the task's own", **_TASKS
    )
    limit: float | None = option(
        None,
        "Documents of each task; below 1 a share of them.",
        metavar="N",
        shown_default="all",
        **_TASKS | options.COUNT | {"minimum": 0},
    )
    base: Path | None = option(
        None,
        "Measure each checkpoint below it, and --model if given.",
        env="COMPRESSED_BASE",
        metavar="DIR",
        instead_of=("compressed",),
        **_MANY,
    )
    jobs: int | None = option(
        None, "Models to measure at a time.", metavar="N", minimum=1, shown_default="one a GPU, else 1", **_MANY
    )
    output: Path | None = options.output("The figures as JSON.", metavar="FILE")
    dtype: options.Dtype | None = options.dtype()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit == 0:
            raise KeyreduceError("`limit` is 0; it is above 0")
        if self.state_chunk is not None and not self.state_dtype:
            raise KeyreduceError("`state_chunk` says when the state is rounded: give `state_dtype` too")
        if self.base is not None and self.compressed is not None:
            raise KeyreduceError("`base` measures a folder of models and `compressed` one: give one of the two")


def run(request: EvaluateRequest, reporter: Reporter = Reporter()) -> Report | None:
    """Measure the models, and write what was found; an earlier result in the work folder is replaced.

    Returns:
        None in all processes of torchrun but the first; what :func:`keyreduce.api.many.run` does, where the request has
        a ``base``; else ``text``, where the text is from; ``seq_len``; ``stride``; ``by_document``; ``models``: for
        each its ``label`` and ``folder``, :meth:`keyreduce.evaluation.perplexity.Perplexity.metrics`, but for the first
        one ``perplexity_increase`` over it, and where they were asked for ``recall``
        (:func:`keyreduce.evaluation.recall.recall_metrics`), ``precision``
        (:func:`keyreduce.evaluation.state_precision.state_metrics`), ``tasks`` and ``tasks_file``; and ``recall``, the
        settings of the recall probes, if there were any.

    Raises:
        KeyreduceError: a model does not load, the pruned one was not made from the dense one, the text leaves nothing
            to predict, a logit is NaN or inf, a task stopped, or the output cannot be written.
    """
    processes = Processes.of_torchrun()
    if request.base is not None:
        if processes.number > 1:
            raise KeyreduceError("`base` starts processes of its own: leave out torchrun, and see `jobs`")
        _check(request)
        from keyreduce.api.many import run as run_many

        return run_many(request, reporter)
    target = request.output or request.workspace.evaluation
    with contextlib.ExitStack() as stack:

        def measure() -> dict:
            refuse_existing(request.output, request.overwrite)
            stack.enter_context(claimed(target, folder=False, by_this_process=processes.rank == 0))
            return _measure(request, target, processes, reporter)

        # Whatever may fail is done in there, so that one process reports it for all.
        shares = processes.gather(measure)
        if processes.rank:
            return None
        result = _join(request, shares, reporter)
        write_json(target, result, overwrite=True)
    return Report(content=result, output=target)


def _check(request: EvaluateRequest) -> "tuple[RecallSettings | None, Tasks | None]":
    """Refuse settings that make no sense together, and look up the tasks, before any model is loaded."""
    from keyreduce.evaluation.harness import find_tasks
    from keyreduce.evaluation.perplexity import chosen_stride
    from keyreduce.evaluation.recall import RecallSettings

    chosen_stride(request.seq_len, request.stride, by_document=request.by_document)
    grid = request.recall, request.recall_lengths, request.recall_pairs, request.recall_probes, request.seed
    recall = RecallSettings(*grid) if request.recall else None
    return recall, find_tasks(request.tasks, request.include_path) if request.tasks else None


def _state_settings(request: EvaluateRequest, processes: Processes) -> "StateSettings | None":
    """Return in what formats the state is to be kept, or None where none was asked for."""
    from keyreduce.evaluation.state_precision import AUTO, EXACT, StateSettings

    if not request.state_dtype:
        return None
    is_auto = AUTO in request.state_dtype
    if is_auto and processes.number > 1:
        raise KeyreduceError("`state_dtype` auto measures one choice after another: leave out torchrun")
    formats = tuple(name for name in request.state_dtype if name not in (AUTO, EXACT))
    formats = formats or (_AUTO_FORMATS if is_auto else ())
    return StateSettings(formats, request.state_chunk, request.state_tolerance if is_auto else None)


def _measure(request: EvaluateRequest, target: Path, processes: Processes, reporter: Reporter) -> dict:
    """Return what this process's share of the batches gives, as a JSON object; what the tasks give, is written too."""
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.evaluation.harness import run_tasks, task_metrics, write_results
    from keyreduce.evaluation.recall import RecallProbes

    recall, tasks = _check(request)
    states = _state_settings(request, processes)
    text = request.text_source("heldout")
    device = pick_device(processes.device(request.device))
    models = load_pair(request, reporter, device, pick_dtype(request.dtype, device), each=True)
    entries: list[dict[str, Any]] = []
    for label, loaded in models.items():
        entry: dict[str, Any] = {"label": label, "folder": str(loaded.folder)}
        entry["rows"] = row_costs(request, loaded, text, reporter, processes, f"measuring {label}")
        probes = None
        if recall is not None:
            probes = RecallProbes(loaded, text, recall)
            if probes.left_out and not entries:
                cells = ", ".join(f"{cell.kind} of {cell.pairs} in {cell.length} tokens" for cell in probes.left_out)
                reporter.note(f"left out of recall, as the pairs do not fit: {cells}")
            with reporter.progress(f"asking {label}", probes.tokens // processes.number, "tokens") as progress:
                entry["recall"] = probes.ask(batch_size=request.batch_size, processes=processes, progress=progress)
        if states is not None:
            entry["precision"] = _measure_states(request, loaded, states, text, probes, reporter, processes, label)
        if tasks is not None:
            file = target.with_name(f"{target.stem}-tasks-{label}.json")
            how = {name: getattr(request, name) for name in ("num_fewshot", "limit", "batch_size")}
            with claimed(file, folder=False):
                reporter.note(f"running {', '.join(tasks.names)} on {label}")
                results = run_tasks(loaded, tasks, command=command_line(), **how)
                write_results(file, results, overwrite=True)
            entry |= {"tasks": [metric._asdict() for metric in task_metrics(results)], "tasks_file": str(file)}
        entries.append(entry)
    return {"text": text.describe(), "recall": recall and asdict(recall), "models": entries}


def row_costs(
    request: EvaluateRequest,
    loaded: "LoadedModel",
    text: "TextSource",
    reporter: Reporter,
    processes: Processes = Processes(),
    doing: str = "measuring",
) -> "list[Perplexity]":
    """Return what it costs a model to predict each row of this process; ``doing`` is what the reporter shows."""
    from keyreduce.evaluation.perplexity import text_costs

    how = _rows_of(request)
    tokens = (how["num_rows"] or 0) * request.seq_len // processes.number or None
    with reporter.progress(doing, tokens, "tokens") as progress:
        return text_costs(loaded, text, processes=processes, progress=progress, **how)


def _rows_of(request: EvaluateRequest) -> dict[str, Any]:
    """Return how the text is cut into rows, and how many are taken."""
    how = {name: getattr(request, name) for name in ("seq_len", "batch_size", "stride", "by_document")}
    return {"num_rows": request.num_batches * request.batch_size or None, **how}


def _measure_states(
    request: EvaluateRequest,
    loaded: "LoadedModel",
    states: "StateSettings",
    text: "TextSource",
    probes: "RecallProbes | None",
    reporter: Reporter,
    processes: Processes,
    label: str,
) -> dict:
    """Return what this process finds of the model with its state in other formats."""
    from keyreduce.evaluation.perplexity import text_batches
    from keyreduce.evaluation.state_precision import measure_states

    def ask(progress: Callable[[int], None]) -> list[dict]:
        assert probes is not None
        return probes.ask(batch_size=request.batch_size, processes=processes, progress=progress)

    batches = list(text_batches(loaded.tokenizer, text, processes=processes, **_rows_of(request)))
    more = {"ask": None if probes is None else ask, "processes": processes, "label": label}
    return measure_states(loaded, batches, states, request.seq_len, reporter, **more)


def _join(request: EvaluateRequest, shares: Sequence[dict], reporter: Reporter) -> dict:
    """Combine what all processes found."""
    from keyreduce.evaluation.perplexity import chosen_stride, total
    from keyreduce.evaluation.recall import recall_metrics
    from keyreduce.evaluation.state_precision import state_metrics

    models: list[dict[str, Any]] = []
    for parts in zip(*(share["models"] for share in shares), strict=True):
        first = parts[0]
        cost = total(row for part in parts for row in part["rows"])
        if cost.predictions < request.seq_len - 1 and not request.by_document:
            found = f"{cost.predictions + 1} tokens instead of {request.seq_len}"
            reporter.note(f"the text is shorter than one sequence: {found}")
        entry = {"label": first["label"], "folder": first["folder"], **cost.metrics()}
        if "recall" in first:
            entry["recall"] = recall_metrics(part["recall"] for part in parts)
        if "precision" in first:
            found = state_metrics([part["precision"] for part in parts], request.seq_len)
            entry["precision"] = {"chunk": request.state_chunk, **found}
        entry |= {name: first[name] for name in ("tasks", "tasks_file") if name in first}
        if models:
            dense, own = models[0]["perplexity_per_token"], entry["perplexity_per_token"]
            entry["perplexity_increase"] = own / dense - 1 if own and dense else None
        models.append(entry)
    stride = chosen_stride(request.seq_len, request.stride, by_document=request.by_document)
    rows = {"seq_len": request.seq_len, "stride": stride, "by_document": request.by_document}
    recall = {"recall": shares[0]["recall"]} if shares[0]["recall"] else {}
    return {"text": shares[0]["text"], **rows, "models": models, **recall}
