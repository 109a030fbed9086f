"""Every method on every target that it chooses, through the command line: what is said, recorded and written.

Shapes: H key heads, W value heads, K key channels and V value channels of a head, D hidden, R kept.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, build, draw_tokens, edit_tensors, save, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.calibration.file import write_statistics
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import text_source
from keyreduce.pruning.methods import METHODS

CALIBRATE = ("calibrate", "--num-batches", 1, "--batch-size", 2, "--seq-len", 32)
EVAL = ("eval", "--num-batches", 1, "--batch-size", 2, "--seq-len", 32, "--json")
WORK = Path("keyreduce-out")
# Key heads, value heads, key channels, value channels of the tiny models.
SIZES = {"delta_net": (2, 2, 16, 16), "delta_net_2": (2, 2, 16, 16), "gated_deltanet": (2, 4, 12, 24)}
SIZE = {"key": "head_k_dim", "value": "head_v_dim", "head": "key_heads"}
CODE = {"configuration_delta_net_2.py", "mixer_delta_net_2.py", "modeling_delta_net_2.py"}


@pytest.fixture(scope="module")
def calibrated(tiny_folder, tmp_path_factory):
    """A function: the calibration file of a tiny model, with gradients, made once."""
    made = {}

    def sums(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("sums") / model_type
            statistics = calibrate(
                open_folder(tiny_folder(model_type)), text_source(default="calibration"), Settings(1, 4, 32),
                device=torch.device("cpu"), dtype=torch.float32, gradients=True,
            )  # fmt: skip
            write_statistics(statistics, made[model_type])
        return made[model_type]

    return sums


@pytest.fixture
def prune(keyreduce, tiny_folder, calibrated):
    """A function: prune a tiny model into a folder, and return what was printed, read from JSON."""

    def run(model_type: str, *arguments: object, output: str = "pruned") -> dict:
        given = ("--model", tiny_folder(model_type), "--calibration", calibrated(model_type), "--output", output)
        return keyreduce("prune", *given, *arguments, "--overwrite", "--json").json()

    return run


def last_step(folder: str | Path = "pruned") -> dict:
    return json.loads((Path(folder) / "keyreduce.json").read_text())["steps"][-1]


def logits(folder: str | Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        return model.eval()(draw_tokens(2, 9)).logits


def rows(weight: torch.Tensor, heads: list[int], channels: list[list[int]], groups: int) -> torch.Tensor:
    """Rows of a projection, head by head, by plain indexing."""
    weight_HKD = weight.view(groups, -1, weight.shape[1])
    return torch.cat([weight_HKD[head, kept] for head, kept in zip(heads, channels, strict=True)])


def check_against_weights(dense_folder: Path, folder: Path, sizes: tuple[int, int, int, int]) -> None:
    """The projections are the dense ones' rows that the record names, or what its projection makes of them."""
    dense, cut, step = tensors_of(dense_folder), tensors_of(folder), last_step(folder)
    heads_before, value_heads_before, *_ = sizes
    group = value_heads_before // heads_before
    for layer, chosen in step["layers"].items():
        name = f"model.layers.{layer}.attn.{{}}_proj.weight".format
        value_heads = [head * group + i for head in chosen["heads"] for i in range(group)]
        assert cut[name("v")].equal(rows(dense[name("v")], value_heads, chosen["value"], value_heads_before))
        for kind in "qk":
            whole = dense[name(kind)]
            if chosen["key"] is not None:
                assert cut[name(kind)].equal(rows(whole, chosen["heads"], chosen["key"], heads_before))
                continue
            with np.load(folder / "keyreduce.npz") as arrays:
                projection_HKR = torch.from_numpy(arrays[f"steps.0.layers.{layer}.projection_HKR"])
            expected = projection_HKR.double().mT @ whole.view(heads_before, -1, whole.shape[1]).double()
            assert torch.allclose(cut[name(kind)].double(), expected.flatten(0, 1), atol=1e-6)


CASES = [
    (model_type, method, target)
    for model_type in FAMILIES
    for method, definition in METHODS.items()
    for target in definition.select
]


