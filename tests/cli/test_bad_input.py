"""What a bad input gets: one line on stderr, exit code 2, and nothing written."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import edit_config, edit_tensors

CALIBRATE = ("calibrate", "--num-batches", "1", "--seq-len", "32")
PRUNE = ("prune", "--method", "l1")
BENCHMARK = ("benchmark", "--rounds", "1", "--seq-len", "8")
EVAL = ("eval", "--num-batches", "1", "--seq-len", "32")
RECIPE = """
models = ["nonsense"]
calibration = { num_batches = 1, batch_size = 1, seq_len = 32 }
heldout = { num_batches = 1, batch_size = 1, seq_len = 32 }
prune = [{ target = "key", ratios = [0.5], methods = ["l1"] }]
"""
QUERY = "model.layers.1.attn.q_proj.weight"
KNOWN = "knows: bailing_hybrid, delta_net, delta_net_2"


@pytest.fixture
def snapshot(tmp_path: Path):
    """A function: each file and folder there is, with what it holds."""

    def look() -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in tmp_path.rglob("*")
        }

    return look


@pytest.fixture
def refused(keyreduce, snapshot):
    """A function: run a command that must fail, and return its line."""

    def run(*arguments: object, notes: int = 0) -> str:
        before = snapshot()
        result = keyreduce(*arguments)
        assert result.code == 2
        assert result.out == ""
        *noted, line = result.err.splitlines()
        assert len(noted) <= notes
        assert line.startswith("keyreduce: ")
        assert "Traceback" not in result.err
        assert snapshot() == before
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--ratio", "-0.1"), "--ratio is -0.1; it is the share to remove, at least 0 and below 1"),
        (("--ratio", "1"), "--ratio is 1; it is the share to remove, at least 0 and below 1"),
        (("--ratio", "1.5"), "--ratio is 1.5"),
        (("--ratio", "nan"), "--ratio is 'nan'; give a number"),
        (("--ratio", "abc"), "--ratio is 'abc'; give a number, or one for each target with commas"),
        (("--ratio", "0.1,0.2"), "--ratio 0.1,0.2 gives 2 numbers for 1 targets (key)"),
        (("--keep", "0"), "--keep is 0; a key head of this model has 1 to 16 channels to keep"),
        (("--keep", "1000"), "--keep is 1000; a key head of this model has 1 to 16 channels to keep"),
        (("--keep", "x"), "--keep is 'x'; give a number"),
        (("--keep", "1e3"), "--keep is 1000; a key head of this model has 1 to 16 channels to keep"),
        (("--keep", "1e400"), "--keep is '1e400'; give a number"),
        (("--keep", "1e-400"), "channels to keep"),
        (("--keep", "9" * 400), "; give a number"),
        (("--ratio", "1e999999999"), "--ratio is '1e999999999'; give a number"),
        (("--ratio", "1e-999999999"), "--ratio is '1e-999999999'; give a number"),
        (("--ratio", "4/3"), "--ratio is 1.33333; it is the share to remove"),
        (("--ratio", "1/0"), "--ratio is '1/0'; give a number"),
        (("--ratio", ","), "--ratio is ','; give a number"),
        (("--ratio", ""), "--ratio is ''; give a number"),
        (("--keep", "2.5"), "--keep is 2.5; a key head of this model has 1 to 16 channels to keep"),
        (("--keep", "17", "--target", "value"), "a value head of this model has 1 to 16 channels to keep"),
        (("--keep", "3", "--target", "head"), "--keep is 3; a layer of this model has 1 to 2 key heads to keep"),
        (("--keep", "4", "--ratio", "0.5"), "either --ratio (or PRUNING_RATIO) or --keep, not both"),
        (("--multiple-of", "0"), "--multiple-of is 0"),
        (("--method", "wandaa"), "there is no method 'wandaa'; did you mean wanda?"),
        (("--method", "zzz"), "take one of auto, rrqr, wanda, taylor, pca, l1, l2, magnitude, energy, rank-norm"),
        (("--target", "query"), "--target is 'query'; take one of key, value, head"),
        (("--target", "key,key"), "--target key,key names a target twice"),
        (("--target", ""), "--target is ''"),
        (("--method", "pca", "--target", "value"), "--method pca is for --target key alone; for value take another"),
        (
            ("--method", "rrqr", "--target", "key,head"),
            "--method rrqr is for --target key and --target value alone; for head take another",
        ),
        (("--f", "1.2"), "--method l1 takes no --f"),
        (("--set", "f=1.2"), "--set f=1.2: give NAME=VALUE; options of l1: none"),
        (("--method", "rrqr", "--set", "f=0.5"), "--f is 0.5; it is at least 1"),
        (("--permute",), "--method l1 takes no --permute"),
        (("--include-queries",), "--method l1 takes no --include-queries"),
        (("--form", "first"), "--method l1 takes no --form"),
        (("--method", "rrqr", "--f", "0.9"), "--f is 0.9; it is at least 1"),
        (("--method", "rrqr", "--f", "nan"), "--f is nan; it is at least 1"),
        (("--method", "taylor", "--form", "third"), "--form is 'third'; take one of first, squared, element"),
        (("--variance", "0.9"), "--variance goes with --method pca --target key"),
        (("--method", "pca", "--variance", "0.9", "--rank", "3"), "leave --ratio (or PRUNING_RATIO) and --keep out"),
        (("--method", "pca", "--variance", "0"), "--variance is 0; it is the share to keep"),
        (("--method", "pca", "--variance", "1.5"), "--variance is 1.5; it is the share to keep"),
        (("--allocate", "evenly"), "--allocate is 'evenly'; take one of uniform, energy"),
        (("--allocate", "energy"), "a delta_net config says one head_k_dim for all layers"),
        (("--allocate", "energy", "--target", "head"), "--allocate energy distributes key channels"),
        (("--seed", "-1"), "--seed is -1; it is at least 0"),
        (("--seed", "9" * 30), "it is at most 4,294,967,295"),
        (("--dtype", "float13"), "--dtype is 'float13'; take one of float32, bfloat16, float16"),
        (("--device", "meta"), "device 'meta' cannot be used here"),
        (("--nonsense",), "No such option: --nonsense"),
        (("more",), "unexpected extra argument"),
    ],
)
def test_prune_options(refused, tiny_folder, arguments, told):
    assert told in refused("prune", "--method", "l1", "--model", tiny_folder("delta_net"), *arguments)


def test_more_text_than_there_can_be(refused):
    assert "--num-batches is 1000000000000; it is at most" in refused("calibrate", "--num-batches", 10**12)


@pytest.mark.parametrize("command", [CALIBRATE, BENCHMARK, EVAL])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--dtype", "float13"), "'float13'"),
        (("--device", "bogus"), "device 'bogus' cannot be used here"),
        (("--batch-size", "0"), "--batch-size"),
        (("--seq-len", "0"), "--seq-len"),
        (("--seq-len", "x"), "--seq-len"),
        (("--work",), "requires an argument"),
    ],
)
def test_options_of_the_others(refused, command, arguments, told):
    assert told in refused(*command, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [CALIBRATE, ("prune",), BENCHMARK, EVAL])
def test_cuda_where_there_is_none(refused, command):
    assert "device 'cuda' cannot be used here" in refused(*command, "--device", "cuda")


@pytest.mark.parametrize("command", [CALIBRATE, PRUNE, BENCHMARK, EVAL])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nonsense", "there is no model 'nonsense': give a checkpoint folder, a name on the hub (owner/name), or a"),
        ("n" * 300, "there is no model"),
        ("", "there is no model ''"),  # a variable of a shell that is not set
        ("nonsense/nonsense", "there is no folder nonsense/nonsense, and the hub did not give a model of that name"),
        (".", "has no config.json"),
    ],
)
def test_no_such_model(refused, command, model, told):
    assert told in refused(*command, "--model", model)


def test_no_such_source_to_convert(refused, tmp_path):
    assert "there is no pruned model at keyreduce-out/pruned; run keyreduce prune" in refused("convert-dcp")
    assert "there is no model 'nonsense'" in refused("convert-dcp", "nonsense")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("convert-dcp", tmp_path / "empty")


DAMAGED = {
    "llama": (lambda folder: edit_config(folder, model_type="llama"), f"keyreduce {KNOWN}"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config cut short": (lambda folder: (folder / "config.json").write_text('{"a":'), "is not valid JSON"),
    "heads as text": (lambda folder: edit_config(folder, num_heads="2"), "num_heads is '2'"),
    "weights cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors is not a valid safetensors file: it may be truncated",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "NaN": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors[QUERY].fill_(float("nan"))),
        f"tensor '{QUERY}' of",
    ),
    "inf": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors[QUERY].fill_(float("inf"))),
        "holds NaN or inf: the checkpoint is damaged",
    ),
    "a tensor less": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(QUERY)), f"missing: {QUERY}"),
    "a layer less": (lambda folder: edit_config(folder, num_hidden_layers=3), "missing: model.layers.2."),
    "other heads": (
        lambda folder: edit_config(folder, num_heads=4),
        "not those that its config.json asks for; of another shape: model.layers.0.attn.b_proj.weight",
    ),
}


@pytest.mark.parametrize("command", [CALIBRATE, PRUNE, ("prune",), BENCHMARK, EVAL], ids=" ".join)
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_models(refused, tiny_copy, command, damage):
    change, told = DAMAGED[damage]
    folder = tiny_copy()
    change(folder)
    # That it calibrates, and calibrates first, is said before the weights are read.
    assert told in refused(*command, "--model", folder, notes=2)


def test_a_model_without_tokenizer(refused, tiny_copy):
    folder = tiny_copy()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for command in (CALIBRATE, EVAL):
        line = refused(*command, "--model", folder, notes=1)
        assert "has no tokenizer that loads (there is no file of one); put the tokenizer.json" in line
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "has no tokenizer that loads" in refused(*EVAL, "--model", folder)


def test_activations_that_overflow(refused, tiny_copy):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors[QUERY].fill_(3e38))
    assert "activations of layer 1 hold NaN or inf" in refused(*CALIBRATE, "--model", folder, notes=1)
    assert "hold NaN or inf" in refused(*EVAL, "--model", folder, notes=1)


def test_text(refused, tiny_folder, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "one.pdf").touch()
    for command in (CALIBRATE, EVAL):
        for name, told in [
            ("empty.txt", "the text is empty"),
            ("missing.txt", "there is no text file or folder"),
            ("binary.txt", "is not UTF-8 text"),
            ("one.pdf", "is of no kind that is read"),
        ]:
            line = refused(*command, "--model", tiny_folder("delta_net"), "--text", tmp_path / name, notes=1)
            assert told in line
            assert name in line
        assert "give one of them" in refused(*command, "--text", tmp_path / "empty.txt", "--dataset", "x")


def test_calibration_files(refused, keyreduce, tiny_folder, tmp_path):
    model = ("--model", tiny_folder("delta_net"))
    good, cut = tmp_path / "good", tmp_path / "cut"
    assert keyreduce(*CALIBRATE, *model, "--output", good).code == 0
    cut.write_bytes(good.read_bytes()[:-8])
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, told in [
        (cut, "is not a valid safetensors file: it may be truncated"),
        (tmp_path / "missing", "there is no calibration file"),
        (tmp_path / "link", f"link is a link to {tmp_path / 'gone'}, which is not there; make it with keyreduce calib"),
        (tmp_path, "cannot be read"),
        (tiny_folder("delta_net") / "model.safetensors", "is not a calibration file"),
    ]:
        line = refused("prune", *model, "--calibration", path)
        assert told in line
        assert str(path) in line
    line = refused("prune", "--model", tiny_folder("gated_deltanet"), "--calibration", good)
    assert "the calibration file was made from another model" in line
    assert "run keyreduce calibrate for this one" in line


@pytest.mark.parametrize("method", ["rrqr", "pca", "energy", "wanda"])
def test_sums_that_hold_nan(refused, keyreduce, tiny_folder, tmp_path, method):
    model = ("--model", tiny_folder("delta_net"))
    assert keyreduce(*CALIBRATE, *model, "--output", tmp_path / "sums").code == 0
    with safe_open(tmp_path / "sums", framework="pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    tensors["layers.1.query_gram_HKK"][0, 0, 1] = float("nan")
    save_file(tensors, tmp_path / "sums", metadata=metadata)
    line = refused("prune", *model, "--method", method, "--calibration", tmp_path / "sums")
    assert f"{tmp_path / 'sums'} holds NaN or inf: it is damaged; make it again with keyreduce calibrate" in line


def test_sums_that_are_all_zero(refused, keyreduce, tiny_folder, tmp_path):
    """As they were with versions of transformers whose mixers' calls went unseen."""
    model = ("--model", tiny_folder("delta_net"))
    assert keyreduce(*CALIBRATE, *model, "--output", tmp_path / "sums").code == 0
    with safe_open(tmp_path / "sums", framework="pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    for name in ("query", "key", "unit_query", "unit_key"):
        tensors[f"layers.1.{name}_gram_HKK"].zero_()
    save_file(tensors, tmp_path / "sums", metadata=metadata)
    line = refused("prune", *model, "--method", "rrqr", "--calibration", tmp_path / "sums")
    assert f"{tmp_path / 'sums'}: the statistics of layer 1 hold none of its queries" in line
    assert "keyreduce works with transformers 5.6.2 to 5.24" in line


def test_sums_without_gradients(refused, keyreduce, tiny_folder):
    model = ("--model", tiny_folder("delta_net"))
    assert keyreduce(*CALIBRATE, *model).code == 0
    line = refused("prune", *model, "--method", "taylor")
    assert "taylor needs gradients, which the calibration file does not hold" in line
    assert "run keyreduce calibrate --gradients --overwrite" in line


@pytest.mark.parametrize("variable", ["PRUNING_RATIO", "KEYREDUCE_PRUNING_RATIO"])
def test_a_value_of_the_environment_is_called_by_its_variable(refused, tiny_folder, monkeypatch, variable):
    monkeypatch.setenv(variable, "abc")
    told = refused(*PRUNE, "--model", tiny_folder("delta_net"))
    assert told == f"keyreduce: {variable} is 'abc'; give a number, or one for each target with commas"


def test_a_name_that_the_hub_does_not_take_is_refused_before_the_work(refused, tiny_folder):
    told = refused(*PRUNE, "--model", tiny_folder("delta_net"), "--push-to-hub", "owner/small model")
    assert "--push-to-hub is 'owner/small model', which is no name on the hub: " in told


def test_statistics_of_few_tokens(keyreduce, tiny_folder, tmp_path):
    """Of fewer tokens than channels that stay nothing can be chosen; of few more the choice is said to be poor."""
    model, text = tiny_folder("delta_net"), tmp_path / "short.txt"
    text.write_text("elevenchar")  # with the separator before it
    arguments = ("prune", "--model", model, "--text", text, "--keep")
    result = keyreduce(*arguments, 12)
    assert result.code == 2
    told = "the calibration statistics are of 11 tokens, too few to choose 12 of 16 channels by; calibrate on more text"
    assert result.err.splitlines()[-1] == f"keyreduce: {told} (keyreduce calibrate --overwrite)"
    result = keyreduce(*arguments, 11)
    assert result.code == 0
    told = "are of 11 tokens alone, to choose 11 of 16 channels by: calibrate on more text, 128 tokens at least"
    assert told in result.err
    text.write_text("x" * 127)
    result = keyreduce("calibrate", "--model", model, "--text", text, "--seq-len", 128, "--overwrite")
    result = keyreduce("prune", "--model", model, "--keep", 11, "--overwrite")
    assert result.code == 0 and "alone, to choose" not in result.err


@pytest.mark.parametrize("variable", ["PRUNING_RATIO", "KEYREDUCE_PRUNING_RATIO"])
def test_an_amount_on_the_command_line_overrules_one_of_the_environment(keyreduce, tiny_folder, monkeypatch, variable):
    monkeypatch.setenv(variable, "0.5")
    model = ("--model", tiny_folder("delta_net"))
    assert keyreduce(*PRUNE, *model, "--json").json()["head_k_dim"] == [16, 8]
    assert keyreduce(*PRUNE, *model, "--keep", 4, "--output", "four", "--json").json()["head_k_dim"] == [16, 4]
    assert keyreduce(*PRUNE, *model, "--ratio", 0.25, "--output", "b", "--json").json()["head_k_dim"] == [16, 12]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(refused, tiny_folder, tmp_path, monkeypatch):
    # The last one last: whoever imports from it first would keep what stands in for it.
    for module in ("calibration.run", "models.loading"):
        monkeypatch.setattr(f"keyreduce.{module}.load_model", lambda *args, **options: pytest.fail("work was done"))
    (tmp_path / "file").touch()
    (tmp_path / "recipe.toml").write_text(RECIPE)
    model = ("--model", tiny_folder("delta_net"))
    for command in (("prune", *model), (*EVAL, *model), (*BENCHMARK, *model), ("sweep", tmp_path / "recipe.toml")):
        assert "cannot write to" in refused(*command, "--output", tmp_path / "file" / "below")
        assert "cannot write to" in refused(*command, "--work", tmp_path / "file")


def test_outputs_that_exist(refused, keyreduce, tiny_folder, tmp_path):
    model = ("--model", tiny_folder("delta_net"))
    for arguments in ((*CALIBRATE, *model), ("prune", *model), ("convert-dcp",), ("convert-dcp", "keyreduce-out/dcp")):
        assert keyreduce(*arguments).code == 0
    assert "differs in seed" in refused(*CALIBRATE, *model, "--seed", 1)
    assert "differs in model" in refused(*CALIBRATE, "--model", tiny_folder("gated_deltanet"))
    assert "differs in keep" in refused("prune", *model, "--ratio", 0.5)
    assert "differs in keep, method, target" in refused("prune", *model, "--method", "magnitude")
    assert "differs in source" in refused("convert-dcp", tiny_folder("delta_net"))
    (tmp_path / "other").mkdir()
    assert "keyreduce did not write it" in refused("prune", *model, "--output", tmp_path / "other")
    assert "keyreduce did not write it" in refused("convert-dcp", "keyreduce-out/dcp", tmp_path / "other")
    (tmp_path / "figures.json").touch()
    for command in (BENCHMARK, EVAL):
        assert "figures.json exists; pass --overwrite" in refused(*command, "--output", tmp_path / "figures.json")


def test_an_output_that_differs_is_refused_before_calibration(refused, keyreduce, tiny_folder):
    model = ("--model", tiny_folder("delta_net"))
    assert keyreduce(*PRUNE, *model).code == 0
    assert "differs in corrected, keep, method, target" in refused("prune", *model)
    assert not Path("keyreduce-out/calibration.safetensors").exists()


def test_what_is_replaced_is_never_the_source(refused, tiny_copy, keyreduce):
    folder = tiny_copy("outer/model")
    for output in (folder, folder.parent, folder / ".." / "model"):
        line = refused(*PRUNE, "--model", folder, "--output", output, "--overwrite")
        assert "is, or holds, the model itself" in line
    assert keyreduce("convert-dcp", folder, "dcp").code == 0
    for output in ("dcp", "dcp/step-0"):
        assert "is, or holds, the model itself" in refused("convert-dcp", "dcp", output, "--overwrite")
        assert "is, or holds, the model itself" in refused(*PRUNE, "--model", "dcp", "--output", "dcp", "--overwrite")


def test_what_is_replaced_is_of_the_same_kind(refused, tiny_folder, tmp_path):
    model = ("--model", tiny_folder("delta_net"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    (tmp_path / "file").touch()
    told = "is a folder, where a file is to be written"
    assert told in refused(*CALIBRATE, *model, "--output", tmp_path / "folder", "--overwrite", notes=1)
    assert told in refused(*EVAL, *model, "--output", tmp_path / "folder", "--overwrite", notes=1)
    told = "is a file, where a folder is to be written"
    assert told in refused(*PRUNE, *model, "--output", tmp_path / "file", "--overwrite")
    assert "holds the current folder" in refused(*PRUNE, *model, "--output", ".", "--overwrite")
    assert "cannot write to" in refused(*PRUNE, *model, "--output", tmp_path / "file" / "below")
    assert "cannot write to" in refused(*PRUNE, *model, "--work", tmp_path / "file")


def test_distributed_checkpoints(refused, keyreduce, tiny_folder, tmp_path):
    assert keyreduce("convert-dcp", tiny_folder("delta_net"), tmp_path / "dcp").code == 0
    step = tmp_path / "dcp" / "step-0"
    shutil.copytree(step, tmp_path / "cut")
    (tmp_path / "cut" / "__0_0.distcp").write_bytes(b"")
    (step / "config.json").unlink()
    assert "has no config.json" in refused("convert-dcp", step)
    assert "there is no file nonsense" in refused("convert-dcp", step, "--config", "nonsense")
    assert "has no config.json" in refused(*EVAL, "--compressed", step)
    assert "has no config.json" in refused(*PRUNE, "--model", step)
    assert "is too short to hold" in refused("convert-dcp", tmp_path / "cut")


def test_a_pruned_model_that_does_not_say_of_what(refused, keyreduce, tiny_folder):
    other = tiny_folder("gated_deltanet")
    for command in (BENCHMARK, EVAL):
        line = refused(*command, "--compressed", other)
        assert "does not say what it was pruned from; name that with --model" in line
        assert keyreduce(*command, "--compressed", other, "--model", tiny_folder("delta_net")).code == 0


def test_a_damaged_record(refused, keyreduce, tiny_folder):
    model = ("--model", tiny_folder("delta_net"))
    assert keyreduce(*PRUNE, *model).code == 0
    Path("keyreduce-out/pruned/keyreduce.json").write_text('{"steps": [{}]}')
    for arguments in ((*PRUNE, *model), EVAL, BENCHMARK, (*PRUNE, "--model", "keyreduce-out/pruned", "--output", "x")):
        assert "keyreduce.json is damaged" in refused(*arguments)
    assert keyreduce(*PRUNE, *model, "--overwrite").code == 0


def test_models_that_cannot_be_compared(refused, tiny_folder):
    line = refused(*BENCHMARK, "--compressed", tiny_folder("delta_net"), "--model", "delta-net-5m")
    assert "differ in hidden size (256 and 32)" in line


def test_no_command_and_no_such_command(keyreduce):
    result = keyreduce()
    assert (result.code, result.err) == (2, "keyreduce: name a command (see keyreduce --help)\n")
    assert "convert-dcp" in result.out
    result = keyreduce("prunee")
    assert result.code == 2
    assert "No such command 'prunee'. Did you mean 'prune'?" in result.err


def test_debug_shows_the_traceback(monkeypatch, keyreduce):
    """Python prints what is raised."""
    from keyreduce.cli import errors, main
    from keyreduce.errors import KeyreduceError

    keyreduce("prune", "--keep", 0)
    monkeypatch.setattr("sys.argv", ["keyreduce", "prune", "--keep", "0", "--debug"])
    with pytest.raises(KeyreduceError, match="`keep` is 0"):
        main()
    assert errors.show_tracebacks
