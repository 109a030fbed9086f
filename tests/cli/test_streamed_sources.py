"""A DCP is pruned as a stream, and the output's dtype and shards are chosen."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keyreduce.checkpoint.folder import open_folder

PRUNE = ("prune", "--method", "l2", "--ratio", 0.5, "--model")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_a_dcp_prunes_as_its_folder_does(keyreduce, tiny_folder, layout, monkeypatch):
    model = tiny_folder("delta_net")
    assert keyreduce("convert-dcp", model, "dcp", "--layout", layout, "--step", 7).code == 0
    config = Path("dcp/step-7/config.json").rename("config.json")
    result = keyreduce(*PRUNE, "dcp", "--output", "x")
    assert result.code == 2 and "--config" in result.err

    def refuse(*_):
        raise AssertionError("the DCP was put together in a temporary folder")

    monkeypatch.setattr("keyreduce.checkpoint.find._converted", refuse)
    assert keyreduce(*PRUNE, "dcp", "--config", config, "--output", "from-dcp").code == 0
    assert keyreduce(*PRUNE, model, "--output", "from-folder").code == 0
    assert_same(tensors_of(Path("from-dcp")), tensors_of(Path("from-folder")))
    records = [json.loads(Path(name, "keyreduce.json").read_text()) for name in ("from-dcp", "from-folder")]
    assert records[0]["identity"] == records[1]["identity"]
    assert records[0]["steps"][0]["inputs"]["source"] == records[1]["steps"][0]["inputs"]["source"]
    assert records[0]["dense_config"] == str(Path("config.json").resolve())
    assert open_folder("from-dcp").config == open_folder("from-folder").config


def test_weights_are_cast_and_the_config_says_so(keyreduce, tiny_folder):
    model = tiny_folder("gated_deltanet")
    assert keyreduce(*PRUNE, model, "--output", "as-it-is").code == 0
    assert keyreduce(*PRUNE, model, "--output", "cast", "--dtype", "bfloat16").code == 0
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(Path("as-it-is")).items()}
    assert_same(tensors_of(Path("cast")), expected)
    assert json.loads(Path("cast/config.json").read_text())["dtype"] == "bfloat16"
    result = keyreduce(*PRUNE, model, "--output", "cast")
    assert result.code == 2 and "made from other inputs" in result.err
    assert keyreduce(*PRUNE, model, "--output", "cast", "--dtype", "int8").code == 2


def test_shards_have_the_size_that_one_says(keyreduce, tiny_folder):
    model = tiny_folder("delta_net")
    assert keyreduce(*PRUNE, model, "--output", "whole").code == 0
    assert keyreduce(*PRUNE, model, "--output", "parts", "--max-shard-size", "50KB").code == 0
    source = open_folder(Path("parts"))
    assert len(source.shards) > 1
    for plan in source.shards.values():
        assert len(plan.tensors) == 1 or sum(spec.nbytes for spec in plan.tensors) <= 50_000
    assert_same(tensors_of(Path("parts")), tensors_of(Path("whole")))


def test_a_dcp_of_another_dtype_than_its_config_says_is_refused(keyreduce, tiny_folder):
    assert keyreduce("convert-dcp", tiny_folder("delta_net"), "dcp").code == 0
    path = Path("dcp/step-0/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    for arguments in (("convert-dcp", "dcp", "hf"), (*PRUNE, "dcp", "--output", "cut")):
        result = keyreduce(*arguments)
        assert result.code == 2 and "holds float32 where its config says bfloat16" in result.err
        assert keyreduce(*arguments, "--dtype", "bfloat16").code == 0
    assert {tensor.dtype for tensor in tensors_of(Path("hf")).values()} == {torch.bfloat16}


def test_layouts_and_what_is_beside_the_model(keyreduce, tiny_folder, tmp_path):
    import torch.distributed.checkpoint as dcp

    model = tiny_folder("delta_net")
    tensors = tensors_of(Path(model))
    state = {"model": tensors, "optimizer": {name: torch.zeros(2) for name in tensors}}
    dcp.save(state, checkpoint_id="theirs/step-3", no_dist=True)
    config = ("--config", Path(model))
    result = keyreduce("convert-dcp", "theirs", "hf", *config, "--no-only-model")
    assert result.code == 2 and f"{len(tensors)} entries beside the model" in result.err
    result = keyreduce("convert-dcp", "theirs", "hf", *config, "--layout", "flat")
    assert result.code == 2 and "holds no flat model, but a nested one" in result.err
    result = keyreduce("convert-dcp", "theirs", "hf", *config)
    assert result.code == 0 and f"left out: {len(tensors)} entries" in result.out
    assert_same(tensors_of(Path("hf")), tensors)
    # What came from a nested one goes back to one, also when it was pruned between.
    assert keyreduce("convert-dcp", "hf", "back", "--json").json()["layout"] == "nested"
    assert keyreduce(*PRUNE, "hf", "--output", "cut").code == 0
    assert keyreduce("convert-dcp", "cut", "cut-dcp", "--json").json()["layout"] == "nested"
    assert keyreduce("convert-dcp", "hf", "flat", "--layout", "flat", "--json").json()["layout"] == "flat"
    assert keyreduce("convert-dcp", "hf", "x", "--layout", "deep").code == 2
    keys = dcp.FileSystemReader("back/step-0").read_metadata().planner_data
    assert set(keys.values()) == {("model", name) for name in tensors}


def test_a_source_that_changes_while_it_is_read_is_refused(keyreduce, tiny_copy, monkeypatch):
    from keyreduce.checkpoint import rewrite

    model = tiny_copy("delta_net")
    write_weights = rewrite.write_weights

    def touched(*arguments, **options):
        write_weights(*arguments, **options)
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes())

    monkeypatch.setattr(rewrite, "write_weights", touched)
    result = keyreduce(*PRUNE, model, "--output", "cut")
    assert result.code == 2 and "was changed while it was read" in result.err
    assert not Path("cut").exists()


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_logits_are_checked_when_one_asks(keyreduce, tiny_folder, family, monkeypatch):
    assert keyreduce(*PRUNE, tiny_folder(family), "--output", "cut", "--verify", "logits").code == 0
    assert keyreduce(*PRUNE, tiny_folder(family), "--output", "x", "--verify", "all").code == 2
    from keyreduce.pruning import prune

    plan_edits = prune.plan_edits

    def wrong(source, plan):
        edits = plan_edits(source, plan)
        name = next(name for name in edits if name.endswith("k_proj.weight"))
        edits[name] = [type(edit)(edit.axis, edit.index_R.flip(0)) for edit in edits[name]]
        return edits

    monkeypatch.setattr(prune, "plan_edits", wrong)
    result = keyreduce(*PRUNE, tiny_folder(family), "--output", "wrong", "--verify", "logits")
    assert result.code == 2 and "differ from those of the dense model" in result.err
    assert not Path("wrong").exists()
