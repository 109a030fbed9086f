"""Quantised checkpoints: refused where the mixers are quantised, before any work, and left alone elsewhere."""

import hybrid_models
import pytest
import torch
from tiny_models import edit_config, edit_tensors, tensors_of

from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.models.quantized import refuse_quantized
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.planning import check_method, make_plan
from keyreduce.pruning.prune import write_pruned

MIXER = "model.layers.0.linear_attn.in_proj_qkvz"
EXPERT = "model.layers.0.mlp.experts.0.up_proj"


def as_fp8(tensors, name):
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale_inv"] = torch.ones(1, 1)


def as_int4(tensors, name):
    """As GPTQ and AWQ pack it: eight numbers in a word, and the weight itself is gone."""
    rows, columns = tensors.pop(f"{name}.weight").shape
    tensors[f"{name}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
    tensors[f"{name}.scales"] = torch.ones(1, rows)
    tensors[f"{name}.qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)


def as_scaled_bf16(tensors, name):
    """Numbers of 16 bits, of which the scale is a tensor of its own."""
    tensors[f"{name}.weight_scale"] = torch.ones(1)


@pytest.fixture
def folder(tmp_path):
    return hybrid_models.store(hybrid_models.build("qwen3_next"), tmp_path / "dense")


@pytest.mark.parametrize("quantise", [as_fp8, as_int4, as_scaled_bf16])
def test_quantised_mixers_are_refused_before_any_work(folder, quantise):
    edit_tensors(folder, lambda tensors: quantise(tensors, MIXER))
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    source = open_folder(folder)
    with pytest.raises(KeyreduceError, match=rf"is quantised \(gptq\): tensor '{MIXER}\.[a-z_]*' .* quantise the res"):
        refuse_quantized(source)
    with pytest.raises(KeyreduceError, match="is quantised"):
        check_method(source, METHODS["wanda"], ["key"])
    with pytest.raises(KeyreduceError, match="is quantised"):
        calibrate(source, None, Settings(), device=torch.device("cpu"), dtype=torch.float32)


def test_quantised_experts_go_along(folder, tmp_path):
    edit_tensors(folder, lambda tensors: as_fp8(tensors, EXPERT))
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    source, keep = open_folder(folder), {"key": {0: 5, 2: 5}}
    plan = make_plan(source, METHODS["l2"], keep, seed=0, statistics=None, inputs={"method": "l2"})
    write_pruned(source, plan, tmp_path / "cut", dense="dense")
    before, after = tensors_of(folder), tensors_of(tmp_path / "cut")
    assert before.keys() == after.keys()
    assert before[f"{EXPERT}.weight"].dtype == torch.float8_e4m3fn
    for name, tensor in before.items():
        if "linear_attn" in name:
            continue
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert len(after[f"{MIXER}.weight"]) == 2 * (5 + 5 + 12 + 12)


@pytest.mark.parametrize("model_type", [*hybrid_models.HYBRIDS, *hybrid_models.CHANNEL_DECAY])
def test_what_is_not_quantised_passes(tmp_path, model_type):
    refuse_quantized(open_folder(hybrid_models.store(hybrid_models.build(model_type), tmp_path)))
