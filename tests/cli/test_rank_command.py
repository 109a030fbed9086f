"""``keyreduce rank``: its report, its table, its pictures, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import FAMILIES, build, edit_tensors, save, tensors_of

RANK = ("rank", "--num-batches", 1, "--batch-size", 2, "--seq-len", 72, "--every", 32)
PRUNE = ("prune", "--method", "l1")
WORK = Path("keyreduce-out")
PICTURES = {"filters-layer-00.png", "filters-layer-01.png", "rank-curves.png", "rank-heat-map.png"}
# Value heads of the tiny models.
VALUE_HEADS = {"delta_net": 2, "delta_net_2": 2, "gated_deltanet": 4}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_dense_model_alone(keyreduce, tiny_folder):
    result = keyreduce(*RANK, "--model", tiny_folder("delta_net"), "--json")
    report = result.json()
    assert json.loads((WORK / "rank.json").read_text()) == report
    assert "there is no pruned model" in result.err
    assert (report["seq_len"], report["every"], report["positions"]) == (72, 32, [32, 64, 72])
    (dense,) = report["models"]
    assert (dense["label"], dense["sequences"]) == ("dense", 2)
    for number, entry in enumerate(dense["layers"]):
        assert (entry["layer"], entry["head_k_dim"], entry["head_v_dim"]) == (number, 16, 16)
        shares_WP = np.array(entry["utilisation"])
        assert shares_WP.shape == (2, 3)
        assert ((shares_WP >= 1 / 16) & (shares_WP <= 1)).all()
    assert names(WORK / "rank") == PICTURES
    assert report["pictures"] == [str(WORK / "rank" / name) for name in sorted(PICTURES)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_dense_against_pruned_in_two_steps(keyreduce, tiny_folder, model_type):
    keyreduce(*PRUNE, "--model", tiny_folder(model_type), "--target", "head", "--ratio", 0.5, "--output", "one")
    assert keyreduce(*PRUNE, "--model", "one", "--ratio", 0.25, "--output", "two").code == 0
    report = keyreduce(*RANK, "--compressed", "two", "--json").json()
    dense, pruned = report["models"]
    assert [entry["heads"] for entry in dense["layers"]] == [list(range(VALUE_HEADS[model_type]))] * 2
    before, after = tensors_of(tiny_folder(model_type)), tensors_of(Path("two"))
    for layer, (full, cut) in enumerate(zip(dense["layers"], pruned["layers"], strict=True)):
        assert cut["head_k_dim"] == full["head_k_dim"] * 3 // 4
        # What each head is called is what its gate's row was in the dense model.
        name = f"model.layers.{layer}.attn.b_proj.weight"
        rows = [[(row == of).all() for of in before[name]].index(True) for row in after[name]]
        assert cut["heads"] == rows
        assert np.shape(cut["utilisation"]) == (len(rows), 3)
    assert names(WORK / "rank") == PICTURES | {"kept-channels.png"}


def test_tables_and_outputs_that_are_named(keyreduce, tiny_folder):
    model = ("--model", tiny_folder("delta_net"))
    keyreduce(*PRUNE, *model)
    named = ("--output", "figures.json", "--plot", "pictures")
    result = keyreduce(*RANK, *model, *named)
    assert (result.code, result.err) == (0, "")
    assert "stable rank, mean of the heads: 2 sequences of 72 tokens" in result.out
    assert "wrote figures.json, and 5 pictures in pictures" in result.out
    report = json.loads(Path("figures.json").read_text())
    for entry in report["models"]:
        for layer in entry["layers"]:
            shares_WP = np.array(layer["utilisation"])
            assert f"{layer['head_k_dim']} x 16" in result.out
            side = min(layer["head_k_dim"], 16)
            assert f"{side * shares_WP.mean():.2f}" in result.out
            assert f"{side * shares_WP[:, -1].mean():.2f}" in result.out
    for given in (named[:2], named[2:]):
        again = keyreduce(*RANK, *model, *given)
        assert (again.code, again.out) == (2, "")
        assert "exists; pass --overwrite" in again.err
    assert keyreduce(*RANK, *model, *named, "--overwrite").code == 0
    assert not (WORK / "rank").exists()
    assert not (WORK / "rank.json").exists()


def test_a_model_that_was_not_made_from_the_dense_one(keyreduce, tiny_folder):
    keyreduce(*PRUNE, "--model", tiny_folder("delta_net"))
    refused = keyreduce(*RANK, "--model", tiny_folder("gated_deltanet"))
    assert (refused.code, refused.out) == (2, "")
    assert "was not made from" in refused.err and "pass --unrelated" in refused.err
    result = keyreduce(*RANK, "--model", tiny_folder("gated_deltanet"), "--unrelated", "--json")
    assert "the pruned model was not made from this dense one" in result.err
    assert [entry["heads"] for entry in result.json()["models"][1]["layers"]] == [[0, 1]] * 2
    assert names(WORK / "rank") == PICTURES


def test_text_that_is_short(keyreduce, tiny_folder):
    Path("short.txt").write_text("abc")
    result = keyreduce(*RANK, "--model", tiny_folder("delta_net"), "--text", "short.txt", "--json")
    assert "the text is shorter than one sequence: 4 tokens instead of 72" in result.err
    assert result.json()["positions"] == [4]


def test_what_is_refused_leaves_nothing(keyreduce, tiny_copy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.attn.k_conv1d.weight"].fill_(1e38))
    for arguments, told in [
        (("--plot", tmp_path / "full", "--overwrite"), "holds other files, such as 'letter.txt'"),
        (("--every", 0), "--every"),
        (("--device", "cuda:77"), "device 'cuda:77' cannot be used here"),
        (("--compressed", "nonsense"), "nonsense"),
        (("--model", folder), "the states of layer 1 of"),
    ]:
        result = keyreduce(*RANK, "--model", folder, *arguments)
        assert (result.code, result.out) == (2, "")
        assert told in result.err
        assert "Traceback" not in result.err
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"
    assert not WORK.exists()


def test_an_unrelated_model_of_fewer_layers(keyreduce, tiny_folder, tmp_path):
    assert keyreduce(*PRUNE, "--model", tiny_folder("delta_net"), "--ratio", 0.5).code == 0
    other = save(build("gated_deltanet", num_hidden_layers=1), tmp_path / "other")
    shown = keyreduce(*RANK, "--model", other, "--unrelated")
    assert shown.code == 0
    first, second = (line.split() for line in shown.out.splitlines() if line.split()[:1] in (["0"], ["1"]))
    assert len(first) == 11 and len(second) == 6  # "16 x 16" and two shares, of both models or of the pruned alone
