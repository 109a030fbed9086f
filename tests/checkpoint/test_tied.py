"""Models whose output layer is their embeddings: one tensor in safetensors, two names in a DCP."""

import json
from pathlib import Path

import hybrid_models
import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import build, save, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.checkpoint.dcp import tied_output, write_dcp
from keyreduce.checkpoint.dcp_source import DcpCheckpoint
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.errors import KeyreduceError

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
        monkeypatch.setattr("keyreduce.checkpoint.dcp_source._COMPARED_BYTES", 100)
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


def test_two_tensors_stay_two(tmp_path):
    step = written(save(build("delta_net"), tmp_path / "source"), tmp_path / "step-0")
    assert {OUTPUT, EMBEDDINGS} <= DcpCheckpoint(step).tensors.keys()
    assert tied_output({"text_config": {"tie_word_embeddings": True}}, [EMBEDDINGS]) == {OUTPUT: EMBEDDINGS}
    assert tied_output({"tie_word_embeddings": "yes", "text_config": 3}, [EMBEDDINGS]) == {}
