"""A sweep as one HTML page that needs no other file: tables, pictures, and what was run."""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from keyreduce.sweep.results import Results
from keyreduce.sweep.tables import Section, notes, sections

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .55rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid; vertical-align: bottom; } tbody tr:nth-child(even) { background: #8881; }
tr.first td { border-top: 1px solid #8888; }
.name { text-align: left; }
img { max-width: 100%; height: auto; background: #fff; }
pre { overflow-x: auto; font-size: .85rem; background: #8881; padding: .7rem; }
.failed { color: #b00020; }
"""


def page(results: Results, pictures: Mapping[str, Path]) -> str:
    """Return the page.

    Args:
        results: of the sweep.
        pictures: what each shows -> a PNG file, which the page will hold.
    """
    record = results.record
    title = f"Sweep {Path(str(record.get('recipe', ''))).name}".strip()
    parts = [f"<h1>{escape(title)}</h1>"]
    if results.failed:
        items = "".join(f"<li>{escape(run)}: {escape(why)}</li>" for run, why in results.failed.items())
        parts.append(f'<div class="failed"><p>Failed:</p><ul>{items}</ul></div>')
    if results.waiting:
        parts.append(f"<p>Runs that are not done yet: {len(results.waiting)}.</p>")
    for shown, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<h2>{escape(shown)}</h2>\n<img alt="{escape(shown)}" src="data:image/png;base64,{data}">')
    parts += [_table(section) for section in sections(results)]
    parts += [f"<p>{escape(note)}</p>" for note in notes(results)]
    settings = {name: value for name, value in record.items() if name != "runs"}
    parts.append(f"<h2>What was run</h2>\n<pre>{escape(json.dumps(settings, indent=2))}</pre>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(section: Section) -> str:
    def cell(tag: str, column: int, content: str) -> str:
        return f"<{tag}{' class=name' if column < section.names else ''}>{content}</{tag}>"

    header = "".join(cell("th", column, escape(name)) for column, name in enumerate(section.header))
    perplexity, rows = section.header.index("perplexity"), []
    for number, cells in enumerate(section.rows):
        told = [escape(text) for text in cells]
        if number in section.best:
            told[perplexity] = f"<b>{told[perplexity]}</b>"
        rows.append(
            f"<tr{' class=first' if number in section.starts else ''}>"
            + "".join(cell("td", column, content) for column, content in enumerate(told))
            + "</tr>"
        )
    return (
        f"<h2>{escape(section.title)}</h2>\n<div class=scroll><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
    )
