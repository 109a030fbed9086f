"""``keyreduce table``: a sweep's folder to tables and pictures, wherever one wants them."""

from pathlib import Path

import pytest
from made_up_sweep import make_up

FILES = {"table.md", "table.csv", "table.tex", "table.html", "perplexity.png", "pareto.png"}


@pytest.fixture
def sweep(tmp_path) -> Path:
    return make_up(tmp_path / "sweep", models=("one-model",), seeds=(0, 1))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_it_prints_markdown_and_writes_beside_the_sweep(keyreduce, sweep):
    result = keyreduce("table", sweep)
    assert result.code == 0, result.err
    assert result.out.startswith((sweep / "table.md").read_text())
    assert names(sweep) == FILES | {"sweep.json"}
    assert keyreduce("table", sweep).code == 0  # as often as one likes


def test_json(keyreduce, sweep):
    report = keyreduce("table", sweep, "--json").json()
    assert {Path(path).name for path in report["written"]} == FILES
    assert len(report["rows"]) == 3 * 3 * 2
    assert report["rows"][0]["perplexity"]["mean"] == pytest.approx(8 * (1 + 0.0625 * 1.05))


def test_an_output_of_ones_own_is_replaced_only_when_one_says_so(keyreduce, sweep):
    assert keyreduce("table", sweep, "--output", "out").code == 0
    assert names(Path("out")) == FILES
    assert names(sweep) == {"sweep.json"}
    refused = keyreduce("table", sweep, "--output", "out")
    assert refused.code == 2 and "table.md exists; pass --overwrite" in refused.err
    assert keyreduce("table", sweep, "--output", "out", "--overwrite").code == 0


def test_the_sweep_of_the_work_folder_is_the_default(keyreduce, sweep, tmp_path):
    assert keyreduce("table", "--work", tmp_path).code == 0
    missing = keyreduce("table")
    assert missing.code == 2 and "holds no sweep.json; give the folder" in missing.err
    assert not Path("keyreduce-out").exists()


def test_a_file_is_no_folder(keyreduce, sweep):
    Path("file").touch()
    refused = keyreduce("table", sweep, "--output", "file")
    assert refused.code == 2 and "cannot write to" in refused.err
