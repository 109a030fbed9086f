"""The picture of a search: what each candidate costs, against the bytes of its state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keyreduce.outputs import appearing

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")  # of the palette of Okabe and Ito
_MARKERS = "os^Dv*"


def draw_search(found: Mapping, model: str, path: Path) -> None:
    """Draw what :meth:`keyreduce.pruning.search.Found.to_json` holds, and write it as PNG.

    Above: the predicted loss of all candidates against the state's bytes, and the frontier: the least loss at that many
    bytes or fewer. Below, where the best few were measured: their increase in perplexity, with twice its standard
    error, beside the dense model. The choice has a ring.

    Raises KeyreduceError if the file cannot be written.
    """
    is_measured = found["search"] == "measured"
    figure = Figure(figsize=(7.5, 7.0 if is_measured else 4.0), layout="constrained")
    panels = figure.subplots(2 if is_measured else 1, 1, squeeze=False)[:, 0]
    how = f", then {found['recover']}" if found["recover"] else ""
    figure.suptitle(f"{model}: cuts that fit into the budget{how}")
    _draw_predicted(panels[0], found)
    if is_measured:
        _draw_measured(panels[1], found)
    with appearing(path, folder=False, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _draw_predicted(panel: Axes, found: Mapping) -> None:
    rows, chosen = found["candidates"], found["chosen"]
    for number, (dtype, of_dtype) in enumerate(_by_format(rows).items()):
        panel.plot(
            [row["head_k_dim"] for row in of_dtype],
            [row["predicted"] for row in of_dtype],
            _MARKERS[number % len(_MARKERS)],
            color=_COLOURS[number % len(_COLOURS)],
            label=f"state in {dtype}",
            alpha=0.8,
        )
    panel.plot(chosen["head_k_dim"], chosen["predicted"], "o", ms=15, mfc="none", mec="black", label="chosen")
    panel.set_xlabel("key channels that stay in a head")
    panel.set_ylabel("predicted loss (no unit)")
    panel.set_yscale("log")
    panel.legend()


def _draw_measured(panel: Axes, found: Mapping) -> None:
    measured = [row for row in found["candidates"] if "perplexity_increase" in row]
    chosen = found["chosen"]
    for number, (dtype, rows) in enumerate(_by_format(measured).items()):
        panel.errorbar(
            [row["state_bytes"] / 2**10 for row in rows],
            [100 * row["perplexity_increase"] for row in rows],
            yerr=[200 * row["perplexity_error"] for row in rows],
            fmt=_MARKERS[number % len(_MARKERS)],
            color=_COLOURS[number % len(_COLOURS)],
            capsize=3,
            label=f"state in {dtype}",
        )
    panel.plot(found["dense_state_bytes"] / 2**10, 0, "k+", ms=12, label="dense")
    frontier = _frontier([*measured, {"state_bytes": found["dense_state_bytes"], "perplexity_increase": 0.0}])
    panel.step(
        [row["state_bytes"] / 2**10 for row in frontier],
        [100 * row["perplexity_increase"] for row in frontier],
        where="post",
        color="grey",
        lw=1,
        zorder=0,
        label="frontier",
    )
    place = (chosen["state_bytes"] / 2**10, 100 * chosen["perplexity_increase"])
    panel.plot(*place, "o", ms=15, mfc="none", mec="black", label="chosen")
    for row in measured:
        label = f" {row['key_heads']} x {row['head_k_dim']}x{row['head_v_dim']}"
        panel.annotate(label, (row["state_bytes"] / 2**10, 100 * row["perplexity_increase"]), fontsize=8)
    panel.set_xlabel("state of a sequence in all layers (KiB)")
    panel.set_ylabel("perplexity over dense (%)")
    panel.legend()


def _frontier(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows than which no other has both fewer bytes and a smaller increase, by bytes."""
    best: list[Mapping] = []
    for row in sorted(rows, key=lambda row: (row["state_bytes"], row["perplexity_increase"])):
        if not best or row["perplexity_increase"] < best[-1]["perplexity_increase"]:
            best.append(row)
    return best


def _by_format(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    found: dict[str, list[Mapping]] = {}
    for row in rows:
        found.setdefault(row["state_dtype"], []).append(row)
    return found
