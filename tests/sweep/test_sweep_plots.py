"""What the pictures of a sweep hold: the points, the spreads and the front."""

import pytest
from made_up_sweep import DENSE, make_up, speedup
from matplotlib.figure import Figure as Canvas

from keyreduce.sweep.plots import _label_front, draw_pareto, draw_perplexity
from keyreduce.sweep.results import read_results


def panels(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def legend(figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_perplexity_against_ratio_has_a_panel_for_each_model_and_target(tmp_path):
    results = read_results(make_up(tmp_path, targets=("key", "value")))
    figure = draw_perplexity(results)
    found = panels(figure)
    assert set(found) == {f"{model}, {target}" for model in DENSE for target in ("key", "value")}
    axes = found["one-model, value"]
    assert axes.get_ylabel() == "perplexity per token"
    assert axes.get_xlabel() == "share of value channels removed, %"
    rows = [row for row in results.rows if (row.model, row.target) == ("one-model", "value")]
    curves = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert len(curves) == 3 * 2
    for row in rows:
        curve = next(curve for curve in curves if [100 * row.ratio, row.perplexity] in curve)
        assert curve[0] == [0, 8.0]  # nothing removed: the dense model
    heights = {
        round(top - bottom, 6)
        for container in axes.containers
        for (_, bottom), (_, top) in filter(len, container.lines[2][0].get_segments())  # none at the dense model
    }
    assert {round(2 * row.perplexity_spread, 6) for row in rows} <= heights
    title = "perplexity against the share removed; bars: sample standard deviation over 3 seeds"
    assert figure.get_suptitle().splitlines() == [title, "held-out text: notes.txt; cpu"]
    # Beside each other: no two lines of a panel coincide, whatever their values.
    assert len({tuple(one.lines[0].get_transform().transform((0, 0))) for one in axes.containers}) == len(curves)
    assert legend(figure) == ["rrqr", "wanda", "taylor (form squared)", "no repair", "least-squares", "dense"]


def test_perplexities_far_apart_get_a_logarithmic_axis(tmp_path):
    near = draw_perplexity(read_results(make_up(tmp_path / "near", ratios=(0.25,))))
    far = draw_perplexity(read_results(make_up(tmp_path / "far", ratios=(0.25, 0.99))))
    assert {axes.get_yscale() for axes in near.axes} == {"linear"}
    assert {axes.get_yscale() for axes in far.axes} == {"log"}
    far.canvas.draw()
    ticks = [label.get_text() for label in far.axes[0].get_yticklabels() if label.get_text()]
    assert len(ticks) >= 2 and all("10^" not in tick for tick in ticks)


def test_the_front_goes_through_the_dense_model_and_the_best_at_each_speed(tmp_path):
    results = read_results(make_up(tmp_path, seeds=(0,)))
    figure = draw_pareto(results)
    assert len(panels(figure)) == 2 and len(figure.axes) == 4  # a line of panels a model: mixer and decode
    assert {axes.get_xlabel() for axes in figure.axes} == {
        "mixer layer, times as fast as dense",
        "decoding, times as fast as dense",
    }
    axes = figure.axes[0]
    assert figure.get_suptitle().splitlines()[0] == "perplexity against speed"  # one seed has no spread
    best = {
        row.ratio: row.perplexity
        for row in results.rows
        if row.model == "one-model" and row.label == "rrqr" and row.repair != "none"
    }
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [[1.0, 8.0], *([speedup(ratio), cost] for ratio, cost in best.items())] in lines
    points = [line for line in lines if len(line) == 1]
    assert len(points) == 3 * 3 * 2 + 1
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["25%", "50%", "75%"]


def test_points_have_the_spread_of_both_axes(tmp_path):
    one = {"methods": ("rrqr",), "ratios": (0.5,), "repairs": ("none",), "models": ("one-model",)}
    results = read_results(make_up(tmp_path, **one))
    axes, (row,) = draw_pareto(results).axes[0], results.rows
    heights = [abs(top[1] - bottom[1]) for one in axes.containers for bottom, top in one.lines[2][1].get_segments()]
    assert heights == [pytest.approx(2 * row.perplexity_spread)]


def test_where_nothing_was_timed_the_state_takes_the_place_of_speed(tmp_path):
    results = read_results(
        make_up(tmp_path, kinds=(), seeds=(0,), ratios=(0.5,), models=("one-model",), targets=("key", "head"))
    )
    (axes,) = draw_pareto(results).axes
    assert axes.get_xlabel() == "state, times as small as dense"
    assert {line.get_xdata()[0] for line in axes.lines} == {1.0, 2.0}
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["key 50%"]


def test_many_methods_look_different(tmp_path):
    methods = [f"method {number}" for number in range(12)]
    results = read_results(make_up(tmp_path, methods=methods, repairs=("none",), seeds=(0,), models=("one-model",)))
    (axes,) = draw_perplexity(results).axes
    looks = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers}
    assert len(looks) == 12


def test_words_beside_the_front_do_not_cover_each_other():
    axes = Canvas(figsize=(4.6, 3.6)).subplots()
    points = [(1.0, 2.0), (1.14, 2.33), (1.15, 2.35), (1.6, 3.0)]
    axes.plot(*zip(*points, strict=True))
    _label_front(axes, points, ["", "key 25%", "value 50%", "key 75%"])
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert heights["key 25%"] == heights["key 75%"] < 0 < heights["value 50%"]
