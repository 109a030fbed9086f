"""Quantised checkpoints: refused where the mixers are quantised, before any work, and left alone elsewhere."""

import itertools
import shutil

import hybrid_models
import pytest
import torch
import torch.nn.functional as F
from tiny_models import draw_tokens, edit_config, edit_tensors, tensors_of

import keyreduce
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import load_model
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


BLOCK = 16


def in_fp8_blocks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Quantise the linear layers outside the mixers, and return what they hold now, by name."""
    held = {}
    names = [name for name in tensors if name.endswith("_proj.weight") and "linear_attn" not in name]
    for name in names:
        weight = tensors[name]
        padded = F.pad(weight, (0, -weight.shape[1] % BLOCK, 0, -weight.shape[0] % BLOCK))
        scales = torch.zeros(padded.shape[0] // BLOCK, padded.shape[1] // BLOCK)
        for row, column in itertools.product(*map(range, scales.shape)):
            block = padded[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
            scales[row, column] = block.abs().max() / 448
            block /= scales[row, column]
        numbers = padded[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous()
        tensors |= {name: numbers, f"{name}_scale_inv": scales}
        wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        held[name] = numbers.float() * wide[: weight.shape[0], : weight.shape[1]]
    return held


@pytest.fixture(params=["qwen3_5_text", "qwen3_5"])
def fp8(request, tmp_path):
    """A folder whose layers outside the mixers are in blocks of FP8, and one with the same numbers in float32."""
    folder = hybrid_models.store(hybrid_models.build(request.param), tmp_path / "fp8")
    plain = shutil.copytree(folder, tmp_path / "plain")
    held = {}
    edit_tensors(folder, lambda tensors: held.update(in_fp8_blocks(tensors)))
    edit_tensors(plain, lambda tensors: tensors.update(held))
    mixers = [f"model.layers.{layer}.linear_attn" for layer in (0, 2)]
    mixers += [name.replace("model.", "model.language_model.") for name in mixers]
    left = {"modules_to_not_convert": ["lm_head", "model.visual", "visual", *mixers]}
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(folder, quantization_config=settings | left)
    assert len(held) >= 3 + 4 + 3 + 3
    return folder, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_outside_the_mixers_is_loaded_as_its_numbers(fp8, dtype):
    tokens, logits = draw_tokens(2, 9), []
    for folder in fp8:
        model = load_model(folder, torch.device("cpu"), dtype).model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        with torch.no_grad():
            logits.append(model(tokens).logits.float())
    difference = float((logits[0] - logits[1]).abs().max() / logits[1].std())
    assert difference < (1e-5 if dtype == torch.float32 else 0.1)


def test_fp8_without_accelerate_is_one_line_that_names_the_extra(fp8, monkeypatch):
    monkeypatch.setattr("keyreduce.models.fp8.find_spec", lambda name: None)
    with pytest.raises(KeyreduceError, match=rf"^{fp8[0]} is in FP8, .* accelerate: pip install 'keyreduce\[train\]'$"):
        load_model(fp8[0], torch.device("cpu"), torch.float32)


def test_fp8_goes_through_calibration_and_prune_with_recovery_and_eval(fp8, tmp_path):
    amount = {"num_batches": 2, "batch_size": 2, "seq_len": 64}
    pruned, perplexity = [], []
    for folder in fp8:
        statistics = keyreduce.calibrate(folder, **amount)
        cut = keyreduce.prune(folder, output=tmp_path / f"cut-{folder.name}", keep="5", statistics=statistics)
        made = tmp_path / f"made-{folder.name}"
        pruned.append(keyreduce.recover(cut, folder, mode="least-squares", output=made, **amount))
        perplexity.append(keyreduce.evaluate(pruned[-1], **amount).perplexity)
    ours, plain = map(tensors_of, pruned)
    for name, tensor in tensors_of(fp8[0]).items():
        if "linear_attn" not in name:
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
        else:
            assert torch.allclose(ours[name], plain[name], atol=1e-4), name
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-3)


def test_a_cast_leaves_scales_as_they_are(fp8, tmp_path):
    (tmp_path / "cast").mkdir()
    rewrite(open_folder(fp8[0]), tmp_path / "cast", dtype=torch.bfloat16)
    before, after = tensors_of(fp8[0]), tensors_of(tmp_path / "cast")
    scales = [name for name in before if name.endswith("weight_scale_inv")]
    assert len(scales) >= 13
    for name in scales:
        assert after[name].equal(before[name])
    others = {after[name].dtype for name in before.keys() - set(scales)}
    assert others == {torch.bfloat16, torch.float8_e4m3fn}
