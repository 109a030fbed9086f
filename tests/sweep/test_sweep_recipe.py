"""Recipes: what they may say, and the line that says what is wrong with one."""

from pathlib import Path

import pytest

from keyreduce.api.benchmark import BenchmarkRequest
from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.api.recover import RecoverRequest
from keyreduce.checkpoint.find import shipped_models
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.methods import METHODS
from keyreduce.sweep.recipe import read_recipe, shipped_recipes
from keyreduce.sweep.request import QUICK

GOOD = """
models = ["one", "two"]
[calibration]
num_batches = 1
batch_size = 2
seq_len = 32
[heldout]
num_batches = 3
batch_size = 4
seq_len = 16
[recover]
num_batches = 5
batch_size = 6
seq_len = 7
[benchmark]
kinds = ["mixer"]
[[prune]]
target = "key"
ratios = [0.25, 0.5]
methods = ["rrqr", { method = "taylor", form = "squared" }]
repairs = ["none", "least-squares"]
[[prune]]
target = "value,head"
ratios = [0]
methods = [{ method = "l1" }]
"""


@pytest.fixture
def read(tmp_path):
    """A function: the recipe that a text is."""

    def of(text: str):
        (tmp_path / "recipe.toml").write_text(text)
        return read_recipe(tmp_path / "recipe.toml")

    return of


def test_the_recipe_of_a_sweep_that_names_none_ships():
    assert str(QUICK) in shipped_recipes()
    assert read_recipe(QUICK).models == tuple(sorted(shipped_models()))


def test_a_recipe(read):
    recipe = read(GOOD)
    assert recipe.models == ("one", "two")
    assert recipe.calibration == CalibrateRequest(num_batches=1, batch_size=2, seq_len=32)
    assert recipe.heldout == EvaluateRequest(num_batches=3, batch_size=4, seq_len=16)
    assert recipe.recover == RecoverRequest(num_batches=5, batch_size=6, seq_len=7)
    assert recipe.benchmark == BenchmarkRequest(mixer=True, decode_batch_sizes=8, max_batch_size=0)
    assert [(one.target, one.request.method, one.label, one.ratio, one.repair) for one in recipe.combinations] == [
        ("key", "rrqr", "rrqr", 0.25, "none"),
        ("key", "rrqr", "rrqr", 0.25, "least-squares"),
        ("key", "rrqr", "rrqr", 0.5, "none"),
        ("key", "rrqr", "rrqr", 0.5, "least-squares"),
        ("key", "taylor", "taylor (form squared)", 0.25, "none"),
        ("key", "taylor", "taylor (form squared)", 0.25, "least-squares"),
        ("key", "taylor", "taylor (form squared)", 0.5, "none"),
        ("key", "taylor", "taylor (form squared)", 0.5, "least-squares"),
        ("value,head", "l1", "l1", 0, "none"),
    ]
    assert recipe.needs_gradients
    assert not read(GOOD.replace('"taylor", form = "squared"', '"pca"')).needs_gradients
    assert read(GOOD.replace('"rrqr"', '{ method = "rrqr", f = 2 }')).combinations[0].label == "rrqr (f 2)"
    whole = read(
        GOOD.replace('"rrqr"', '{ method = "rrqr", permute = true }').replace(
            "ratios = [0.25", "multiple_of = 8\nratios = [0.25"
        )
    )
    assert whole.combinations[0].label == "rrqr (permute, multiple of 8)"
    assert whole.combinations[0].request.multiple_of == 8


def test_what_a_recipe_may_leave_out(read):
    recipe = read("\n".join(line for line in GOOD.splitlines() if not line.startswith(("models", "repairs"))))
    assert (recipe.models, recipe.seeds, recipe.per_seed, recipe.convert) == ((), (0,), False, True)
    assert {one.repair for one in recipe.combinations} == {"none"}
    start, end = GOOD.index("[recover]"), GOOD.index("[[prune]]")
    recipe = read(GOOD[:start] + GOOD[end:])
    assert recipe.benchmark is None
    assert recipe.recover == RecoverRequest(num_batches=1, batch_size=2, seq_len=32)  # as much text as for calibration
    recipe = read('[[prune]]\nratios = [0.5]\nmethods = ["l1"]')
    assert (recipe.calibration, recipe.heldout) == (CalibrateRequest(), EvaluateRequest())  # as the commands have it


