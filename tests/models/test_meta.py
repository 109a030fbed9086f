"""The library's models without numbers: what transformers would load whole passes, and nothing else."""

import json
import os
import subprocess
import sys

import hybrid_models
import pytest
import tiny_models
import torch
from tiny_models import build, edit_config, edit_tensors, file_shapes, tensors_of
from transformers import CONFIG_MAPPING

from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError, UnknownArchitecture
from keyreduce.models.meta import build_model, check_loading, check_source

LLAMA = dict(model_type="llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
MODEL_TYPES = [*hybrid_models.HYBRIDS, *hybrid_models.CHANNEL_DECAY, *tiny_models.FAMILIES]


def store(model_type, folder):
    if model_type in tiny_models.FAMILIES:
        return tiny_models.save(build(model_type), folder)
    return hybrid_models.store(hybrid_models.build(model_type), folder)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def stored(request, tmp_path_factory):
    """Config, shapes and folder of a model, and the name of a tensor of its first mixer."""
    folder = store(request.param, tmp_path_factory.mktemp(request.param))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(folder).items()}
    name = next(name for name in sorted(shapes) if name.endswith(("dt_bias", "layers.0.attn.o_norm.weight")))
    return open_folder(folder).config, shapes, folder, name


def test_what_loads_passes(stored):
    config, shapes, folder, _ = stored
    model = check_loading(config, shapes, folder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if "qwen" in config["model_type"]:
        check_loading(config, shapes | {"mtp.norm.weight": (4,)}, folder)


def test_a_missing_tensor_is_named(stored):
    config, shapes, folder, damaged = stored
    rest = {name: shape for name, shape in shapes.items() if name != damaged}
    with pytest.raises(KeyreduceError, match=r"missing: model\.layers\.[02]\.\w+\.(forget_gate\.)?(dt_bias|o_norm)"):
        check_loading(config, rest, folder)


def test_a_tensor_that_nothing_asks_for_is_named(stored):
    config, shapes, folder, damaged = stored
    more = damaged.replace("dt_bias", "more").replace("o_norm", "more")
    with pytest.raises(KeyreduceError, match=r"left over: .*\.more"):
        check_loading(config, shapes | {more: (4,)}, folder)


def test_a_tensor_of_another_shape_is_named(stored):
    config, shapes, folder, damaged = stored
    with pytest.raises(KeyreduceError, match=r"of another shape: .* \[3\] for \["):
        check_loading(config, shapes | {damaged: (3,)}, folder)


@pytest.mark.parametrize("model_type", [*hybrid_models.LANGUAGE, *hybrid_models.CHANNEL_DECAY, *tiny_models.FAMILIES])
def test_the_shapes_of_files_are_those_that_are_saved(tmp_path, model_type):
    model = build(model_type) if model_type in tiny_models.FAMILIES else hybrid_models.build(model_type)
    model.save_pretrained(tmp_path)
    assert file_shapes(model.config.to_dict()) == {name: t.shape for name, t in tensors_of(tmp_path).items()}


def test_other_models_that_transformers_knows():
    shapes = file_shapes(LLAMA | {"vocab_size": 9})
    assert shapes["lm_head.weight"] == (9, 8)
    assert not [name for name in shapes if "inv_freq" in name]


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.embeddings.weight", None])
def test_tied_weights_may_be_there_once_or_twice(tmp_path, left_out):
    model = build("delta_net", tie_word_embeddings=True)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != left_out}
    check_loading(model.config.to_dict(), shapes, tmp_path)
    del shapes["lm_head.weight" if left_out != "lm_head.weight" else "model.embeddings.weight"]
    if left_out is not None:
        with pytest.raises(KeyreduceError, match="missing: .*weight"):
            check_loading(model.config.to_dict(), shapes, tmp_path)


def test_every_fault_is_listed_in_one_line(tiny_copy):
    folder = tiny_copy()

    def damage(tensors):
        names = [name for name in sorted(tensors) if "model.norm" not in name and "lm_head" not in name][:12]
        tensors.update({f"extra.{index}": tensors.pop(name) for index, name in enumerate(names)})
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].clone()

    edit_tensors(folder, damage)
    with pytest.raises(KeyreduceError) as caught:
        check_source(open_folder(folder))
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
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1e.09, but there are only"),
        ({"vocab_size": "x"}, "no model is made"),
        ({"vocab_size": 10**12}, "of another shape: .* for .1000000000000, 32."),
    ],
    ids=str,
)
def test_configs_of_no_model(tiny_copy, changes, told):
    folder = tiny_copy()
    edit_config(folder, **changes)
    with pytest.raises(KeyreduceError, match=f"^[^\n]*{told}[^\n]*$"):
        check_source(open_folder(folder))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "nonsense"}, "knows no model_type 'nonsense'"),
        ({"model_type": None}, "knows no model_type None"),
        ({"model_type": 3}, "knows no model_type 3"),
        ({"model_type": "clip"}, "no language model of model_type 'clip'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
    ids=str,
)
def test_of_some_models_nothing_can_be_said(tiny_folder, changes, told):
    source = open_folder(tiny_folder("delta_net"))
    shapes = {name: spec.shape for name, spec in source.tensors.items()}
    config = {"model_type": changes["model_type"]} if "model_type" in changes else source.config | changes
    with pytest.raises(UnknownArchitecture, match=told):
        check_loading(config, shapes, source.path)


def test_models_with_numbers_are_built_too():
    model = build_model(build("delta_net").config.to_dict(), torch.device("cpu"), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert torch.isfinite(model.lm_head.weight).all() and model.lm_head.weight.std() > 0


WITHOUT_ACCELERATE = """
import importlib.util, json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("accelerate", "peft"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
find_spec = importlib.util.find_spec
hidden = ("accelerate", "peft")
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)

from keyreduce import cli

codes = []
for folder in json.loads(sys.argv[1]):
    for command in (
        ("prune", "--method", "l2", "--keep", "4", "--target", "key,value", "--model", folder, "--verify", "load"),
        ("verify", f"{folder}-out/pruned"),
        ("verify", f"{folder}-out/pruned", "--load"),
        ("convert-dcp", f"{folder}-out/pruned"),
    ):
        codes.append((command, cli.app([*command, "--work", f"{folder}-out", "--debug"], standalone_mode=False)))
assert not set(hidden) & set(sys.modules)
assert not any(code for _, code in codes), codes
"""


def test_every_family_is_pruned_verified_and_converted_without_accelerate(tmp_path):
    known = [model_type for model_type in MODEL_TYPES if model_type in CONFIG_MAPPING]
    folders = [str(store(model_type, tmp_path / model_type)) for model_type in known]
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_ACCELERATE, json.dumps(folders)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        assert list((tmp_path / f"{folder}-out" / "dcp").glob("step-0/*.distcp"))


WITHOUT_LIBRARIES = """
import sys
from keyreduce import cli
assert not cli.app(["prune", "--method", "l2", "--model", sys.argv[1], "--output", "cut"], standalone_mode=False)
assert not cli.app(["verify", "cut"], standalone_mode=False)
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_neither_prune_nor_verify_imports_the_libraries(tiny_folder, tmp_path):
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, str(tiny_folder("delta_net"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "fla", "fla_torch", "triton", "accelerate", "peft", "scipy", "matplotlib"}
