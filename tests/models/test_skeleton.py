"""What a config asks for, against what a checkpoint has; the child process and this one say the same."""

import json
import subprocess
import sys

import pytest
from tiny_models import FAMILIES, build, edit_config, edit_tensors, tensors_of

from keyreduce.errors import KeyreduceError
from keyreduce.models import skeleton
from keyreduce.models.skeleton import UnknownArchitecture, check_tensors, describe, start_skeleton

LLAMA = dict(model_type="llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


def parts(folder):
    config = json.loads((folder / "config.json").read_text())
    return config, {name: tuple(tensor.shape) for name, tensor in tensors_of(folder).items()}, folder


@pytest.fixture
def without_fla(monkeypatch):
    """Let a skeleton think that this process has not imported fla."""
    monkeypatch.delitem(sys.modules, "fla")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_whole_checkpoints_pass(tiny_folder, model_type):
    check_tensors(*parts(tiny_folder(model_type)))


def test_other_models_that_transformers_knows():
    shapes = describe(LLAMA | {"vocab_size": 9}).shapes
    assert shapes["lm_head.weight"] == (9, 8)
    assert not [name for name in shapes if "inv_freq" in name]


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.embeddings.weight", None])
def test_tied_weights_may_be_there_once_or_twice(tmp_path, left_out):
    model = build("delta_net", tie_word_embeddings=True)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != left_out}
    check_tensors(model.config.to_dict(), shapes, tmp_path)
    del shapes["lm_head.weight" if left_out != "lm_head.weight" else "model.embeddings.weight"]
    if left_out is not None:
        with pytest.raises(KeyreduceError, match="missing: .*weight"):
            check_tensors(model.config.to_dict(), shapes, tmp_path)


def test_every_fault_is_listed_in_one_line(tiny_copy):
    folder = tiny_copy()

    def damage(tensors):
        names = [name for name in sorted(tensors) if "model.norm" not in name and "lm_head" not in name][:12]
        tensors.update({f"extra.{index}": tensors.pop(name) for index, name in enumerate(names)})
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].clone()

    edit_tensors(folder, damage)
    with pytest.raises(KeyreduceError) as caught:
        check_tensors(*parts(folder))
    told = str(caught.value)
    assert "\n" not in told and str(folder) in told
    assert told.count(" and 2 more") == 2
    assert "missing: model.embeddings.weight, model.layers.0." in told and "left over: extra.0, extra.1" in told
    assert told.endswith("of another shape: model.norm.weight [3] for [32]")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 10**18}, "no model is made"),
        ({"hidden_size": -32}, "no model is made"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1e.09, and there are"),
        ({"vocab_size": "x"}, "no model is made"),
        ({"vocab_size": 10**12}, "of another shape: .* for .1000000000000, 32."),
    ],
    ids=str,
)
def test_configs_of_no_model(tiny_copy, changes, told):
    folder = tiny_copy()
    edit_config(folder, **changes)
    with pytest.raises(KeyreduceError, match=f"^[^\n]*{told}[^\n]*$"):
        check_tensors(*parts(folder))


@pytest.mark.parametrize("model_type", ["nonsense", None, 3, "qwen3_next"])
def test_of_some_models_nothing_can_be_said(tiny_folder, model_type):
    config, shapes, path = parts(tiny_folder("delta_net"))
    with pytest.raises(UnknownArchitecture):
        check_tensors(config | {"model_type": model_type}, shapes, path)


NOISY = """
from keyreduce.models import skeleton
build = skeleton.describe
skeleton.describe = lambda config: print("noise", flush=True) or build(config)
skeleton.answer(hollow={hollow})
"""


@pytest.mark.parametrize("hollow", [True, False], ids=["hollow", "full"])
def test_a_child_says_the_same(monkeypatch, hollow):
    """Whatever libraries print meanwhile, and whether it imports all of what it names."""
    monkeypatch.setattr(skeleton, "_CHILD", NOISY)
    config = build("delta_net_2").config.to_dict()
    child = skeleton._Child(hollow=hollow)
    try:
        assert child.ask(config) == describe(config)
    finally:
        child.close()


COMPARE = """
import json, sys
from keyreduce.models.hollow import make_hollow
from keyreduce.models.skeleton import _HOLLOW, describe
make_hollow(*_HOLLOW)
print(json.dumps([describe(config) for config in json.loads(sys.argv[1])]))
"""


def test_hollow_modules_change_no_shape():
    configs = [build(model_type).config.to_dict() for model_type in FAMILIES] + [LLAMA | {"vocab_size": 9}]
    out = subprocess.run([sys.executable, "-c", COMPARE, json.dumps(configs)], capture_output=True, check=True).stdout
    assert json.loads(out) == json.loads(json.dumps([describe(config) for config in configs]))


LIES = "import json; print(json.dumps(dict(shapes=dict(x=[1]), tied=[], may_lack=[], may_have=[])))"


@pytest.mark.parametrize("fault", ["raise RuntimeError", LIES], ids=["it fails", "it says otherwise"])
def test_before_a_refusal_a_child_without_hollow_modules_is_asked(tiny_folder, without_fla, monkeypatch, fault):
    """A library that one day takes a shape from a module that is hollow costs time, and nothing else."""
    config, shapes, path = parts(tiny_folder("delta_net"))
    monkeypatch.setattr(skeleton, "_CHILD", f"if {{hollow}}:\n    {fault}; raise SystemExit\n{skeleton._CHILD}")
    with start_skeleton() as child:
        child.check(config, shapes, path)
        with pytest.raises(KeyreduceError, match="missing: lm_head"):
            child._child = skeleton._Child(hollow=True)
            child.check(config, {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}, path)


def test_a_child_that_dies_tells_why(tiny_folder, without_fla, monkeypatch):
    monkeypatch.setattr(skeleton, "_CHILD", "raise RuntimeError('no luck')")
    with start_skeleton() as child, pytest.raises(KeyreduceError, match=r"died \(RuntimeError: no luck\)"):
        child.check(*parts(tiny_folder("delta_net")))


def test_a_child_is_gone_when_left_early(without_fla):
    with pytest.raises(KeyboardInterrupt), start_skeleton() as child:
        assert child._child._process.poll() is None
        raise KeyboardInterrupt
    assert child._child._process.returncode == -9
