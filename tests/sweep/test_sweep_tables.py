"""Markdown, CSV, LaTeX and HTML are well formed, say the same figures, and let no name through unescaped."""

import base64
import csv
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
from itertools import pairwise

import pandas as pd
import pytest
from made_up_sweep import DENSE, make_up

from keyreduce.errors import KeyreduceError
from keyreduce.sweep.report import NAMES, as_csv, latex, markdown, number_of, page, sections, write_report
from keyreduce.sweep.results import Results, read_results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = r"a_b%c&d$e#f{g}h~i^j\k|l<m>n`*o*"


@pytest.fixture
def results(tmp_path):
    return read_results(make_up(tmp_path))


def test_cells(results):
    first, second = sections(results)
    assert first.title == "one-model (dense: perplexity 8.000, 2.000 bits per byte)"
    assert second.title.startswith("other_model (dense: perplexity 4.000")
    names = ["target", "method", "repair", "removed", "perplexity", "over dense", "bits per byte", "state"]
    assert first.header == [*names, "mixer speedup", "decode speedup", "seconds"]
    # Half of the key channels by the first method: 8 * (1 + 0.25 * (1, 1.1, 1.2)).
    row = next(cells for cells in first.rows if cells[:4] == ["key", "rrqr", "", "50%"])
    assert row[4:] == [
        "10.200 ± 0.200",
        "+27.5 ± 2.5%",
        "2.550 ± 0.050",
        "50%",
        "1.25 ± 0.00",
        "1.25 ± 0.00",
        "2.0 ± 1.0",
    ]
    assert {tuple(first.rows[number][1:4]) for number in first.best} == {
        ("rrqr", "least-squares", ratio) for ratio in ("25%", "50%", "75%")
    }


def test_those_that_read_alike_are_all_the_best(results):
    first = results.table[(results.table["model"] == "one-model") & (results.table["ratio"] == 0.5)]
    means = [3.00012, math.inf, 3.00049, 3.001, math.nan, 9.0]
    (section, _) = sections(results._replace(table=first.assign(perplexity=means)))
    assert section.best == {0, 2}
    (section, _) = sections(results._replace(table=first.assign(perplexity=math.inf)))
    assert section.best == set()


def test_room_is_between_methods_or_where_each_has_one_row_between_targets(results):
    section = sections(results)[0]
    expected = [n for n, (a, b) in enumerate(pairwise(section.rows), 1) if a[:2] != b[:2]]
    assert section.starts == set(expected) != set()
    one = results.table[results.table["model"] == "one-model"].drop_duplicates(["target", "label"])
    both = results._replace(table=pd.concat([one, one.assign(target="value")]))
    (section, _) = sections(both)
    assert section.starts == {len(one)}
    assert latex(both).count(r"\addlinespace") == 1
    assert page(both, {}).count("class=first") == 1


def test_markdown_is_a_table_a_model(results):
    text = markdown(results)
    for section in sections(results):
        table = text[text.index(section.title) :].split("\n\n")[1].splitlines()
        cells = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in table]
        assert len(table) == 2 + len(section.rows)
        assert {len(line) for line in cells} == {len(section.header)}
        assert cells[1] == ["---"] * 3 + ["---:"] * (len(section.header) - 3)
        for line, row in zip(cells[2:], section.rows, strict=True):
            assert [cell.strip("*") for cell in line] == row
    assert "over 3 seeds" in text and "on cpu" in text and "decode with 8 sequences" in text


def test_csv_has_all_figures_unrounded(results):
    lines = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert len(lines) == len(results.rows)
    for line, row in zip(lines, results.rows, strict=True):
        assert (line["model"], line["label"], line["repair"]) == (row.model, row.label, row.repair)
        assert float(line["perplexity"]) == row.perplexity
        assert float(line["perplexity_spread"]) == row.perplexity_spread
        assert float(line["decode_speedup"]) == row.decode_speedup
        assert float(line["dense_perplexity"]) == DENSE[row.model]
        assert float(line["state_share"]) == row.state


def test_json_has_them_too(results):
    content = json.loads(json.dumps(results.to_json(), allow_nan=False))
    for entry, row in zip(content["rows"], results.rows, strict=True):
        assert entry["perplexity"] == {"mean": row.perplexity, "spread": row.perplexity_spread}
        assert entry["speedups"]["mixer"]["mean"] == row.mixer_speedup
    assert content["dense"]["one-model"] == {"perplexity": 8.0, "bits_per_byte": 2.0}


def test_latex_is_balanced_and_has_booktabs_rules(results):
    text = latex(results)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\bottomrule") == 2
    for tabular in re.findall(r"\\begin{tabular}{(\w+)}\n(.*?)\\end{tabular}", text, flags=re.DOTALL):
        columns, body = tabular
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 1 + len(results.rows) // 2
        assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {len(columns)}
    assert_latex_is_safe(text)


