"""The picture of a search: what each candidate costs, against the bytes of its state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keyreduce.outputs import appearing

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")  # of the palette of Okabe and Ito
_MARKERS = "os^Dv*"
_LEAST = 1e-4  # a loss below it is drawn at the foot


def draw_search(found: Mapping, model: str, path: Path) -> None:
    """Draw what :meth:`keyreduce.pruning.search.Found.to_json` holds, and write it as PNG.

    Above: the predicted loss against the bytes of the state: of the candidates, and as lines the least that any sizes
    have at so many bytes. Below, where the best few were measured: their increase in perplexity, with twice its
    standard error, by the key channels that they keep. The choice has a ring.

    Raises KeyreduceError if the file cannot be written.
    """
    is_measured = found["search"] == "measured"
    figure = Figure(figsize=(7.5, 7.5 if is_measured else 4.2), layout="constrained")
    panels = figure.subplots(2 if is_measured else 1, 1, squeeze=False)[:, 0]
    how = f", {found['recover']} to follow" if found["recover"] else ""
    figure.suptitle(f"{model}: cuts that fit into the budget{how}")
    colours = {dtype: number for number, dtype in enumerate(found["frontier"])}
    _draw_predicted(panels[0], found, colours)
    if is_measured:
        _draw_measured(panels[1], found, colours)
    with appearing(path, folder=False, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _draw_predicted(panel: Axes, found: Mapping, colours: Mapping[str, int]) -> None:
    for dtype, points in found["frontier"].items():
        sizes, losses = [size / 2**10 for size, _ in points], [max(_LEAST, loss) for _, loss in points]
        panel.plot(sizes, losses, "-", color=_COLOURS[colours[dtype] % len(_COLOURS)], lw=1.5, alpha=0.6)
    for dtype, rows in _by_format(found["candidates"]).items():
        colour, marker = _COLOURS[colours[dtype] % len(_COLOURS)], _MARKERS[colours[dtype] % len(_MARKERS)]
        places, losses = [row["state_bytes"] / 2**10 for row in rows], [row["predicted"] for row in rows]
        panel.scatter(places, losses, s=18, color=colour, marker=marker, label=f"state in {dtype}")
    chosen = found["chosen"]
    panel.scatter([chosen["state_bytes"] / 2**10], [chosen["predicted"]], s=180, fc="none", ec="black", label="chosen")
    panel.set_xlabel("state of a sequence in all layers (KiB); lines: the least predicted loss at any size")
    panel.set_ylabel("predicted loss (no unit)")
    panel.set_yscale("log")
    panel.legend()


def _draw_measured(panel: Axes, found: Mapping, colours: Mapping[str, int]) -> None:
    measured = [row for row in found["candidates"] if "perplexity_increase" in row]
    for dtype, rows in _by_format(measured).items():
        rows = sorted(rows, key=lambda row: row["head_k_dim"])
        panel.errorbar(
            [row["head_k_dim"] for row in rows],
            [100 * row["perplexity_increase"] for row in rows],
            yerr=[200 * row["perplexity_error"] for row in rows],
            fmt=f"{_MARKERS[colours[dtype] % len(_MARKERS)]}-",
            color=_COLOURS[colours[dtype] % len(_COLOURS)],
            capsize=3,
            lw=1,
            label=f"state in {dtype}",
        )
        for row in rows:
            place = (row["head_k_dim"], 100 * row["perplexity_increase"])
            label = f"{row['key_heads']} heads, {row['head_k_dim']}x{row['head_v_dim']}"
            panel.annotate(label, place, xytext=(6, 6), textcoords="offset points", fontsize=7, rotation=30)
    chosen = found["chosen"]
    place = [chosen["head_k_dim"]], [100 * chosen["perplexity_increase"]]
    panel.scatter(*place, s=180, fc="none", ec="black", label="chosen", zorder=3)
    panel.margins(0.2, 0.2)
    panel.set_xlabel("key channels that stay in a head")
    panel.set_ylabel("perplexity over dense (%), measured")
    panel.legend()


def _by_format(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    found: dict[str, list[Mapping]] = {}
    for row in rows:
        found.setdefault(row["state_dtype"], []).append(row)
    return found
