"""The table of a sweep as Markdown, CSV and LaTeX, and as text cells for the page."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from keyreduce.sweep.recipe import NO_REPAIR
from keyreduce.sweep.results import MeanSpread, Results, Row

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
}


class Section(NamedTuple):
    """The table of one model.

    Attributes:
        title: what stands over it.
        header: of its columns; the first ones name, those after ``names`` are figures.
        names: how many columns name.
        rows: cells, a list for each way of pruning.
        best: numbers of the rows with the lowest perplexity of their target and ratio, as it is written.
        starts: numbers of the rows before which there is some room: where another method begins, or, if none has two
            rows, another target.
    """

    title: str
    header: list[str]
    names: int
    rows: list[list[str]]
    best: set[int]
    starts: set[int]


def sections(results: Results) -> list[Section]:
    """Return a table for each model, in text cells."""
    return [_section(results, model) for model in dict.fromkeys([*results.dense, *(row.model for row in results.rows)])]


def notes(results: Results) -> list[str]:
    """Return what is to be said below the tables, sentence by sentence."""
    said = []
    counts = {row.seeds for row in results.rows}
    if counts - {1}:
        least, most = min(counts), max(counts)
        seeds = f"{most} seeds" if least == most else f"{least} to {most} seeds"
        said.append(f"Mean ± sample standard deviation over {seeds}.")
    said.append("Bold: the lowest perplexity of its target and share removed.")
    said.append(
        "State: bytes of recurrent state, over the dense model's. Seconds: wall time of prune, and of recover after it."
    )
    timing = results.record.get("timing")
    if results.kinds and timing:
        told = "Speedups: time of the dense model over the pruned one's, median of all runs of the same sizes"
        told += f", on {results.record.get('device', '?')}"
        rows = " and ".join(kind for kind in results.kinds if kind != "decode")
        sequences = max(timing["decode_batch_sizes"])
        inputs = {
            rows: f"{timing['batch_size']} x {timing['seq_len']} tokens",
            "decode" if "decode" in results.kinds else "": f"{sequences} sequence{'s' if sequences > 1 else ''}",
        }
        told += "; " + ", ".join(f"{kind} with {size}" for kind, size in inputs.items() if kind)
        several = " and several processes at once, which disturb each other" if _is_disturbed(results.record) else ""
        said.append(f"{told}{several}.")
    return said


def markdown(results: Results) -> str:
    """Return all tables as Markdown."""
    parts = []
    for section in sections(results):
        header = [_pipe(name) for name in section.header]
        rule = ["---"] * section.names + ["---:"] * (len(header) - section.names)
        lines = [header, rule]
        for number, cells in enumerate(section.rows):
            lines.append([_bold_markdown(section, number, column, _pipe(cell)) for column, cell in enumerate(cells)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{_pipe(section.title)}**\n\n{table}")
    parts.append(" ".join(notes(results)))
    if results.failed:
        failed = [f"- {_pipe(title)}: {_pipe(why)}" for title, why in results.failed.items()]
        parts.append("Failed:\n\n" + "\n".join(failed))
    if results.waiting:
        parts.append(f"Runs that are not done yet: {len(results.waiting)}.")
    return "\n\n".join(parts) + "\n"


def latex(results: Results) -> str:
    """Return all tables as LaTeX, for the packages booktabs and, where they are wide, graphicx."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage{graphicx}."]
    for section in sections(results):
        columns = "l" * section.names + "r" * (len(section.header) - section.names)
        lines = [_latex_line(section.header), r"\midrule"]
        for number, cells in enumerate(section.rows):
            if number in section.starts:
                lines.append(r"\addlinespace")
            escaped = [_escape(cell) for cell in cells]
            if number in section.best:
                escaped[_PERPLEXITY] = rf"\textbf{{{escaped[_PERPLEXITY]}}}"
            lines.append(" & ".join(escaped) + r" \\")
        body = "\n".join(lines)
        caption = _escape(f"{section.title}. {' '.join(notes(results))}")
        parts.append(
            f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\medskip\n"
            f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n"
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}}}\n\\end{{table}}"
        )
    return "\n\n".join(parts) + "\n"


