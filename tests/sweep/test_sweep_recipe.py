"""Recipes: what they may say, and the line that says what is wrong with one."""

from pathlib import Path

import pytest

from keyreduce.calibration.run import Settings
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.methods import METHODS
from keyreduce.sweep.recipe import Recovery, Timing, read_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "sweep").glob("*.toml"))
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


def test_a_recipe(read):
    recipe = read(GOOD)
    assert recipe.models == ["one", "two"]
    assert recipe.calibration == Settings(1, 2, 32)
    assert recipe.heldout == Settings(3, 4, 16)
    assert recipe.recovery == Recovery(5, 6, 7, None)
    assert recipe.timing == Timing(("mixer",))
    assert [(cell.target, cell.method, cell.label, cell.ratio, cell.repair) for cell in recipe.cells] == [
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
    assert recipe.cells[0].options == {"f": 1.5, "permute": False}
    assert recipe.cells[-1].budget.targets == ["value", "head"]
    assert recipe.needs_gradients
    assert not read(GOOD.replace('"taylor", form = "squared"', '"pca"')).needs_gradients
    assert read(GOOD.replace('"rrqr"', '{ method = "rrqr", f = 2 }')).cells[0].label == "rrqr (f 2)"


def test_what_a_recipe_may_leave_out(read):
    recipe = read("\n".join(line for line in GOOD.splitlines() if not line.startswith(("models", "repairs"))))
    assert (recipe.models, recipe.seeds, recipe.per_seed, recipe.convert) == ([], [0], False, True)
    assert {cell.repair for cell in recipe.cells} == {"none"}
    start, end = GOOD.index("[recover]"), GOOD.index("[[prune]]")
    recipe = read(GOOD[:start] + GOOD[end:])
    assert recipe.timing is None
    assert recipe.recovery == Recovery(1, 2, 32)  # as much text as for calibration


def test_seeds_and_the_text_of_each(read):
    recipe = read("seeds = [3, 1]\nconvert = false\n" + GOOD)
    assert (recipe.seeds, recipe.convert) == ([3, 1], False)
    assert [recipe.calibration_seed(seed) for seed in recipe.seeds] == [3, 3]
    recipe = read("seeds = [3, 1]\n" + GOOD.replace("seq_len = 32", "seq_len = 32\nper_seed = true"))
    assert [recipe.calibration_seed(seed) for seed in recipe.seeds] == [3, 1]


def test_all_fields_of_timing_and_recovery(read):
    told = 'kinds = ["decode", "forward"]\nbatch_size = 2\nseq_len = 3\nrounds = 4\ndecode_batch_sizes = [5, 6]'
    text = GOOD.replace('kinds = ["mixer"]', told).replace("seq_len = 7", "seq_len = 7\nsteps = 8\nrepeats = 0")
    recipe = read(text)
    assert recipe.timing == Timing(("decode", "forward"), 2, 3, 4, (5, 6))
    assert (recipe.recovery.steps, recipe.recovery.repeats) == (8, 0)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("models =", "model =", "model is unknown; known are calibration, heldout, prune, models, seeds"),
        ('["one", "two"]', '"one"', "models is 'one', where a list belongs"),
        ('["one", "two"]', "[1]", "models is no list of names"),
        ("[heldout]", "[held_out]", "held_out is unknown"),
        ("num_batches = 3", "", "heldout.num_batches is missing; it is a whole number"),
        ("num_batches = 3", "num_batches = 0", "heldout: --num-batches is 0; it is at least 1"),
        ("num_batches = 3", "num_batches = true", "heldout.num_batches is True, where a whole number belongs"),
        ("num_batches = 3", "num_batches = 3.0", "heldout.num_batches is 3.0, where a whole number belongs"),
        ("seq_len = 16", "seq_len = 16\nseed = 1", "heldout.seed is unknown; known are num_batches"),
        ("seq_len = 16", "seq_len = 1", "heldout.seq_len is 1; it is at least 2"),
        ("seq_len = 7", "seq_len = 7\nrepeats = 1", "recover: --repeats is 1; it is a share of the rows"),
        ('target = "key"', 'target = "query"', "there is no target 'query'"),
        ('target = "key"', "target = 1", "prune.target is 1, where a string belongs"),
        ('target = "key"', 'target = "head"', "rrqr does not choose heads"),
        ('target = "key"', 'target = "key"\nratio = 1', "prune.ratio is unknown; known are target, ratios, methods"),
        ("[0.25, 0.5]", "0.25", "prune.ratios is 0.25, where a list belongs"),
        ("[0.25, 0.5]", "[]", "prune.ratios is empty"),
        ("[0.25, 0.5]", "[1]", "a ratio is 1; it is the share to remove, from 0 to below 1"),
        ("[0.25, 0.5]", "[-0.5]", "a ratio is -0.5"),
        ("[0.25, 0.5]", "[nan]", "a ratio is nan"),
        ("[0.25, 0.5]", "[false]", "a ratio is False"),
        ("[0.25, 0.5]", '["0.5"]', "a ratio is '0.5'"),
        ('[{ method = "l1" }]', "[]", "prune.methods is empty"),
        ('[{ method = "l1" }]', "[{}]", "a method is {}, where a name or"),
        ('[{ method = "l1" }]', "[5]", "a method is 5, where a name or"),
        ('[{ method = "l1" }]', "[{ method = 5 }]", "a method is {'method': 5}, where a name or"),
        ('method = "l1"', 'method = "l3"', "there is no method 'l3'; take one of"),
        ('method = "l1"', 'method = "l1", form = "first"', "--method l1 takes no --form"),
        ('form = "squared"', 'form = "third"', "--form is 'third'; take one of first"),
        ('form = "squared"', "form = []", "form of taylor is [], where a string belongs"),
        ('"rrqr"', '{ method = "rrqr", f = "2" }', "f of rrqr is '2', where a number belongs"),
        ('"rrqr"', '{ method = "rrqr", f = true }', "f of rrqr is True, where a number belongs"),
        ('"rrqr"', '{ method = "rrqr", f = 0.5 }', "--f is 0.5; it is at least 1"),
        ('"rrqr"', '{ method = "rrqr", permute = 1 }', "permute of rrqr is 1, where true or false belongs"),
        ("[[prune]]", "[[prune", "is not valid TOML"),
        ("[calibration]", "[heldin]\n[calibration]", "heldin is unknown"),
        ("seq_len = 32", "seq_len = 32\nper_seed = 1", "calibration.per_seed is 1, where true or false belongs"),
        ("models =", "seeds = []\nmodels =", "seeds is empty"),
        ("models =", "seeds = [true]\nmodels =", "seeds is no list of whole numbers"),
        ("models =", "seeds = [1, 1]\nmodels =", "seeds is 1, 1; seeds differ from each other"),
        ("models =", "seeds = [-1]\nmodels =", "seeds is -1; seeds differ from each other and are 0 to 4294967295"),
        ("models =", "convert = 1\nmodels =", "convert is 1, where true or false belongs"),
        ('repairs = ["none", "least-squares"]', "repairs = []", "prune.repairs is empty"),
        ('"least-squares"', '"most-squares"', "a repair is 'most-squares'; known are none, least-squares, reconstruct"),
        ('"least-squares"', "[]", "a repair is []"),
        ("seq_len = 7", "", "recover.seq_len is missing"),
        ("seq_len = 7", "seq_len = 0", "recover: --seq-len is 0; it is at least 1"),
        ("seq_len = 7", "seq_len = 7\nsteps = 0", "recover.steps is 0; it is at least 1"),
        ('kinds = ["mixer"]', "", "benchmark.kinds is missing"),
        ('kinds = ["mixer"]', "kinds = []", "benchmark.kinds is empty"),
        ('kinds = ["mixer"]', 'kinds = ["train"]', "benchmark.kinds has 'train'; known are mixer, forward, decode"),
        ('kinds = ["mixer"]', 'kinds = ["mixer"]\nrounds = 0', "a number of benchmark is below 1"),
        ('kinds = ["mixer"]', 'kinds = ["mixer"]\ndecode_batch_sizes = [0]', "a number of benchmark is below 1"),
        ('kinds = ["mixer"]', 'kinds = ["mixer"]\ndecode_batch_sizes = []', "decode_batch_sizes is empty"),
        ('kinds = ["mixer"]', 'kinds = ["mixer"]\ndecode_batch_sizes = ["8"]', "is no list of whole numbers"),
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
    refused = {"prune = []": "prune is empty", "prune = [1]": "prune is no table", "": "prune is missing"}
    for prune, told in refused.items():
        with pytest.raises(KeyreduceError, match=told):
            read(f"{prune}\n{head}")
    with pytest.raises(KeyreduceError, match="where a list belongs"):
        read(f"{head}\n[prune]\ntarget = 'key'")


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused = {"missing.toml": "cannot be read", ".": "cannot be read", "binary.toml": "is not valid TOML"}
    for path, told in refused.items():
        with pytest.raises(KeyreduceError, match=told):
            read_recipe(tmp_path / path)


def test_the_shipped_recipe_of_methods_holds_every_method_on_every_target():
    recipe = read_recipe(next(path for path in SHIPPED if path.stem == "methods"))
    # auto is one of the others.
    assert {(cell.method, cell.target) for cell in recipe.cells} == {
        (name, target) for name, method in METHODS.items() if name != "auto" for target in method.select
    }
