"""Models whose output layer is their embeddings: one tensor in safetensors, two names in a DCP."""

import json
from pathlib import Path

import hybrid_models
import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import build, edit_config, edit_tensors, save, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.dcp_source import DcpCheckpoint
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.checkpoint.tied import tied_output
from keyreduce.errors import KeyreduceError
from keyreduce.models.file_tensors import file_tensors
from keyreduce.models.loading import load_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OUTPUT, EMBEDDINGS = "lm_head.weight", "model.embeddings.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(build("delta_net", tie_word_embeddings=True), tmp_path / "source")


@pytest.fixture
def saved(folder, tmp_path):
    """A function: a DCP by torch of a tied model's state_dict, which a function may change first."""

    def make(change=lambda state: None, *, nested: bool = False) -> Path:
        state = dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        change(state)
        dcp.save({"model": state} if nested else state, checkpoint_id=tmp_path / "saved", no_dist=True)
        (tmp_path / "saved/config.json").write_bytes((folder / "config.json").read_bytes())
        return tmp_path / "saved"

    return make


def written(folder: Path, target: Path, **options) -> Path:
    """The DCP of a folder."""
    target.mkdir(parents=True)
    write_dcp(open_folder(folder), target, **options)
    return target


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_there_and_back_is_bitwise_the_same(folder, tmp_path, nested, dtype):
    seen = []
    step = written(folder, tmp_path / "step-0", nested=nested, dtype=dtype, progress=seen.append)
    source = DcpCheckpoint(step)
    assert list(source.tensors) == list(open_folder(folder).tensors) and source.left_out == 0
    (tmp_path / "back").mkdir()
    rewrite(source, tmp_path / "back")
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() and OUTPUT not in after
    for name, tensor in before.items():
        assert after[name].equal(tensor if dtype is None else tensor.to(dtype))
    assert sum(seen) == source.nbytes
    if dtype is None:
        assert source.identity == open_folder(folder).identity == open_folder(tmp_path / "back").identity


@pytest.mark.parametrize("model_type", tiny_models.FAMILIES)
def test_torch_finds_both_names(model_type, tmp_path):
    model = build(model_type, tie_word_embeddings=True)
    step = written(save(model, tmp_path / "source"), tmp_path / "step-0")
    metadata = dcp.FileSystemReader(step).read_metadata()
    assert metadata.planner_data[OUTPUT] == (OUTPUT,)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    assert OUTPUT in state and state[OUTPUT] is not state[EMBEDDINGS]
    dcp.load(state, checkpoint_id=step, no_dist=True)
    for name, tensor in model.state_dict().items():
        assert state[name].equal(tensor), name
    other = build(model_type, tie_word_embeddings=True, seed=1)
    other.load_state_dict(state)
    assert other.lm_head.weight is other.model.embeddings.weight
    assert other.lm_head.weight.equal(model.lm_head.weight)


def test_the_second_name_takes_no_room(folder, tmp_path):
    step = written(folder, tmp_path / "step-0")
    plain = save(build("delta_net"), tmp_path / "plain")
    sizes = [(path / "__0_0.distcp").stat().st_size for path in (step, written(plain, tmp_path / "two"))]
    assert sizes[1] - sizes[0] >= build("delta_net").lm_head.weight.nbytes


@pytest.fixture(params=["at once", "piece by piece", "as numbers"])
def compared(request, monkeypatch):
    """The ways in which the two tensors may be compared; by numbers where processes saved tiles of them."""
    if request.param == "piece by piece":
        monkeypatch.setattr("keyreduce.checkpoint.source._COMPARED_BYTES", 100)
    if request.param == "as numbers":
        monkeypatch.setattr("keyreduce.checkpoint.dcp_source.DcpCheckpoint.ranges", lambda self, name: None)


@pytest.mark.parametrize("nested", [False, True])
def test_what_torch_saved_loses_its_copy(saved, folder, compared, nested):
    source = DcpCheckpoint(saved(nested=nested))
    assert source.identity == open_folder(folder).identity
    assert OUTPUT not in source.tensors and source.left_out == 0


def test_a_copy_with_numbers_of_its_own_is_refused(saved, folder, compared):
    def move_last(state):
        state[OUTPUT] = state[OUTPUT].clone()
        state[OUTPUT][-1, -1] += 1

    path = saved(move_last)
    with pytest.raises(KeyreduceError, match="'lm_head.weight' that is not 'model.embeddings.weight', though") as told:
        DcpCheckpoint(path)
    assert "\n" not in str(told.value)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    assert OUTPUT in DcpCheckpoint(path).tensors


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda tensor: tensor[:-1]], ids=["dtype", "shape"])
def test_a_copy_of_another_kind_is_refused(saved, change):
    with pytest.raises(KeyreduceError, match="is not 'model.embeddings.weight'"):
        DcpCheckpoint(saved(lambda state: state.update({OUTPUT: change(state[OUTPUT])})))


