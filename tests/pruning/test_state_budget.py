"""A budget of bytes: what texts say, and the sizes that fit, against all sizes tried one by one."""

import itertools
import math
from fractions import Fraction

import hybrid_models
import pytest
from cuts import build, store

from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes, family_of
from keyreduce.pruning.state_budget import StateBudget, find_candidates
from keyreduce.serving.capacity import cache_memory, state_bytes_that_fit
from keyreduce.serving.engines import runs
from keyreduce.serving.state_formats import bytes_of

ALL = ("key", "value", "head")


def budget(**changed) -> StateBudget:
    given = dict(ratio=None, bytes=None, fit=None, dtypes=("float32",), targets=ALL, multiple_of=None, engine=None)
    return StateBudget.of(**given | changed)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Four key heads of 8 x 6, in two layers."""
    config = {"hidden_size": 32, "num_heads": 4, "expand_v": 0.75}
    return store(build("delta_net", config).float(), tmp_path_factory.mktemp("budget") / "dense")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Two key heads and four value heads of 32 x 48."""
    config = {"num_heads": 2, "num_v_heads": 4, "head_dim": 32, "expand_v": 1.5, "num_hidden_layers": 1}
    return store(build("gated_deltanet", config).float(), tmp_path_factory.mktemp("budget") / "grouped")


def test_texts_are_read():
    assert budget(ratio="0.3").ratio == Fraction(3, 10)
    assert budget(bytes="36MiB").bytes == 36 * 2**20
    assert budget(fit="80GB, 4096, 200").fit == (80 * 10**9, 4096, 200)
    assert budget(ratio="0.5").describe() == {"state_ratio": 0.5, "state_dtypes": ["float32"]}
    described = budget(fit="1GiB,2,3", dtypes=("int8",), multiple_of=16, engine="vllm").describe()
    assert described == {"fit": (2**30, 2, 3), "state_dtypes": ["int8"], "multiple_of": 16, "engine": "vllm"}


