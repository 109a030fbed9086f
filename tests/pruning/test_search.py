"""The search for the sizes that lose least: its choice against all that were considered, and what it writes."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from tiny_models import build, save

from keyreduce.benchmarking.per_token import TokenTimes
from keyreduce.benchmarking.timing import RoundTimes
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.batches import spread_rows, token_rows
from keyreduce.data.text import DocumentText
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity
from keyreduce.families import MixerSizes
from keyreduce.pruning import search as search_module
from keyreduce.pruning import trial as trial_module
from keyreduce.pruning.budget_picture import draw_search
from keyreduce.pruning.methods import METHODS, method_named
from keyreduce.pruning.planning import make_plan
from keyreduce.pruning.prediction import predicted_loss, read_curves
from keyreduce.pruning.prune import write_pruned
from keyreduce.pruning.search import Considered, Found, Search, write_search
from keyreduce.pruning.state_budget import StateBudget, find_candidates
from keyreduce.pruning.trial import Trial, measured_after
from keyreduce.reporting import Reporter

CPU = torch.device("cpu")
SETTINGS = Settings(num_batches=4, batch_size=2, seq_len=64)
WORDS = ("state", "key", "value", "head", "norm", "gate", "write", "read", "forget", "decay", "token", "layer")


def text_of(lines: int, seed: int = 0) -> DocumentText:
    drawn = torch.randint(len(WORDS), (lines, 8), generator=torch.Generator().manual_seed(seed))
    return DocumentText([" ".join(WORDS[word] for word in row) for row in drawn.tolist()])


@pytest.fixture(scope="module", autouse=True)
def small_trials():
    """Less text than is taken of a real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_module, "ROWS", 6)
        patch.setattr(trial_module, "ROW_LENGTH", 64)
        patch.setattr(trial_module, "SPREAD", 2)
        patch.setattr(trial_module, "RECOVERED", dict.fromkeys(("cpu", "cuda"), SETTINGS))
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A model of heads of 8 x 8, text, and the statistics of its first tokens."""
    model = build("gated_deltanet", head_dim=8, expand_v=1.0, num_v_heads=2, use_short_conv=True)
    source = open_folder(save(model, tmp_path_factory.mktemp("search") / "dense"))
    text = text_of(40)
    return source, text, calibrate(source, text, SETTINGS, device=CPU, dtype=torch.float32)


def budget(**changed) -> StateBudget:
    given = dict(ratio=None, bytes=None, fit=None, dtypes=("float32",), multiple_of=None, engine=None)
    return StateBudget.of(**given | dict(targets=("key", "value")) | changed)


def search_of(known, mode, *, recovery=None, **changed) -> Search:
    source, text, statistics = known
    asked = budget(**{"ratio": "0.5"} | changed)
    choose = dict(method=method_named("auto"), options={}, seed=0, correct=recovery is None)
    given = dict(source=source, statistics=statistics, text=text, budget=asked, device=CPU)
    return Search(**given, **choose, recovery=recovery, mode=mode)


def rounds(*seconds: float) -> RoundTimes:
    return RoundTimes(seconds)


@pytest.fixture
def equal_times(monkeypatch):
    """Every candidate takes as long."""
    times = TokenTimes(rounds(*[1e-3] * 7), rounds(*[2e-3] * 7))
    monkeypatch.setattr(Trial, "times", lambda self, sizes, reporter: [times] * len(sizes))


def sizes_of(row: Considered) -> tuple[int, int, int]:
    return row.key_heads, row.head_k_dim, row.head_v_dim


@pytest.mark.parametrize("recovery", [None, "reconstruct"])
def test_the_predicted_choice_has_the_lowest_score(known, recovery):
    source, _, statistics = known
    found = search_of(known, "predicted", recovery=recovery, targets=("key", "value", "head")).run(Reporter())
    curves = read_curves(source, statistics)
    scores = {
        sizes_of_candidate: predicted_loss(curves, one.sizes, recovery)
        for one in find_candidates(source, budget(ratio="0.5", targets=("key", "value", "head")))
        for sizes_of_candidate in [(one.sizes.key_heads, *one.sizes[2:])]
    }
    assert {sizes_of(row): row.predicted for row in found.candidates} == scores
    assert sizes_of(found.chosen) == min(scores, key=scores.__getitem__)
    assert [row.predicted for row in found.candidates] == sorted(scores.values())
    assert all(row.perplexity_increase is None and row.decode_seconds is None for row in found.candidates)
    assert (found.mode, found.recovery, found.dense_bytes) == ("predicted", recovery, 2 * 2 * 8 * 8 * 4)


def test_what_is_kept_is_the_choice(known):
    found = search_of(known, "predicted").run(Reporter())
    kept = {"key": found.chosen.head_k_dim, "value": found.chosen.head_v_dim}
    assert found.chosen.key_heads == 2
    assert found.keep == {target: dict.fromkeys(range(2), number) for target, number in kept.items() if number < 8}


def test_the_frontier_is_what_no_other_sizes_beat_in_both(known):
    """Of all sizes from one to eight channels, whatever the budget."""
    source, _, statistics = known
    curves = read_curves(source, statistics)
    found = search_of(known, "predicted", dtypes=("float32", "int8")).run(Reporter()).frontier
    pairs = [pair for pair in itertools.product(range(1, 9), repeat=2) if pair != (8, 8)]
    losses = {pair: predicted_loss(curves, MixerSizes(2, 2, *pair)) for pair in pairs}
    sizes = {
        "float32": {pair: 2 * 2 * 4 * pair[0] * pair[1] for pair in pairs},
        "int8": {pair: 2 * 2 * (pair[0] * pair[1] + 4 * pair[1]) for pair in pairs},
    }
    assert found.keys() == sizes.keys()
    for dtype, points in found.items():
        every = {(sizes[dtype][pair], losses[pair]) for pair in pairs}
        best = {
            one for one in every if not any(a <= one[0] and b <= one[1] and (a, b) != one for a, b in every)
        }  # fmt: skip
        assert [size for size, _ in points] == sorted(size for size, _ in best)
        assert dict(points) == pytest.approx(dict(best), rel=1e-9)


def increase_by_hand(known, row: Considered, folder) -> float:
    """Of the written checkpoint, against the dense model, on every other row after the calibration's 512 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, text, statistics = known
    keep = {"key": dict.fromkeys(range(2), row.head_k_dim), "value": dict.fromkeys(range(2), row.head_v_dim)}
    options = dict(seed=0, statistics=statistics, inputs={"method": "auto", "target": "key,value"}, correct=True)
    write_pruned(source, make_plan(source, method_named("auto"), keep, **options), folder, dense=str(source.path))
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    rows_RT = torch.stack([*itertools.islice(token_rows(text.documents(0), tokenizer, 64), 8, 20, 2)])
    nats = []
    for path in (source.path, folder):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(rows_RT, use_cache=False).logits[:, :-1]
        nats.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows_RT[:, 1:].flatten())))
    return math.expm1(nats[1] - nats[0])


def test_the_measured_choice_has_the_least_increase(known, equal_times, tmp_path):
    found = search_of(known, "measured").run(Reporter())
    measured = [row for row in found.candidates if row.perplexity_increase is not None]
    assert 4 <= len(measured) <= len(found.candidates)
    assert found.chosen is measured[0] and found.candidates[: len(measured)] == tuple(measured)
    increases = [row.perplexity_increase for row in measured]
    assert increases == sorted(increases)
    assert all(row.perplexity_error > 0 and row.decode_seconds in (2e-3, None) for row in measured)
    expected = increase_by_hand(known, found.chosen, tmp_path / "chosen")
    assert found.chosen.perplexity_increase == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # Those beside the best one were measured too.
    heads, key, _ = sizes_of(found.chosen)
    alike = sorted(row.head_k_dim for row in found.candidates if row.key_heads == heads)
    place = alike.index(key)
    assert {*alike[max(0, place - 1) : place + 2]} <= {row.head_k_dim for row in measured}


def test_candidates_are_measured_after_their_recovery(known, equal_times):
    cut = search_of(known, "measured", targets=("key",)).run(Reporter())
    recovered = search_of(known, "measured", targets=("key",), recovery="least-squares").run(Reporter())
    assert recovered.recovery == "least-squares"
    assert sizes_of(cut.chosen) == sizes_of(recovered.chosen) == (2, 4, 8)
    assert recovered.chosen.perplexity_increase < cut.chosen.perplexity_increase


def test_formats_are_measured_as_they_round(known, equal_times):
    """Half the bytes by the format alone leaves the model as it is, and costs nearly nothing."""
    found = search_of(known, "measured", dtypes=("float32", "bfloat16")).run(Reporter())
    rounded = next(row for row in found.candidates if row.state_dtype == "bfloat16")
    assert sizes_of(rounded) == (2, 8, 8) and rounded.predicted == pytest.approx(0, abs=1e-6)
    assert 0 < abs(rounded.perplexity_increase) < 0.01
    others = [row for row in found.candidates if row.state_dtype == "float32" and row.perplexity_increase is not None]
    assert all(abs(row.perplexity_increase) > abs(rounded.perplexity_increase) for row in others[:1])


def test_rows_are_spread_over_the_text_that_follows_as_far_as_it_goes(known):
    source, _, statistics = known
    text = text_of(24)
    trial = Trial.of(source, statistics, text, {}, None, CPU)
    rows = list(token_rows(text.documents(0), trial.dense.tokenizer, 64))[8:]
    assert 6 < len(rows) < 12
    expected = [rows[place * len(rows) // 6] for place in range(6)]
    assert torch.equal(torch.stack([window.tokens_T for window in trial.windows]), torch.stack(expected))


@pytest.mark.parametrize(("lines", "spread"), [(60, 2), (30, 1)])
def test_candidates_are_recovered_on_other_rows_than_they_are_measured_on(known, monkeypatch, lines, spread):
    source, text, statistics = known
    text = text_of(lines)
    trial = Trial.of(source, statistics, text, {}, "least-squares", CPU)
    assert trial.spread == spread
    rows = [tuple(row_T.tolist()) for row_T in token_rows(text.documents(0), trial.dense.tokenizer, 64)]
    assert len(set(rows)) == len(rows)
    measured = [rows.index(tuple(window.tokens_T.tolist())) for window in trial.windows]
    assert min(measured) >= spread * SETTINGS.num_batches * SETTINGS.batch_size

    def recover(dense, pruned, dtypes, text, settings, **how):
        fitted = spread_rows(iter(range(len(rows))), settings.num_batches * settings.batch_size, how["spread"])
        assert len(fitted) == 8 and not {*fitted} & {*measured}
        raise KeyreduceError("seen")

    monkeypatch.setattr(trial_module, "recover_layers", recover)
    choose = dict(method=method_named("l2"), options={}, seed=0, correct=False)
    with pytest.raises(KeyreduceError, match="seen"):
        dataclasses.replace(trial, choose=choose).candidate_costs({"key": {0: 4, 1: 4}}, "float32")


def test_too_little_text_is_said(known):
    source, _, statistics = known
    with pytest.raises(KeyreduceError, match="has not 128 more to measure candidates on: .* `search` predicted"):
        search_of((source, text_of(3), statistics), "measured").run(Reporter())


@pytest.mark.parametrize(("small", "mode"), [(10**9, "measured"), (10, "predicted")])
def test_small_models_are_measured_where_nothing_is_said(known, monkeypatch, small, mode):
    monkeypatch.setattr(search_module, "SMALL", small)
    monkeypatch.setattr(Search, "_measure", lambda self, sizes, reporter: {row: row for row in sizes})
    assert search_of(known, None).run(Reporter()).mode == mode


COSTS = {4: 0.301, 5: 0.302, 6: 0.3, 8: 0.8}
"""Made-up losses in nats per token by key channels, of all candidates; rows do not tell 4 from 6."""


def made_up(monkeypatch, times: dict[int, TokenTimes], asked: list[int]) -> None:
    """A trial whose dense model costs 1 nat a token."""

    class MadeUp:
        dense = None

        def costs(self, loaded, state_dtype):
            return [Perplexity(nats=10.0, predictions=10, bytes=10) for _ in range(4)]

        def candidate_costs(self, keep, state_dtype):
            key = keep.get("key", {0: 8})[0]
            asked.append(key)
            noise = [0.03 * (-1) ** (row + (key == 4)) for row in range(4)]
            return [Perplexity(nats=10 * (1 + COSTS[key] + one), predictions=10, bytes=10) for one in noise]

        def times(self, sizes, reporter):
            assert {one.head_k_dim for one in sizes} == {4, 6}  # what is worse beyond doubt is not timed
            return [times[one.head_k_dim] for one in sizes]

    monkeypatch.setattr(Trial, "of", classmethod(lambda cls, *args: MadeUp()))


SLOW, FAST = rounds(*[2e-3] * 7), rounds(*[1e-3] * 7)


def test_a_tie_goes_to_the_faster(known, monkeypatch):
    steps = dict.fromkeys(COSTS, TokenTimes(SLOW, SLOW))
    made_up(monkeypatch, steps | {4: TokenTimes(SLOW, FAST)}, [])
    found = search_of(known, "measured").run(Reporter())
    assert found.chosen.head_k_dim == 4 and found.chosen.decode_seconds == 1e-3
    best = min(row.perplexity_increase for row in found.candidates if row.perplexity_increase is not None)
    assert found.candidates[1].perplexity_increase == best and found.candidates[1].head_k_dim == 6
    assert found.candidates[1].decode_seconds == 2e-3 and found.candidates[2].decode_seconds is None


def test_a_tie_is_not_given_away_for_little(known, monkeypatch):
    steps = dict.fromkeys(COSTS, TokenTimes(SLOW, SLOW))
    made_up(monkeypatch, steps | {4: TokenTimes(SLOW, rounds(*[1.95e-3] * 7))}, [])
    assert search_of(known, "measured").run(Reporter()).chosen.head_k_dim == 6


def test_what_is_worse_beyond_doubt_gains_nothing_by_speed(known, monkeypatch):
    steps = dict.fromkeys(COSTS, TokenTimes(SLOW, SLOW))
    made_up(monkeypatch, steps | dict.fromkeys((5, 8), TokenTimes(FAST, FAST)), [])
    assert search_of(known, "measured").run(Reporter()).chosen.head_k_dim == 6


def test_times_that_cannot_be_told_apart_leave_the_best(known, monkeypatch):
    shaky = rounds(1e-3, 3e-3, 1e-3, 3e-3, 1e-3, 3e-3, 1e-3)
    steps = dict.fromkeys(COSTS, TokenTimes(SLOW, SLOW))
    made_up(monkeypatch, steps | {4: TokenTimes(SLOW, shaky)}, [])
    assert search_of(known, "measured").run(Reporter()).chosen.head_k_dim == 6


def test_neighbours_of_the_best_are_measured_until_they_are_worse(known, monkeypatch):
    """Prediction names one alone; from there it goes downhill, channel by channel."""
    asked: list[int] = []
    made_up(monkeypatch, dict.fromkeys(COSTS, TokenTimes(SLOW, SLOW)), asked)
    monkeypatch.setattr(search_module, "MEASURED", 1)

    def by_keys(curves, grid, recovery):
        return [abs(sizes.head_k_dim - 8) for sizes in grid]

    monkeypatch.setattr(search_module, "predicted_losses", by_keys)
    found = search_of(known, "measured", targets=("key", "value")).run(Reporter())
    assert found.chosen.head_k_dim == 6
    assert asked == [8, 6, 5]  # of which the last is worse, so that 4 is left out
    assert [row.head_k_dim for row in found.candidates] == [6, 5, 8, 4]


@pytest.fixture
def found() -> Found:
    sizes = dict(key_heads=2, head_k_dim=6, head_v_dim=5)
    figures = dict(perplexity_increase=0.01, perplexity_error=0.002)
    rows = [
        Considered(**sizes, state_dtype="float32", state_bytes=480, predicted=0.2, **figures),
        Considered(key_heads=2, head_k_dim=8, head_v_dim=8, state_dtype="int8", state_bytes=384, predicted=0.0),
    ]
    keep = {"key": {0: 6, 1: 6}, "value": {0: 5, 1: 5}}
    frontier = {"float32": [(16, 1.0), (480, 0.2)], "int8": [(384, 0.0)]}
    about = {"dense_bytes": 1024, "recovery": "reconstruct", "measured_after": "128 steps of reconstruct"}
    return Found(mode="measured", candidates=tuple(rows), keep=keep, frontier=frontier, **about)


def test_json_has_what_is_known_and_no_more(found):
    content = json.loads(json.dumps(found.to_json()))
    assert content["chosen"] == content["candidates"][0] == {
        "key_heads": 2, "head_k_dim": 6, "head_v_dim": 5, "state_dtype": "float32", "state_bytes": 480,
        "predicted": 0.2, "perplexity_increase": 0.01, "perplexity_error": 0.002,
    }  # fmt: skip
    assert {name: content[name] for name in ("search", "recover", "measured_after", "dense_state_bytes")} == {
        "search": "measured",
        "recover": "reconstruct",
        "measured_after": "128 steps of reconstruct",
        "dense_state_bytes": 1024,
    }


def test_candidates_say_what_they_went_through():
    said = [
        measured_after(mode, torch.device(kind))
        for mode in (None, "least-squares", "reconstruct")
        for kind in ("cpu", "cuda")
    ]
    assert said == [None, None, *["least-squares"] * 3, "128 steps of reconstruct"]


def test_json_has_no_figures_of_what_was_not_measured(found):
    content = json.loads(json.dumps(found.to_json()))
    assert content["frontier"] == {"float32": [[16, 1.0], [480, 0.2]], "int8": [[384, 0.0]]}
    assert content["candidates"][1].keys() == {
        "key_heads", "head_k_dim", "head_v_dim", "state_dtype", "state_bytes", "predicted"
    }  # fmt: skip


def test_the_picture_says_what_was_measured(found):
    figure = draw_search(found.to_json(), "a model", about="text: notes.txt; a device")
    title = "a model: cuts that fit into the budget, reconstruct to follow"
    assert figure.get_suptitle().splitlines() == [title, "text: notes.txt; a device"]
    frontier, _, measured = figure.get_axes()
    assert len(frontier.lines) == 2 + 1  # of two formats, and the choice
    assert [label.get_text() for label in measured.get_xticklabels()] == ["2 x 6 x 5", "2 x 8 x 8"]
    (bars,) = measured.containers
    (segment,) = bars.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([100 * (0.01 - 2 * 0.002), 100 * (0.01 + 2 * 0.002)])
    assert measured.get_ylabel() == "perplexity over dense\n(%), measured\nafter 128 steps of reconstruct"
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["state in float32", "state in int8", "chosen", "twice the standard error"]
    assert not any(axes.get_legend() for axes in figure.get_axes())  # none lies on the data
    # Of many candidates the best are drawn, and the axis says how many are not.
    many = found.to_json()
    many["candidates"] += many["candidates"][1:] * 40
    assert "; 10 more, of a larger predicted loss," in draw_search(many, "a model").get_axes()[2].get_xlabel()


@pytest.mark.parametrize("mode", ["measured", "predicted"])
def test_the_report_and_its_picture_are_written(tmp_path, found, mode):
    plain = dataclasses.replace(found.candidates[0], perplexity_increase=None, perplexity_error=None)
    rows = found.candidates if mode == "measured" else (plain, found.candidates[1])
    found = dataclasses.replace(found, mode=mode, candidates=rows)
    for _ in range(2):  # the second takes the place of the first
        write_search(found, tmp_path / "budget.json", "a model")
    content = json.loads((tmp_path / "budget.json").read_text())
    assert content == {"model": "a model", **found.to_json()}
    picture = (tmp_path / "budget.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[12:16] == b"IHDR" and picture[-8:-4] == b"IEND"
    height = int.from_bytes(picture[20:24])
    assert height > 1400 if mode == "measured" else 900 < height < 1200
    assert {path.name for path in tmp_path.iterdir()} == {"budget.json", "budget.png"}


def test_methods_that_choose_heads_alone_search_heads_alone(known):
    source, text, statistics = known
    asked = budget(ratio="0.5", targets=("head",))
    given = dict(source=source, statistics=statistics, text=text, budget=asked, device=CPU)
    choose = dict(method=METHODS["rank-norm"], options={}, seed=0, correct=True)
    found = Search(**given, **choose, recovery=None, mode="predicted").run(Reporter())
    assert found.keep == {"head": {0: 1, 1: 1}} and len(found.candidates) == 1
