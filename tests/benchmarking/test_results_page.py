"""docs/results.md is what benchmarks/results.py makes of the committed JSON, and nothing of it is left out."""

import json
import sys
from pathlib import Path

import pytest
from made_up_sweep import make_up

from keyreduce.sweep.recipe import read_recipe

REPOSITORY = Path(__file__).parents[2]
STUDY = {
    "model": "delta-net-5m", "calibration_tokens": 4096, "heldout_rows": 8, "first_rows": 4, "device": "cpu",
    "processor": "made up", "torch": "2", "python": "3",
    "dense": {"perplexity": 4.0, "perplexity_first": 3.0, "recall": {"mqar": 0.9}},
    "runs": [
        {
            "seed": seed, "cut": "state=0.5", "repair": repair, "state_dtype": dtype, "sizes": [2, 64, 128],
            "seconds": 60.0, "perplexity": 4.0 * (1 + cost * (1 + seed)), "perplexity_first": 3.3,
        } | ({"recall": {"mqar": 0.5}} if dtype == "float32" else {})
        for seed in (0, 1)
        for repair, dtype, cost in (
            ("none", "float32", 0.1), ("reconstruct", "float32", 0.02), ("reconstruct", "int8", 0.03)
        )
    ],
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import results

    return results


def test_the_page_and_its_pictures_are_those_of_the_committed_json(script):
    sources = script.read_sources()
    page, pictures = script.make_page(sources)
    assert script.stale(page, pictures) == [], "run `make results`"
    for kind in sources.values():
        for source in kind:
            assert source.path.stem in page or source.name in page
    for picture in pictures:
        assert f"](pictures/{picture.name})" in page
    assert "nan" not in page and "None" not in page


def test_a_file_of_no_known_kind_is_an_error(script, tmp_path):
    (tmp_path / "new.json").write_text('{"figures": [1, 2]}')
    with pytest.raises(ValueError, match=r"new\.json is of no known kind"):
        script.read_sources(tmp_path)


def test_a_study_of_budgets(script):
    sources = script.read_sources()
    path = script.HERE / "state_budget/budget-delta-net-5m.json"
    sources |= {"study": [script.Source(path, STUDY)], "grid": []}
    page, _ = script.make_page(sources)
    assert "--model delta-net-5m --cuts state=0.5 --repairs none reconstruct --state-dtypes int8 --seeds 0 1" in page
    assert (
        "| state=0.5 | 2, 64 x 128 | no repair | float32 | +15.00 ± 7.07% (+10.00 ± 0.00%) | 50.0 ± 0.0% | 60 |" in page
    )
    precision = next(one.content for one in sources["precision"] if one.path.stem == "delta-net-5m-4096")
    figure = script.draw_state(script.Known("delta-net-5m", precision, [], [STUDY]))
    assert figure.get_suptitle().startswith("What a smaller state costs: delta-net-5m, 5.2M parameters\nheld-out text")
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told[1:] == [f"fewer channels, {one}" for one in ("no repair", "reconstruct", "reconstruct, in int8")]
    (axes,) = figure.axes
    _, bare, repaired, small = (one.lines[0].get_xydata()[-1] for one in axes.containers)
    # Half of 768 KiB, and with a scale of 4 bytes for each row of 64 channels in int8.
    assert bare.tolist() == pytest.approx([384, 15]) and repaired.tolist() == pytest.approx([384, 3])
    assert small.tolist() == pytest.approx([384 * (64 + 4) / 256, 4.5])
    (segment,) = axes.containers[1].lines[2][0].get_segments()
    assert segment[1, 1] - segment[0, 1] == pytest.approx(2 * 7.0710678)


def test_the_recipe_of_several_draws_is_that_of_the_methods():
    random = read_recipe(REPOSITORY / "benchmarks/quality/random.toml")
    methods = read_recipe(Path("methods"))
    assert (random.calibration, random.heldout, random.models) == (methods.calibration, methods.heldout, methods.models)
    drawn = [combination for combination in methods.combinations if combination.request.method == "random"]
    assert random.combinations == drawn and len(random.seeds) == 5


def test_sweeps_become_a_file_of_results(script, tmp_path, monkeypatch):
    folders = [tmp_path / "all", tmp_path / "more"]
    make_up(folders[0], methods=("rrqr", "random"), seeds=(0,), kinds=())
    make_up(folders[1], methods=("random",), seeds=(0, 1, 2), kinds=())
    for folder in folders:
        record = json.loads((folder / "sweep.json").read_text())
        text = {"text": {"kind": "files", "paths": [str(tmp_path / "notes.txt")], "files": 1}}
        amount = {"num_batches": 2, "batch_size": 4, "seq_len": 512}
        record |= {"recipe": f"recipes/{folder.name}.toml", "dtype": "float32"}
        record |= {"calibration": text | amount, "heldout": text | amount}
        (folder / "sweep.json").write_text(json.dumps(record))
    output = tmp_path / "methods.json"
    monkeypatch.setattr(sys, "argv", ["results.py", "--keep", *map(str, folders), "--output", str(output)])
    script.main()
    assert str(tmp_path) not in output.read_text()
    sources: dict = {kind: [] for kind in script.KINDS}
    sources["sweep"] = [script.Source(script.HERE / "quality/methods.json", json.loads(output.read_text()))]
    page, (picture,) = script.make_page(sources)
    assert "    keyreduce sweep all --seed 0 --output FOLDER\n    keyreduce sweep more --output FOLDER" in page
    assert "calibration: 4,096 tokens (text: notes.txt)" in page
    (random,) = (line for line in page.splitlines() if line.startswith("| `random` |"))
    assert " ± " in random  # of three draws; the others have one
    (rrqr,) = (line for line in page.splitlines() if line.startswith("| `rrqr` |"))
    assert " ± " not in rrqr
    assert "held-out text: notes.txt" in picture.draw().get_suptitle()
