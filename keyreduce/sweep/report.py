"""The files that show a sweep's results: tables as Markdown, CSV and LaTeX, pictures, and one page of all that."""

import base64
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from keyreduce.drawing import save_picture
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import appearing
from keyreduce.sweep.plots import draw_pareto, draw_perplexity
from keyreduce.sweep.recipe import NO_REPAIR
from keyreduce.sweep.results import Results

NAMES = ("table.md", "table.csv", "table.tex", "perplexity.png", "pareto.png", "table.html")
_NAMING = 3  # columns that name a way of pruning; those after them are figures
_PERPLEXITY = 4  # the column that is set in bold
_LATEX_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_LATEX = {character: f"\\text{name}{{}}" for character, name in _LATEX_NAMES.items()}
_LATEX |= {"±": r"$\pm$", '"': "''", **{character: f"\\{character}" for character in "&%$#_{}"}}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .45rem; text-align: right; }
td { white-space: nowrap; }
th { border-bottom: 2px solid; vertical-align: bottom; } tbody tr:nth-child(even) { background: #8881; }
tr.first td { border-top: 1px solid #8888; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
img { max-width: 100%; height: auto; background: #fff; }
pre { overflow-x: auto; font-size: .85rem; background: #8881; padding: .7rem; }
.failed { color: #b00020; }
"""


class Section(NamedTuple):
    """The table of one model, in text cells, with a title over it.

    Attributes:
        best: numbers of the rows with the lowest perplexity of their target and ratio, as it is written.
        starts: numbers of the rows before which there is some room: where another method begins, or, if none has two
            rows, another target.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    best: set[int]
    starts: set[int]

    def lines(self, escaped: Callable[[str], str], bold: str) -> Iterator[list[str]]:
        """Yield the header and the rows with escaped cells; ``bold`` has ``@`` in the place of the cell."""
        yield [escaped(name) for name in self.header]
        for number, row in enumerate(self.rows):
            cells = [escaped(cell) for cell in row]
            if number in self.best:
                cells[_PERPLEXITY] = bold.replace("@", cells[_PERPLEXITY])
            yield cells


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write tables, pictures and page into a folder, each whole or not at all, and return their paths.

    Raises:
        KeyreduceError: no way of pruning has a result yet, or the folder cannot be written.
    """
    if results.table.empty:
        why = next(iter(results.failed.values()), "no run that prunes is done, or no dense model")
        raise KeyreduceError(f"there is nothing to show yet: {why}")
    against = "speed" if results.kinds else "size of the state"
    pictures = {"Perplexity against the share removed": folder / "perplexity.png"}
    pictures[f"Perplexity against {against}"] = folder / "pareto.png"
    makers = (markdown, as_csv, latex, draw_perplexity, draw_pareto, lambda results: page(results, pictures))
    for name, make in zip(NAMES, makers, strict=True):
        with appearing(folder / name, folder=False, overwrite=True) as temporary:
            made = make(results)
            if isinstance(made, str):
                temporary.write_text(made, encoding="utf-8")
            else:
                save_picture(made, temporary, format="png")
    return [folder / name for name in NAMES]


def sections(results: Results) -> list[Section]:
    """Return a table for each model, in text cells."""
    lowest = results.table.groupby(["model", "target", "ratio"])["perplexity"].transform("min")
    rows = results._replace(table=results.table.assign(lowest=lowest)).rows
    models = dict.fromkeys([*results.dense, *(row.model for row in rows)])
    header = list(_cells(rows[0], results.kinds))
    return [_section(results, model, header, [row for row in rows if row.model == model]) for model in models]


def _section(results: Results, model: str, header: list[str], rows: list[Any]) -> Section:
    finite = {number: row for number, row in enumerate(rows) if math.isfinite(row.perplexity)}
    best = {number for number, row in finite.items() if number_of(row.perplexity) == number_of(row.lowest)}
    groups = [(row.target, row.label) for row in rows]
    if len(set(groups)) == len(groups):
        groups = [row.target for row in rows]
    starts = {number for number in range(1, len(rows)) if groups[number] != groups[number - 1]}
    title = model
    if model in results.dense:
        perplexity, bits = results.dense[model]
        title += f" (dense: perplexity {number_of(perplexity)}, {bits:.3f} bits per byte)"
    return Section(title, header, [[*_cells(row, results.kinds).values()] for row in rows], best, starts)


def _cells(row: Any, kinds: list[str]) -> dict[str, str]:
    def told(name: str, form: Callable[..., str]) -> str:
        mean, spread = getattr(row, name), getattr(row, f"{name}_spread")
        return form(mean) + ("" if math.isnan(spread) else f" ± {form(spread, mean)}")

    def decimals(number: int, factor: float = 1) -> Callable[..., str]:
        return lambda value, _=None: f"{factor * value:,.{number}f}"

    speedups = {f"{kind} speedup": f"{kind}_speedup" for kind in kinds}
    return {
        "target": row.target,
        "method": row.label,
        "repair": "" if row.repair == NO_REPAIR else row.repair,
        "removed": f"{100 * row.ratio:g}%",
        "perplexity": told("perplexity", number_of),
        "over dense": f"{'+' if row.increase >= 0 else ''}{told('increase', decimals(1, 100))}%",
        "bits per byte": told("bits_per_byte", decimals(3)),
        "state": "" if math.isnan(row.state) else f"{100 * row.state:.0f}%",
        **{word: "" if math.isnan(getattr(row, name)) else told(name, decimals(2)) for word, name in speedups.items()},
        "seconds": told("seconds", decimals(1)),
    }


def number_of(perplexity: float, like: float | None = None) -> str:
    """Return a perplexity with as many digits as tell something; a spread with as many as its mean has."""
    size = perplexity if like is None else like
    if size < 1e6:
        return f"{perplexity:,.{3 if size < 100 else 1 if size < 10_000 else 0}f}"
    return f"{perplexity:.3g}"


def _notes(results: Results) -> list[str]:
    """Return what is to be said below the tables, sentence by sentence."""
    said, record, counts = [], results.record, sorted(set(results.table["seeds"]))
    if counts[-1] > 1:
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        said.append(f"Mean ± sample standard deviation over {seeds} seeds.")
    said.append("Bold: the lowest perplexity of its target and share removed.")
    said.append(
        "State: bytes of recurrent state, over the dense model's. Seconds: wall time of prune, and of recover after it."
    )
    timing, device = record.get("timing"), str(record.get("device", "?"))
    if results.kinds and timing:
        told = "Speedups: time of the dense model over the pruned one's, median of all runs of the same sizes"
        inputs = []
        if rows := " and ".join(kind for kind in results.kinds if kind != "decode"):
            inputs.append(f"{rows} with {timing['batch_size']} x {timing['seq_len']} tokens")
        if "decode" in results.kinds:
            sequences = max(timing["decode_batch_sizes"])
            inputs.append(f"decode with {sequences} sequence{'s' if sequences > 1 else ''}")
        is_disturbed = not device.startswith("cuda") and record.get("jobs", 1) > 1
        several = " and several processes at once, which disturb each other" if is_disturbed else ""
        said.append(f"{told}, on {device}; {', '.join(inputs)}{several}.")
    return said


def markdown(results: Results) -> str:
    """Return all tables as Markdown."""
    parts = []
    for section in sections(results):
        header, *rows = section.lines(_escape_markdown, "**@**")
        rule = ["---"] * _NAMING + ["---:"] * (len(header) - _NAMING)
        table = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
        parts.append(f"**{_escape_markdown(section.title)}**\n\n{table}")
    parts.append(" ".join(_notes(results)))
    if results.failed:
        failed = [f"- {_escape_markdown(title)}: {_escape_markdown(why)}" for title, why in results.failed.items()]
        parts.append("Failed:\n\n" + "\n".join(failed))
    if results.waiting:
        parts.append(f"Runs that are not done yet: {len(results.waiting)}.")
    return "\n\n".join(parts) + "\n"


def _escape_markdown(text: str) -> str:
    """Escape what ends a cell, or is no plain text."""
    return re.sub(r"([|\\`*<])", r"\\\1", text)


def as_csv(results: Results) -> str:
    """Return all figures, unrounded, a line for each way of pruning; a spread that there is not is an empty cell."""
    return results.table.rename(columns={"dense": "dense_perplexity", "state": "state_share"}).to_csv(index=False)


def latex(results: Results) -> str:
    """Return all tables as LaTeX, for the packages booktabs and, where they are wide, graphicx."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage{graphicx}."]
    for section in sections(results):
        header, *rows = (" & ".join(cells) + r" \\" for cells in section.lines(_escape_latex, r"\textbf{@}"))
        lines = [header, r"\midrule"]
        for number, row in enumerate(rows):
            lines += [r"\addlinespace", row] if number in section.starts else [row]
        body = "\n".join(lines)
        columns = "l" * _NAMING + "r" * (len(section.header) - _NAMING)
        caption = _escape_latex(f"{section.title}. {' '.join(_notes(results))}")
        parts.append(
            f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\medskip\n"
            f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n"
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}}}\n\\end{{table}}"
        )
    return "\n\n".join(parts) + "\n"


def _escape_latex(text: str) -> str:
    return text.translate(str.maketrans(_LATEX))


def page(results: Results, pictures: Mapping[str, Path]) -> str:
    """Return an HTML page that needs no other file; ``pictures`` maps what each shows to a PNG file, which it holds."""
    record = results.record
    models = ", ".join(dict.fromkeys(results.table["model"]))
    title = escape(f"Sweep {Path(str(record.get('recipe', ''))).stem}: {models}")
    parts = [f"<h1>{title}</h1>"]
    if results.failed:
        items = "".join(f"<li>{escape(run)}: {escape(why)}</li>" for run, why in results.failed.items())
        parts.append(f'<div class="failed"><p>Failed:</p><ul>{items}</ul></div>')
    if results.waiting:
        parts.append(f"<p>Runs that are not done yet: {len(results.waiting)}.</p>")
    for shown, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<h2>{escape(shown)}</h2>\n<img alt="{escape(shown)}" src="data:image/png;base64,{data}">')
    for section in sections(results):
        header, *rows = section.lines(escape, "<b>@</b>")
        starts = [f"<tr{' class=first' if number in section.starts else ''}>" for number in range(len(rows))]
        lines = [f"{start}<td>{'</td><td>'.join(row)}</td></tr>" for start, row in zip(starts, rows, strict=True)]
        parts.append(
            f"<h2>{escape(section.title)}</h2>\n<div class=scroll><table>\n"
            f"<thead><tr><th>{'</th><th>'.join(header)}</th></tr></thead>\n<tbody>\n"
            + "\n".join(lines)
            + "\n</tbody>\n</table></div>"
        )
    parts += [f"<p>{escape(note)}</p>" for note in _notes(results)]
    settings = {name: value for name, value in record.items() if name != "runs"}
    parts.append(f"<h2>What was run</h2>\n<pre>{escape(json.dumps(settings, indent=2))}</pre>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )
