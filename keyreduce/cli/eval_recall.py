"""The part of ``keyreduce eval`` that is about recall: its options' values, and its tables."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keyreduce.cli.console import Console
    from keyreduce.evaluation.recall import Cell, RecallSettings


def recall_settings(kinds: str, lengths: str, pairs: str, probes: int, seed: int) -> "RecallSettings":
    """Read the options' values.

    Raises:
        KeyreduceError: one of them is of no use.
    """
    from keyreduce.evaluation.recall import RecallSettings

    return RecallSettings(
        tuple(kind.strip() for kind in kinds.split(",")),
        _numbers("--recall-lengths", lengths),
        _numbers("--recall-pairs", pairs),
        probes,
        seed,
    )


def _numbers(option: str, value: str) -> tuple[int, ...]:
    from keyreduce.errors import KeyreduceError

    try:
        return tuple(int(number) for number in value.split(","))
    except ValueError:
        raise KeyreduceError(f"{option} is {value!r}; give whole numbers with commas between them") from None


def tell_left_out(console: "Console", left_out: "list[Cell]") -> None:
    """Name the cells of the grid that have no room for their pairs."""
    if left_out:
        cells = ", ".join(f"{cell.kind} of {cell.pairs} in {cell.length} tokens" for cell in left_out)
        console.note(f"left out of --recall, as the pairs do not fit: {cells}")


def show_recall(console: "Console", entries: list[dict]) -> None:
    """Print a table a kind: for each cell of the grid a row a model."""
    from keyreduce.evaluation.probes import CHOICES
    from keyreduce.evaluation.recall import KINDS

    for kind, cells in entries[0]["recall"].items():
        rows = []
        for number, cell in enumerate(cells):
            place = (f"{cell['length']:,}", str(cell["pairs"]))
            for entry in entries:
                told = entry["recall"][kind][number]
                shares = (f"{told[name]:.1%}" for name in ("accuracy", "choice_accuracy"))
                rows.append((*place, entry["label"], *shares, f"{told['rank']:,.1f}", f"{told['log_probability']:.2f}"))
                place = ("", "")
        header = ("tokens", "pairs", "", "right", f"right of {CHOICES}", "mean rank", "log-probability")
        console.table(f"{KINDS[kind]}, {cells[0]['probes']} sequences a row", header, rows)