@pytest.mark.parametrize(("model_type", "method", "target"), CASES)
def test_every_method_on_every_target(prune, tiny_folder, model_type, method, target):
    result = prune(model_type, "--method", method, "--target", target, "--ratio", 0.5)
    before = dict(zip(("key_heads", "value_heads", "head_k_dim", "head_v_dim"), SIZES[model_type], strict=True))
    after = before | {SIZE[target]: before[SIZE[target]] // 2}
    if target == "head":
        after["value_heads"] //= 2
    assert {name: result[name] for name in before} == {name: [before[name], after[name]] for name in before}
    assert (result["method"], result["target"], result["made"]) == (method, target, True)
    states = [4 * 2 * s["value_heads"] * s["head_k_dim"] * s["head_v_dim"] for s in (before, after)]
    assert result["state_bytes_per_sequence"] == states
    counts = [tensors_of(folder) for folder in (tiny_folder(model_type), Path("pruned"))]
    for name, part in (("model_parameters", ""), ("mixer_parameters", ".attn.")):
        numbers = [sum(t.numel() for key, t in tensors.items() if part in key) for tensors in counts]
        assert result[name] == numbers
        assert numbers[1] < numbers[0]
    assert logits("pruned").isfinite().all()
    check_against_weights(tiny_folder(model_type), Path("pruned"), SIZES[model_type])
    assert Path("pruned/keyreduce.npz").is_file() == (method == "pca")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_several_targets_at_once(prune, keyreduce, tiny_folder, model_type):
    _heads, value_heads, keys, values = SIZES[model_type]
    result = prune(model_type, "--target", "key,value,head", "--ratio", "0.25,0.75,1/2")
    kept = (1, value_heads // 2, keys * 3 // 4, values // 4)
    after = [result[name][1] for name in ("key_heads", "value_heads", "head_k_dim", "head_v_dim")]
    assert tuple(after) == kept
    check_against_weights(tiny_folder(model_type), Path("pruned"), SIZES[model_type])
    # The order of the targets goes with the order of the numbers, and changes nothing else.
    prune(model_type, "--target", "head, key,value", "--keep", f"1,{kept[2]},{kept[3]}", output="other")
    for name, tensor in tensors_of(Path("pruned")).items():
        assert tensors_of(Path("other"))[name].equal(tensor)
    assert prune(model_type, "--target", "key,value,head", "--keep", "8,4,1")["head_v_dim"] == [values, 4]
    assert prune(model_type, "--target", "key,value", "--ratio", "0.5")["head_k_dim"] == [keys, keys // 2]


@pytest.mark.parametrize("target", ["key", "value", "head", "key,value,head"])
def test_the_sentence_on_screen_and_in_the_record(keyreduce, tiny_folder, target):
    arguments = ("--method", "l1", "--target", target, "--ratio", 0.5, "--output", "pruned")
    result = keyreduce("prune", "--model", tiny_folder("gated_deltanet"), *arguments)
    shrunk = 100 * (1 - 0.5 ** (1 + target.count(",")))
    folders = (tiny_folder("gated_deltanet"), Path("pruned"))
    before, after = (sum(tensor.numel() for tensor in tensors_of(folder).values()) for folder in folders)
    sentence = last_step()["smaller"]
    assert sentence.startswith(f"the state of a sequence is {shrunk:.1f}% smaller (0.01 to ")
    assert sentence.endswith(f"the whole model {100 * (1 - after / before):.1f}%")
    assert sentence in result.out.splitlines()
    assert ("key heads" in result.out) == ("head" in target)
    assert ("key channels a head" in result.out) == ("key" in target)


def test_options_of_methods_reach_them(prune):
    def choice(*arguments):
        prune("delta_net", *arguments, "--keep", 5)
        return [layer["key"] for layer in last_step()["layers"].values()]

    prune("delta_net", "--method", "rrqr", "--f", 1, "--keep", 5)
    strict = last_step()
    assert strict["inputs"]["options"] == {"f": 1.0, "permute": False}
    assert all(rho <= 1 + 1e-6 for layer in strict["layers"].values() for rho in layer["report"]["key"]["rho"])
    prune("delta_net", "--method", "rrqr", "--f", 1e6, "--keep", 5, "--permute")
    loose = last_step()
    assert loose["inputs"]["options"] == {"f": 1e6, "permute": True}
    assert all(layer["report"]["key"]["swaps"] == [0, 0] for layer in loose["layers"].values())
    forms = [choice("--method", "taylor", "--form", form) for form in ("first", "squared", "element")]
    assert forms[0] == choice("--method", "taylor")
    assert len({json.dumps(form) for form in forms}) > 1
    seeds = [choice("--method", "random", "--seed", seed) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_pca_by_rank_by_variance_and_with_queries(prune):
    prune("delta_net_2", "--method", "pca", "--rank", 7, "--include-queries", output="both")
    prune("delta_net_2", "--method", "pca", "--keep", 7, output="keys")
    assert last_step("both")["inputs"]["options"] == {"include_queries": True}
    with np.load("both/keyreduce.npz") as both, np.load("keys/keyreduce.npz") as keys:
        for name, projection_HKR in both.items():
            assert np.allclose(projection_HKR.swapaxes(1, 2) @ projection_HKR, np.eye(7), atol=1e-6)
            assert not np.allclose(projection_HKR, keys[name], atol=1e-3)
    for model_type, is_per_layer in (("delta_net", False), ("delta_net_2", True)):
        result = prune(model_type, "--method", "pca", "--variance", 0.9)
        ranks = [layer["after"]["head_k_dim"] for layer in last_step()["layers"].values()]
        kept = [np.mean(layer["report"]["key"]["variance_kept"]) for layer in last_step()["layers"].values()]
        assert result["head_k_dim"] == [16, ranks if len(set(ranks)) > 1 else ranks[0]]
        assert min(kept) >= 0.9 if is_per_layer else np.mean(kept) >= 0.9
        assert logits("pruned").isfinite().all()
        assert last_step()["inputs"]["keep"] == {"variance": 0.9, "multiple_of": 1}
    assert prune("delta_net_2", "--method", "pca", "--variance", 1)["head_k_dim"] == [16, 16]


@pytest.fixture
def uneven(tmp_path) -> Path:
    """A DeltaNet2 whose first layer has most of its q and k in a few channels."""
    folder = save(build("delta_net_2"), tmp_path / "uneven")

    def concentrate(tensors):
        for kind in "qk":
            tensors[f"model.layers.0.attn.{kind}_proj.weight"].view(2, 16, 32)[:, 3:] *= 0.01

    edit_tensors(folder, concentrate)
    return folder


def test_energy_shares_channels_out_among_layers(keyreduce, uneven):
    keyreduce(*CALIBRATE, "--model", uneven)
    options = ("--allocate", "energy", "--ratio", 0.5)
    result = keyreduce("prune", "--model", uneven, "--method", "rrqr", *options, "--json").json()
    first, second = result["head_k_dim"][1]
    assert first < second
    assert first + second == 2 * 8
    assert result["state_bytes_per_sequence"] == [4 * 2 * 2 * 16 * 16, 4 * 2 * 16 * 16]
    assert json.loads((WORK / "pruned" / "config.json").read_text())["expand_k"] == [first / 16, second / 16]
    assert last_step(WORK / "pruned")["inputs"]["keep"] == {"key": 8, "allocate": "energy", "multiple_of": 1}
    cut = tensors_of(WORK / "pruned")
    assert [len(cut[f"model.layers.{layer}.attn.q_proj.weight"]) for layer in (0, 1)] == [2 * first, 2 * second]
    table = keyreduce("prune", "--model", uneven, "--method", "rrqr", *options, "--output", "again")
    assert f"{first} to {second}" in table.out
    # It runs, is measured, and prunes again.
    assert logits(WORK / "pruned").isfinite().all()
    dense, pruned = keyreduce(*EVAL).json()["models"]
    assert dense["predictions"] == pruned["predictions"] == 2 * 31
    timed = keyreduce("benchmark", "--rounds", 1, "--seq-len", 8, "--json").json()["models"][1]
    assert timed["head_k_dim"] == (first, second)[timed["layer"]]
    again = ("--model", WORK / "pruned", "--method", "l1", "--ratio", 0.5, "--output", "twice", "--json")
    assert keyreduce("prune", *again).json()["head_k_dim"] == [[first, second], [max(1, first // 2), second // 2]]
    assert last_step("twice")["inputs"]["keep"] == {"key": [max(1, first // 2), second // 2]}
    assert logits("twice").isfinite().all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pruned_model_is_pruned_again(keyreduce, prune, tiny_folder, model_type):
    prune(model_type, "--method", "pca", "--keep", 9, output="once")
    arguments = ("--num-batches", 1, "--seq-len", 32, "--output", "sums")
    assert keyreduce("calibrate", "--model", "once", *arguments).code == 0
    for output, model, options in [
        ("twice", "once", ("--method", "pca", "--keep", 6, "--calibration", "sums")),
        ("thrice", "twice", ("--method", "l1", "--target", "head,value", "--keep", "1,5")),
    ]:
        assert keyreduce("prune", "--model", model, *options, "--output", output).code == 0
        assert logits(output).isfinite().all()
    record = json.loads(Path("thrice/keyreduce.json").read_text())
    assert record["dense"] == str(tiny_folder(model_type))
    assert [step["inputs"]["method"] for step in record["steps"]] == ["pca", "pca", "l1"]
    assert [step["inputs"]["source"] for step in record["steps"][1:]] == [
        open_folder(Path(folder)).identity for folder in ("once", "twice")
    ]
    keys = SIZES[model_type][2]
    for folder, shapes in {
        "once": {"steps.0": (2, keys, 9)},
        "twice": {"steps.0": (2, keys, 9), "steps.1": (2, 9, 6)},
        "thrice": {"steps.0": (2, keys, 9), "steps.1": (2, 9, 6)},
    }.items():
        with np.load(f"{folder}/keyreduce.npz") as arrays:
            found = {name: array.shape for name, array in arrays.items()}
        expected = {(step, layer): shape for step, shape in shapes.items() for layer in (0, 1)}
        assert found == {f"{s}.layers.{n}.projection_HKR": shape for (s, n), shape in expected.items()}
    # They go along through a distributed checkpoint, and one that cannot be read is told.
    assert keyreduce("convert-dcp", "thrice", "dcp").code == 0
    assert keyreduce("convert-dcp", "dcp", "back").code == 0
    assert Path("back/keyreduce.npz").read_bytes() == Path("thrice/keyreduce.npz").read_bytes()
    Path("once/keyreduce.npz").write_bytes(b"PK nothing")
    options = ("--method", "pca", "--keep", 6, "--calibration", "sums")
    result = keyreduce("prune", "--model", "once", *options, "--output", "again")
    assert result.code == 2
    assert "keyreduce.npz is damaged" in result.err
    assert not Path("again").exists()


def test_taylor_calibrates_with_gradients_where_there_are_no_sums(keyreduce, tiny_folder, monkeypatch):
    # Few tokens are enough here.
    monkeypatch.setattr(Settings.__new__, "__defaults__", (1, 2, 32, 0))
    model = ("--model", tiny_folder("delta_net"))
    result = keyreduce("prune", *model, "--method", "taylor", "--json")
    assert result.json()["method"] == "taylor"
    assert "calibrating first" in result.err
    assert "calibrating delta_net on cpu (float32, with gradients)" in result.err
    assert last_step(WORK / "pruned")["inputs"]["calibration"]["gradients"] is True
    again = keyreduce("prune", *model, "--method", "taylor", "--json")
    assert again.json()["made"] is False


def test_gradients_change_nothing_for_methods_that_need_none(keyreduce, tiny_folder):
    model = ("--model", tiny_folder("delta_net"))
    wanda = ("prune", *model, "--method", "wanda")
    assert keyreduce(*CALIBRATE, *model).code == 0
    assert keyreduce(*wanda).code == 0
    assert keyreduce(*CALIBRATE, *model, "--gradients", "--overwrite").code == 0
    for command in (wanda, (*CALIBRATE, *model), (*CALIBRATE, *model, "--gradients")):
        result = keyreduce(*command, "--json")
        assert result.json()["made"] is False
        assert "is there already, from the same inputs" in result.err
    assert "gradients" not in last_step(WORK / "pruned")["inputs"]["calibration"]


def test_deltanet2_goes_to_a_distributed_checkpoint_and_back(keyreduce, uneven):
    # The code beside a model travels with it, and is not run: what it says here would end the program.
    for name in CODE:
        (uneven / name).write_text("raise SystemExit('this code was run')\n")
    keyreduce(*CALIBRATE, "--model", uneven)
    options = ("--allocate", "energy", "--ratio", 0.5)
    assert keyreduce("prune", "--model", uneven, "--method", "energy", *options).code == 0
    assert keyreduce("convert-dcp").code == 0
    assert keyreduce("convert-dcp", WORK / "dcp").code == 0
    config = json.loads((uneven / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_delta_net_2.DeltaNet2ForCausalLM"
    for folder in (WORK / "pruned", WORK / "dcp" / "step-0", WORK / "hf"):
        assert {path.name for path in folder.glob("*.py")} == CODE
        assert all((folder / name).read_bytes() == (uneven / name).read_bytes() for name in CODE)
        assert json.loads((folder / "config.json").read_text())["auto_map"] == config["auto_map"]
        assert len(json.loads((folder / "config.json").read_text())["expand_k"]) == 2
    for name, tensor in tensors_of(WORK / "pruned").items():
        assert tensors_of(WORK / "hf")[name].equal(tensor)
    whole = keyreduce(*EVAL).json()["models"]
    for folder in (WORK / "dcp", WORK / "hf"):
        models = keyreduce(*EVAL, "--compressed", folder).json()["models"]
        assert models[1]["perplexity_per_token"] == whole[1]["perplexity_per_token"]
    timed = keyreduce("benchmark", "--compressed", WORK / "hf", "--rounds", 1, "--seq-len", 8)
    assert (timed.code, timed.err) == (0, "")