def as_csv(results: Results) -> str:
    """Return all figures, unrounded, a line for each way of pruning; a spread that there is not is an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    plain = ("model", "target", "method", "label", "repair", "ratio", "seeds", "dense", "state")
    figures = ("perplexity", "increase", "bits_per_byte", "seconds")
    kinds = results.kinds
    header = [*plain[:-2], "dense_perplexity", "state_share"]
    for name in (*figures, *(f"{kind}_speedup" for kind in kinds)):
        header += [name, f"{name}_spread"]
    writer.writerow(header)
    for row in results.rows:
        cells = [getattr(row, name) for name in plain]
        nothing = MeanSpread(math.nan, None)
        for figure in (*(getattr(row, name) for name in figures), *(row.speedups.get(kind, nothing) for kind in kinds)):
            cells += list(figure)
        writer.writerow(["" if cell is None or cell != cell else cell for cell in cells])
    return file.getvalue()


_PERPLEXITY = 4  # the column that is set in bold


def _section(results: Results, model: str) -> Section:
    rows = [row for row in results.rows if row.model == model]
    kinds = results.kinds
    header = ["target", "method", "repair", "removed", "perplexity", "over dense", "bits per byte", "state"]
    header += [f"{kind} speedup" for kind in kinds] + ["seconds"]
    lowest: dict[tuple, float] = {}
    for row in rows:
        of = (row.target, row.ratio)
        lowest[of] = min(lowest.get(of, math.inf), row.perplexity.mean)
    best = {
        number
        for number, row in enumerate(rows)
        if math.isfinite(row.perplexity.mean)
        and number_of(row.perplexity.mean) == number_of(lowest[row.target, row.ratio])
    }
    groups = [(row.target, row.label) for row in rows]
    if len(set(groups)) == len(groups):
        groups = [row.target for row in rows]
    starts = {number for number in range(1, len(rows)) if groups[number] != groups[number - 1]}
    title = model
    if model in results.dense:
        perplexity, bits = results.dense[model]
        title += f" (dense: perplexity {number_of(perplexity)}, {bits:.3f} bits per byte)"
    return Section(title, header, 3, [_cells(row, kinds) for row in rows], best, starts)


def _cells(row: Row, kinds: Sequence[str]) -> list[str]:
    return [
        row.target,
        row.label,
        "" if row.repair == NO_REPAIR else row.repair,
        f"{100 * row.ratio:g}%",
        _with_spread(row.perplexity, number_of),
        _with_spread(row.increase, _decimals(1, 100), signed=True) + "%",
        _with_spread(row.bits_per_byte, _decimals(3)),
        "" if math.isnan(row.state) else f"{100 * row.state:.0f}%",
        *(_with_spread(row.speedups[kind], _decimals(2)) if kind in row.speedups else "" for kind in kinds),
        _with_spread(row.seconds, _decimals(1)),
    ]


def number_of(perplexity: float, like: float | None = None) -> str:
    """Return a perplexity with as many digits as tell something; a spread with as many as its mean has."""
    size = perplexity if like is None else like
    if size < 1e6:
        return f"{perplexity:,.{3 if size < 100 else 1 if size < 10_000 else 0}f}"
    return f"{perplexity:.3g}"


def _with_spread(figure: MeanSpread, form: Callable[..., str], *, signed: bool = False) -> str:
    sign = "+" if signed and figure.mean >= 0 else ""
    spread = "" if figure.spread is None else f" ± {form(figure.spread, figure.mean)}"
    return f"{sign}{form(figure.mean)}{spread}"


def _decimals(number: int, factor: float = 1) -> Callable[..., str]:
    return lambda value, _=None: f"{factor * value:,.{number}f}"


def _is_disturbed(record: dict) -> bool:
    return not str(record.get("device", "")).startswith("cuda") and record.get("jobs", 1) > 1


def _bold_markdown(section: Section, number: int, column: int, cell: str) -> str:
    return f"**{cell}**" if column == _PERPLEXITY and number in section.best else cell


def _pipe(text: str) -> str:
    """Escape what ends a cell, or is no plain text."""
    return re.sub(r"([|\\`*<])", r"\\\1", text)


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(_escape(cell) for cell in cells) + r" \\"


def as_json(results: Results) -> dict:
    """Return all figures as JSON: ``dense``, ``rows``, what has ``failed`` and what is ``waiting``."""
    rows = []
    for row in results.rows:
        entry = dataclasses.asdict(row)
        entry |= {name: value._asdict() for name, value in vars(row).items() if isinstance(value, MeanSpread)}
        entry["speedups"] = {kind: figure._asdict() for kind, figure in row.speedups.items()}
        rows.append({name: None if value != value else value for name, value in entry.items()})
    dense = {model: {"perplexity": costs[0], "bits_per_byte": costs[1]} for model, costs in results.dense.items()}
    return {"dense": dense, "rows": rows, "failed": results.failed, "waiting": results.waiting}
