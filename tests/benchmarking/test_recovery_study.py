"""benchmarks/recovery_study.py, with a tiny model on a CPU."""

import json


def test_figures_are_kept_and_printed(study, tmp_path, capsys):
    _, run = study("recovery_study")
    repairs = ("none", "least-squares", "reconstruct:steps=1,lr=0.001")
    run("--ratios", "0.5", "--seeds", 0, 1, "--repairs", *repairs, "--output", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    runs = {(one["seed"], one["repair"]): one for one in figures["runs"]}
    assert runs.keys() == {(seed, repair) for seed in (0, 1) for repair in repairs}
    assert len({one["perplexity"] for one in runs.values()}) == 6
    assert all(one["tokens"] == 80 for one in runs.values())
    assert set(runs[0, "least-squares"]["layers"]) == {"0", "1"}
    rises = [100 * (runs[seed, "least-squares"]["perplexity"] / figures["dense"]["perplexity"] - 1) for seed in (0, 1)]
    told = f"| least-squares | {sum(rises) / 2:+.1f} ± {abs(rises[0] - rises[1]) / 2:.1f}% |"
    assert told in capsys.readouterr().out