def assert_latex_is_safe(text: str) -> None:
    """Braces are balanced, and a per cent sign or an underscore stands there only where it is escaped, or a comment."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    body = re.sub(r"\{%$", "{", body, flags=re.MULTILINE)
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", body):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"(?<!\\)[%_#]", body)
    assert "±" not in body


class Page(html.parser.HTMLParser):
    """What a browser would find: open tags are closed in order, and cells and pictures are collected."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.cells: list[str] = []
        self.pictures: list[bytes] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag == "img":
            kind, data = dict(attributes)["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            self.pictures.append(base64.b64decode(data, validate=True))
        self.links += [value for name, value in attributes if name in ("href", "src") and not value.startswith("data:")]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_the_page_needs_no_other_file(results, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG and so on")
    found = Page(page(results, {"A picture": picture}))
    assert found.pictures == [picture.read_bytes()]
    assert found.links == []
    expected = [cell for section in sections(results) for line in (section.header, *section.rows) for cell in line]
    assert found.cells == expected


LOOK = """<script>document.title = JSON.stringify({
    pictures: [...document.images].map(one => one.complete && one.naturalWidth > 100 && one.width <= innerWidth),
    tables: [...document.querySelectorAll("tbody")].map(one => one.rows.length),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    heading: document.querySelector("h1").textContent})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page(results, tmp_path):
    write_report(results, tmp_path / "out")
    shown = tmp_path / "shown.html"
    shown.write_text((tmp_path / "out" / "table.html").read_text().replace("</body>", f"{LOOK}</body>"))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=700,900", "--dump-dom"]
    done = subprocess.run([*command, shown.as_uri()], capture_output=True, text=True, timeout=600, check=True)
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert found == {
        "pictures": [True, True],
        "tables": [len(section.rows) for section in sections(results)],
        "overflow": 0,  # wide tables scroll on their own
        "heading": f"Sweep up: {', '.join(DENSE)}",
    }


def test_names_are_escaped_everywhere(tmp_path):
    results = read_results(make_up(tmp_path, methods=(NASTY,), seeds=(0,), models=("one-model",)))
    results.failed[f"<script>{NASTY}</script>"] = "a | b & <b>c</b>"
    assert_latex_is_safe(latex(results))
    found = Page(page(results, {}))
    assert NASTY in found.cells
    assert "script" not in found.seen
    table = markdown(results).split("\n\n")[1].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(sections(results)[0].header) + 1}
    assert next(csv.DictReader(io.StringIO(as_csv(results))))["label"] == NASTY


def test_json_becomes_the_results_again(results):
    found = json.loads(json.dumps(results.to_json()))
    again = Results.of_json(found, results.record)
    assert again.to_json() == found
    assert markdown(again) == markdown(results)


def test_failures_and_runs_to_come_are_told(tmp_path):
    root = make_up(tmp_path, seeds=(0,), models=("one-model",))
    gone, failed = sorted(root.glob("runs/*"))[:2]
    (gone / "result.json").unlink()
    (failed / "result.json").unlink()
    (failed / "failure.json").write_text('{"message": "it was too hot"}')
    results = read_results(root)
    for text in (markdown(results), page(results, {})):
        assert "it was too hot" in text and "not done yet: 1" in text


def test_all_files_are_written_and_again(tmp_path):
    root = make_up(tmp_path / "sweep", seeds=(0,), kinds=())
    results = read_results(root)
    written = write_report(results, tmp_path / "out")
    assert {path.name for path in written} == set(NAMES) == {path.name for path in (tmp_path / "out").iterdir()}
    for name in ("perplexity.png", "pareto.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert len(Page((tmp_path / "out" / "table.html").read_text()).pictures) == 2
    assert (tmp_path / "out" / "table.md").read_text() == markdown(results)
    write_report(results, tmp_path / "out")


def test_nothing_to_show_yet(tmp_path):
    root = make_up(tmp_path, models=("one-model",))
    (root / "dense/one-model/result.json").unlink()
    (root / "dense/one-model/failure.json").write_text('{"message": "it was too cold"}')
    with pytest.raises(KeyreduceError, match="there is nothing to show yet: it was too cold"):
        write_report(read_results(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("perplexity", "told"),
    [
        (2.10081, "2.101"),
        (99.9, "99.900"),
        (123.456, "123.5"),
        (54321.0, "54,321"),
        (3e7, "3e+07"),
        (float("inf"), "inf"),
    ],
)
def test_digits_of_a_perplexity(perplexity, told):
    assert number_of(perplexity) == told
    assert number_of(0.5, like=200.0) == "0.5"