def test_seeds_and_the_text_of_each(read):
    recipe = read("seeds = [3, 1]\nconvert = false\n" + GOOD)
    assert (recipe.seeds, recipe.convert) == ((3, 1), False)
    assert [recipe.calibration_seed(seed) for seed in recipe.seeds] == [3, 3]
    recipe = read("seeds = [3, 1]\n" + GOOD.replace("seq_len = 32", "seq_len = 32\nper_seed = true"))
    assert [recipe.calibration_seed(seed) for seed in recipe.seeds] == [3, 1]


def test_all_fields_of_timing_and_recovery(read):
    told = 'kinds = ["decode", "forward"]\nbatch_size = 2\nseq_len = 3\nrounds = 4\ndecode_batch_sizes = [5, 6]'
    text = GOOD.replace('kinds = ["mixer"]', told).replace("seq_len = 7", "seq_len = 7\nsteps = 8\nrepeats = 0")
    recipe = read(text)
    assert recipe.benchmark == BenchmarkRequest(
        decode=True, forward=True, batch_size=2, seq_len=3, rounds=4, decode_batch_sizes=(5, 6), max_batch_size=0
    )
    assert (recipe.recover.steps, recipe.recover.repeats) == (8, 0)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "models =",
            "model =",
            "model is unknown; known are models, seeds, convert, calibration, heldout, recover, benchmark, prune",
        ),
        ('["one", "two"]', "[true]", "models is True, where names belong"),
        ("[heldout]", "[held_out]", "held_out is unknown"),
        ("num_batches = 3", "num_batches = -1", "heldout.num_batches is -1; it is at least 0"),
        ("num_batches = 3", "num_batches = true", "heldout.num_batches is True, where a whole number belongs"),
        ("num_batches = 3", "num_batches = 3.0", "heldout.num_batches is 3.0, where a whole number belongs"),
        ("seq_len = 16", "seq_len = 16\nseed = 1", "heldout.seed is unknown; known are num_batches"),
        ("seq_len = 16", "seq_len = 1", "heldout.seq_len is 1; it is at least 2"),
        ("seq_len = 7", "seq_len = 7\nrepeats = 1", "recover.repeats is 1; it is a share of the rows"),
        ('target = "key"', 'target = "query"', "prune.target is 'query'; take one of key, value, head"),
        ('target = "key"', "target = 1", "prune.target is '1'; take one of key, value, head"),
        (
            'target = "key"',
            'target = "key"\nratio = 1',
            "prune.ratio is unknown; known are ratios, methods, repairs, target",
        ),
        ("[0.25, 0.5]", "0.25", "prune.ratios is 0.25, where a list with at least one value belongs"),
        ("[0.25, 0.5]", "[]", "prune.ratios is [], where a list"),
        ("[0.25, 0.5]", "[nan]", "prune.ratios is 'nan'; give a number"),
        ("[0.25, 0.5]", "[false]", "prune.ratios is False"),
        ('[{ method = "l1" }]', "[]", "prune.methods is [], where a list"),
        ('[{ method = "l1" }]', "[{}]", "prune.methods is {}, where a name or"),
        ('[{ method = "l1" }]', "[5]", "prune.methods is 5, where a name or"),
        ('[{ method = "l1" }]', "[{ method = 5 }]", "prune.methods is {'method': 5}, where a name or"),
        ('method = "l1"', 'method = "l3"', "there is no method 'l3'; take one of"),
        ('method = "l1"', 'method = "l1", form = "first"', "prune.methods l1 takes no prune.form"),
        ('form = "squared"', 'form = "third"', "prune.form is 'third'; take one of first"),
        ('form = "squared"', "form = []", "prune.form is [], where a string belongs"),
        ('"rrqr"', '{ method = "rrqr", f = "2" }', "prune.f is '2', where a number belongs"),
        ('"rrqr"', '{ method = "rrqr", f = true }', "prune.f is True, where a number belongs"),
        ('"rrqr"', '{ method = "rrqr", f = 0.5 }', "prune.f is 0.5; it is at least 1"),
        ('"rrqr"', '{ method = "rrqr", permute = 1 }', "prune.permute is 1, where true or false belongs"),
        ("[[prune]]", "[[prune", "is not valid TOML"),
        ("[calibration]", "[heldin]\n[calibration]", "heldin is unknown"),
        ("seq_len = 32", "seq_len = 32\nper_seed = 1", "calibration.per_seed is 1, where true or false belongs"),
        ("models =", "seeds = []\nmodels =", "seeds is empty"),
        ("models =", "seeds = [true]\nmodels =", "seeds is True, where whole numbers belong"),
        ("models =", "seeds = [1, 1]\nmodels =", "seeds is 1, 1; give at least one seed, and each of them once"),
        ("models =", "seeds = [-1]\nmodels =", "seeds is -1; it is at least 0"),
        ("models =", "convert = 1\nmodels =", "convert is 1, where true or false belongs"),
        ('repairs = ["none", "least-squares"]', "repairs = []", "prune.repairs is [], where a list"),
        ('"least-squares"', '"most-squares"', "prune.repairs is 'most-squares'; take one of auto, least-squares"),
        ('"least-squares"', "[]", "prune.repairs is [], where a string belongs"),
        ("seq_len = 7", "seq_len = 0", "recover.seq_len is 0; it is at least 1"),
        ("seq_len = 7", "seq_len = 7\nsteps = 0", "recover.steps is 0; it is at least 1"),
        ('kinds = ["mixer"]', "rounds = 3", "benchmark.kinds is None; give a list of some of mixer, forward"),
        ('kinds = ["mixer"]', "kinds = []", "benchmark.kinds is []; give a list of some of mixer, forward, decode"),
        ('kinds = ["mixer"]', 'kinds = ["train"]', "benchmark.kinds is ['train']; give a list of some of mixer"),
        ('kinds = ["mixer"]', 'kinds = "mixer"', "benchmark.kinds is 'mixer'; give a list of some of mixer"),
        ('kinds = ["mixer"]', 'kinds = ["mixer"]\nrounds = 0', "benchmark.rounds is 0; it is at least 1"),
        (
            'kinds = ["mixer"]',
            'kinds = ["mixer"]\ndecode_batch_sizes = [0]',
            "decode_batch_sizes is 0; it is at least 1",
        ),
        ('kinds = ["mixer"]', 'kinds = ["mixer"]\ndecode_batch_sizes = ["8"]', "is '8', where whole numbers belong"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(read, old, new, told):
    assert old in GOOD
    with pytest.raises(KeyreduceError) as caught:
        read(GOOD.replace(old, new, 1))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prune_is_a_list_of_tables(read):
    head = GOOD[: GOOD.index("[[prune]]")]
    refused = {
        "prune = []": r"prune is \[\], where at least one \[\[prune\]\] table belongs",
        "prune = [1]": "prune is 1, where a table belongs",
        "prune = {}": r"prune is \{\}, where at least one",
        "": r"there is no \[\[prune\]\] table, of which a recipe has at least one",
    }
    for prune, told in refused.items():
        with pytest.raises(KeyreduceError, match=told):
            read(f"{prune}\n{head}")
    with pytest.raises(KeyreduceError, match="heldout is 5, where a table belongs"):
        read("heldout = 5\nprune = [{}]")


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused = {"missing.toml": "there is no recipe", ".": "cannot be read", "binary.toml": "is not valid TOML"}
    for path, told in refused.items():
        with pytest.raises(KeyreduceError, match=told):
            read_recipe(tmp_path / path)


def test_a_name_that_no_recipe_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    those = f"hose that ship are {', '.join(shipped_recipes())}"
    no_file = "neither a file nor one that ships"
    for name, told in {
        "nosuch": f"there is no recipe 'nosuch', {no_file}; t{those}",
        "quik": f"there is no recipe 'quik', {no_file}; did you mean quick? T{those}",
        "my/Method.toml": f"there is no recipe 'my/Method.toml', {no_file}; did you mean methods? T{those}",
    }.items():
        with pytest.raises(KeyreduceError) as error:
            read_recipe(Path(name))
        assert str(error.value) == told


def test_a_recipe_that_ships_is_found_by_its_name_but_a_file_comes_first(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("quick")).models == ("delta-net-5m", "gated-deltanet-5m")
    assert [read_recipe(Path(name)).path for name in shipped_recipes()] == [Path(name) for name in shipped_recipes()]
    Path("quick").write_text(GOOD)
    assert read_recipe(Path("quick")).models == ("one", "two")


def test_the_shipped_recipe_of_methods_holds_every_method_on_every_target():
    recipe = read_recipe(Path("methods"))
    # auto is one of the others.
    assert {(one.request.method, one.target) for one in recipe.combinations} == {
        (name, target) for name, method in METHODS.items() if name != "auto" for target in method.select
    }
