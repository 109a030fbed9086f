"""Models and text to the rank utilisation of their states, in numbers and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keyreduce.api import options
from keyreduce.api.pair import load_pair
from keyreduce.api.request import Report, option
from keyreduce.outputs import claimed, refuse_existing, write_json
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    from keyreduce.evaluation.kept import Kept
    from keyreduce.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class RankRequest(options.OfRun, options.OfText, options.OfPair):
    """Measure how much of its rank each head's state uses along the sequence, and draw it.

    Table and pictures have the stable rank of the state, the report has it as a share of the largest rank it could
    have. The pictures also show the channels that pruning kept, and the convolution kernels. Text is taken in its own
    order, so --seed changes nothing here.
    """

    num_batches: int = options.num_batches(4, "Batches to measure on; 0 takes all the text.", minimum=0)
    batch_size: int = options.batch_size(4)
    seq_len: int = options.seq_len(1024)
    every: int = option(64, "Tokens between two measurements of the states.", **options.COUNT)
    output: Path | None = options.output("The figures as JSON.", metavar="FILE")
    plot: Path | None = options.output("The pictures, as PNG; --overwrite replaces them too.", metavar="DIR", flags=())
    dtype: options.Dtype | None = options.dtype()


def run(request: RankRequest, reporter: Reporter = Reporter()) -> Report:
    """Measure the models, and write numbers and pictures; earlier ones in the work folder are replaced.

    Returns:
        ``text``, where the text is from; ``device``; ``seq_len``; ``every``; ``positions``, after how many tokens of a
        sequence the states were looked at; ``models``: for each its ``label`` and ``folder``, the number of
        ``sequences``, and ``layers`` (:meth:`keyreduce.evaluation.rank.StateRank.to_json`); and the paths of the
        ``pictures``.

    Raises:
        KeyreduceError: a model does not load, the pruned one was not made from the dense one, the text is empty, a
            state holds NaN or inf, or an output cannot be written or holds other files.
    """
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.data.batches import batches, token_rows
    from keyreduce.devices import device_name, pick_device, pick_dtype
    from keyreduce.evaluation.pictures import draw_folder, refuse_other_files
    from keyreduce.evaluation.rank import measure_rank

    workspace = request.workspace
    target, folder = request.output or workspace.rank, request.plot or workspace.rank_pictures
    refuse_existing(request.output, request.overwrite)
    refuse_existing(request.plot, request.overwrite)
    refuse_other_files(folder)
    with claimed(target, folder=False), claimed(folder, folder=True):
        text = request.text_source("heldout")
        device = pick_device(request.device)
        dtype = pick_dtype(request.dtype, device)
        models = load_pair(request, reporter, device, dtype)
        kept = _kept(models, reporter)
        num_rows = request.num_batches * request.batch_size or None
        tokens = (num_rows or 0) * request.seq_len or None
        positions: list[int] = []
        entries: list[dict] = []
        for label, loaded in models.items():
            rows = islice(token_rows(text.in_pieces(), loaded.tokenizer, request.seq_len), num_rows)
            with reporter.progress(f"measuring {label}", tokens, "tokens") as progress:
                found = measure_rank(loaded, batches(rows, request.batch_size), request.every, progress)
            is_last = len(entries) == len(models) - 1  # the pruned model, or the dense one, which lacks nothing
            heads = {layer: one.value_heads for layer, one in kept.items()} if is_last else {}
            positions = list(found.positions)
            entry = {"label": label, "folder": str(loaded.folder), "sequences": found.sequences}
            entries.append(entry | {"layers": found.to_json(heads)})
        if positions[-1] < request.seq_len:
            reporter.note(f"the text is shorter than one sequence: {positions[-1]} tokens instead of {request.seq_len}")
        with reporter.progress("drawing", None, "pictures"):
            report: dict[str, Any] = {"text": text.describe(), "device": device_name(device)}
            report |= {"seq_len": request.seq_len, "every": request.every}
            report |= {"positions": positions, "models": entries}
            names = draw_folder(folder, report, kept, open_folder(models["dense"].folder))
        report["pictures"] = [str(folder / name) for name in names]
        write_json(target, report, overwrite=True)
    return Report(content=report, output=target)


def _kept(models: "Mapping[str, LoadedModel]", reporter: Reporter) -> "dict[int, Kept]":
    """Return what the pruned model, which is the last one, kept of each layer of the dense one, where that is known."""
    from keyreduce.checkpoint.record import Record
    from keyreduce.evaluation.kept import is_cut_of, kept_channels

    (label, cut), dense = list(models.items())[-1], models["dense"]
    kept = kept_channels(Record.read(cut.folder)) if label != "dense" else {}
    sizes = [loaded.family.layer_sizes(loaded.model.config.to_dict()) for loaded in (dense, cut)]
    if kept and not is_cut_of(kept, *sizes):
        reporter.note(
            "the pruned model was not made from this dense one: its heads are counted, its channels not drawn"
        )
        return {}
    return kept