# kimi_linear, as transformers has it, ties nothing.
@pytest.mark.parametrize("model_type", [*hybrid_models.HYBRIDS, "kda"])
def test_names_are_those_of_the_models(model_type, tmp_path):
    model = hybrid_models.build(model_type, tie_word_embeddings=True)
    if model_type in hybrid_models.SEEING:
        model.config.tie_word_embeddings = True  # it is the outer config that counts
        model.tie_weights()
    state = model.state_dict()
    shared = {name: tensor for name, tensor in state.items() if tensor.data_ptr() == state[OUTPUT].data_ptr()}
    model.save_pretrained(tmp_path)
    source = open_folder(tmp_path)
    assert OUTPUT not in source.tensors
    assert tied_output(source.config, source.tensors) == {OUTPUT: next(name for name in shared if name != OUTPUT)}


@pytest.mark.parametrize("model_type", [*tiny_models.FAMILIES, *hybrid_models.HYBRIDS, "kda"])
def test_the_output_layer_alone_gets_both_names(model_type, tmp_path):
    """As ``safetensors.torch.save_model`` leaves a tied model: of two names the first in the alphabet."""
    module = tiny_models if model_type in tiny_models.FAMILIES else hybrid_models
    model = module.build(model_type, tie_word_embeddings=True)
    if model_type in hybrid_models.SEEING:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    folder = save(model, tmp_path / "source")
    ((_, embeddings),) = tied_output(open_folder(folder).config, open_folder(folder).tensors).items()
    edit_tensors(folder, lambda tensors: tensors.update({OUTPUT: tensors.pop(embeddings)}))
    source = open_folder(folder)
    assert tied_output(source.config, source.tensors) == {embeddings: OUTPUT}
    step = written(folder, tmp_path / "step-0")
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    names = {OUTPUT, embeddings}
    assert names <= dcp.FileSystemReader(step).read_metadata().state_dict_metadata.keys()
    if model_type in tiny_models.FAMILIES:  # others have other names in the model than in files
        dcp.load(state, checkpoint_id=step, no_dist=True)
        assert all(state[name].equal(tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "back").mkdir()
    rewrite(DcpCheckpoint(step), tmp_path / "back")
    assert tensors_of(tmp_path / "back")[embeddings].equal(tensors_of(folder)[OUTPUT])


def test_such_a_model_is_trained_and_written_back(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update({OUTPUT: tensors.pop(EMBEDDINGS)}))
    loaded = load_model(folder, torch.device("cpu"), torch.float32)
    found = file_tensors(loaded.model, open_folder(folder))
    held = tensors_of(folder)
    assert found.keys() == held.keys() and all(tensor.equal(found[name]) for name, tensor in held.items())


def test_a_folder_of_two_that_its_config_ties_is_refused_unwritten(folder, tmp_path):
    edit_tensors(folder, lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDINGS] + 1}))
    told = f"{folder} holds a 'lm_head.weight' that is not 'model.embeddings.weight', though its config ties the two"
    (tmp_path / "step-0").mkdir()
    with pytest.raises(KeyreduceError, match=f"{told} .*say false there, in its config.json"):
        write_dcp(open_folder(folder), tmp_path / "step-0")
    assert not list((tmp_path / "step-0").iterdir())
    edit_config(folder, tie_word_embeddings=False)
    write_dcp(open_folder(folder), tmp_path / "step-0")
    assert {OUTPUT, EMBEDDINGS} <= DcpCheckpoint(tmp_path / "step-0").tensors.keys()


def test_an_index_may_name_a_tied_tensor_that_no_shard_holds(folder):
    model = build("delta_net", tie_word_embeddings=True)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    index["weight_map"][OUTPUT] = max(shards)
    path.write_text(json.dumps(index))
    assert OUTPUT not in open_folder(folder).tensors
    AutoModelForCausalLM.from_pretrained(folder)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(KeyreduceError, match="disagree about tensor 'lm_head.weight'"):
        open_folder(folder)


def test_two_tensors_stay_two(tmp_path):
    step = written(save(build("delta_net"), tmp_path / "source"), tmp_path / "step-0")
    assert {OUTPUT, EMBEDDINGS} <= DcpCheckpoint(step).tensors.keys()
    assert tied_output({"text_config": {"tie_word_embeddings": True}}, [EMBEDDINGS]) == {OUTPUT: EMBEDDINGS}
    assert tied_output({"tie_word_embeddings": "yes", "text_config": 3}, [EMBEDDINGS]) == {}