REFUSED = {
    "`state_ratio` and `state_bytes` both": {"ratio": "0.5", "bytes": "1KiB"},
    "`state_bytes` and `fit` both": {"bytes": "1KiB", "fit": "80GB,4096,200"},
    "`state_ratio` is 1; it is the share": {"ratio": "1"},
    "`state_ratio` is 0; it is the share": {"ratio": "0"},
    "`state_ratio` is 'half'; it is the share of the state's bytes to remove, one number": {"ratio": "half"},
    "`state_ratio` is -0.5; it is the share": {"ratio": "-0.5"},
    "`state_bytes` is 'much'": {"bytes": "much"},
    "`fit` is '80GB'; give GPU memory, tokens": {"fit": "80GB"},
    "`fit` is '80GB,0,200'": {"fit": "80GB,0,200"},
    "`fit` is '80GB,4096,-3'": {"fit": "80GB,4096,-3"},
    "`fit` is 'much'; give an amount": {"fit": "much,4096,200"},
    "`state_dtypes` names a format twice": {"ratio": "0.5", "dtypes": ("int8", "int8")},
    "`multiple_of` is 0": {"ratio": "0.5", "multiple_of": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_budget_is_refused_in_one_line(message):
    with pytest.raises(KeyreduceError) as error:
        budget(**REFUSED[message])
    assert message in str(error.value).replace("much,4096,200", "much") and "\n" not in str(error.value)


def state_bytes(sizes: MixerSizes, layers: int, bits: int = 32) -> int:
    return layers * sizes.value_heads * sizes.head_k_dim * sizes.head_v_dim * bits // 8


def brute_force(before: MixerSizes, layers: int, most: int, targets, bits: int = 32) -> set[MixerSizes]:
    """All sizes from an eighth (heads: a half) on, every one that fits and below no other."""
    heads = range(math.ceil(before.key_heads / 2), before.key_heads + 1) if "head" in targets else [before.key_heads]
    ranges = [
        range(max(1, math.ceil(size / 8)), size + 1) if target in targets else [size]
        for target, size in (("key", before.head_k_dim), ("value", before.head_v_dim))
    ]
    group = before.value_heads // before.key_heads
    every = [MixerSizes(n, n * group, key, value) for n, key, value in itertools.product(heads, *ranges)]
    fitting = [one for one in every if state_bytes(one, layers, bits) <= most]
    return {one for one in fitting if not any(is_below(one, other) for other in fitting)}


def is_below(one: MixerSizes, other: MixerSizes) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


SOME = [ALL, ("key", "value"), ("key",), ("value",), ("head",), ("value", "head")]


@pytest.mark.parametrize("targets", SOME, ids=str)
@pytest.mark.parametrize("ratio", ["0.1", "0.5", "0.75"])
def test_candidates_are_the_largest_sizes_that_fit(dense, ratio, targets):
    before = MixerSizes(4, 4, 8, 6)
    most = int(state_bytes(before, 2) * (1 - Fraction(ratio)))
    expected = brute_force(before, 2, most, targets)
    if not expected:
        with pytest.raises(KeyreduceError, match=f"no cut of {','.join(targets)} brings .* to {most:,} bytes"):
            find_candidates(dense, budget(ratio=ratio, targets=targets))
        return
    found = find_candidates(dense, budget(ratio=ratio, targets=targets))
    assert {one.sizes for one in found} == expected and len(found) == len(expected)
    assert before not in expected
    for one in found:
        assert one.state_dtype == "float32"
        assert one.state_bytes == state_bytes(one.sizes, 2) <= most


def test_bytes_say_the_same_as_a_share(dense):
    whole = state_bytes(MixerSizes(4, 4, 8, 6), 2)
    assert whole == 1536  # small enough to be said: parse_memory knows no plain bytes
    assert find_candidates(dense, budget(bytes="0.75KiB")) == find_candidates(dense, budget(ratio="0.5"))


def test_wide_heads_are_cut_in_steps(grouped):
    """Key channels by sixteenths of 32, value channels by two, from an eighth on."""
    found = find_candidates(grouped, budget(ratio="0.6"))
    most = 4 * 32 * 48 * 4 * 2 // 5
    assert len({one.sizes for one in found}) == len(found) > 10
    for one in found:
        heads, value_heads, key, value = one.sizes
        assert key % 2 == value % 2 == 0 and key >= 4 and value >= 6 and value_heads == 2 * heads
        assert one.state_bytes <= most
        assert not any(is_below(one.sizes, other.sizes) for other in found)
        # No further step fits.
        for larger in (one.sizes._replace(head_k_dim=key + 2), one.sizes._replace(head_v_dim=value + 2)):
            assert larger.head_k_dim > 32 or larger.head_v_dim > 48 or state_bytes(larger, 1) > most


def test_multiples_alone_are_taken(grouped):
    found = find_candidates(grouped, budget(ratio="0.6", multiple_of=16))
    assert {(*one.sizes[:1], *one.sizes[2:]) for one in found} == {
        (1, 32, 32), (1, 16, 48), (2, 16, 32), (2, 32, 16),
    }  # fmt: skip


def test_every_format_has_candidates_of_its_own(dense):
    before = MixerSizes(4, 4, 8, 6)
    whole = state_bytes(before, 2)
    found = find_candidates(dense, budget(ratio="0.6", dtypes=("float32", "bfloat16", "int8")))
    by_format = {
        dtype: {one.sizes for one in found if one.state_dtype == dtype} for dtype in ("float32", "bfloat16", "int8")
    }
    most = int(whole * Fraction(2, 5))
    assert by_format["float32"] == brute_force(before, 2, most, ALL)
    assert by_format["bfloat16"] == brute_force(before, 2, most, ALL, bits=16)
    # A byte a number and four for the scale of each row of 8: 576 of 614.
    assert by_format["int8"] == {before}
    for one in found:
        assert one.state_bytes == bytes_of(one.state_dtype, dict.fromkeys(range(2), one.sizes)) <= most


def test_a_format_that_is_enough_leaves_the_model_as_it_is(dense):
    found = find_candidates(dense, budget(ratio="0.5", dtypes=("float32", "bfloat16")))
    assert [one.sizes for one in found if one.state_dtype == "bfloat16"] == [MixerSizes(4, 4, 8, 6)]


# vLLM pads both sizes to one power of two, SGLang takes powers of two alone.
SIZES_OF_ENGINES = {"fla": (128, 64), "vllm": (80, 102), "sglang": (128, 64)}


@pytest.mark.parametrize("engine", SIZES_OF_ENGINES)
def test_the_engine_runs_every_candidate(tmp_path, engine):
    """Heads of Qwen3-Next are of this size."""
    config = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=128, linear_value_head_dim=128)
    source = open_folder(hybrid_models.store(hybrid_models.build("qwen3_next", **config), tmp_path / "dense"))
    family, most = family_of(source.config), 2 * 2 * 128 * 128 * 4 // 2
    found = find_candidates(source, budget(ratio="0.5", engine=engine))
    free = find_candidates(source, budget(ratio="0.5"))
    assert all(runs(engine, family, one.sizes) and one.state_bytes <= most for one in found)
    assert not any(is_below(one.sizes, other.sizes) for one in found for other in found)
    # None that the engine runs is lost because it is below one that it does not run.
    assert MixerSizes(2, 2, *SIZES_OF_ENGINES[engine]) in {one.sizes for one in found}
    assert all(runs(engine, family, one.sizes) for one in free) == (engine == "fla")


def test_sizes_that_are_tied_stay_so(tmp_path):
    """Kimi Linear has as many key as value channels: 5 x 5 of 8 x 8 fits, though 5 x 6 would too."""
    source = open_folder(hybrid_models.store(hybrid_models.build("kimi_linear"), tmp_path / "dense"))
    before = next(iter(family_of(source.config).layer_sizes(source.config).values()))
    assert before[2:] == (8, 8)
    found = find_candidates(source, budget(ratio="0.5", targets=("key", "value")))
    assert [one.sizes[2:] for one in found] == [(5, 5)]
    assert {one.sizes[2:] for one in find_candidates(source, budget(ratio="0.5"))} == {(5, 5), (8, 8)}
    with pytest.raises(KeyreduceError, match="no cut of key brings"):
        find_candidates(source, budget(ratio="0.5", targets=("key",)))


def test_a_fit_is_what_the_engine_leaves_for_states(dense):
    tokens, sequences, memory = 4096, 28_000_000, 60 * 10**9
    room = cache_memory(memory, dense.nbytes, "vllm", gpus=1, reserve_bytes=4 * 10**9)
    most = state_bytes_that_fit(dense.config, room, tokens, sequences, "vllm", dtype="float32")
    assert 0 < most < 1536
    asked = budget(fit=f"60GB,{tokens},{sequences}")
    assert asked.most_bytes(dense, "float32") == most
    assert {one.sizes for one in find_candidates(dense, asked)} == brute_force(MixerSizes(4, 4, 8, 6), 2, most, ALL)


IMPOSSIBLE = {
    "nothing to remove": {"bytes": "1MiB"},
    "leave no room for a state": {"fit": "5GB,4096,999999999"},
    "no cut of key brings the state of a sequence from 1,536 to 1 bytes: allow more bytes, or more `target`s": {
        "ratio": "0.999", "targets": ("key",)
    },
}  # fmt: skip


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_line(dense, message):
    with pytest.raises(KeyreduceError) as error:
        find_candidates(dense, budget(**IMPOSSIBLE[message]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_layers_of_different_sizes_are_refused(tmp_path):
    source = store(build("delta_net_2", {"hidden_size": 32, "expand_k": [1.0, 0.5]}).float(), tmp_path / "dense")
    with pytest.raises(KeyreduceError, match="layers of this model differ .*: give `ratio` or `keep`"):
        find_candidates(source, budget(ratio="0.5"))


def test_a_model_without_states_is_refused(tmp_path):
    source = store(build("delta_net", {"num_hidden_layers": 1}).float(), tmp_path / "dense")
    source.config["attn"] = {"layers": [0], "num_heads": 2}
    with pytest.raises(KeyreduceError, match="has no layer with a recurrent state, so there is nothing to prune"):
        find_candidates(source, budget(ratio="0.5"))
