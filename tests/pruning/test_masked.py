"""The check of a pruned checkpoint against the masked dense model: it passes what is right, and nothing else."""

import pytest
import torch
from cuts import build, cut, plan_of, store
from tiny_models import FAMILIES, edit_tensors

from keyreduce.errors import KeyreduceError
from keyreduce.pruning.masked import check_logits, compare_logits
from keyreduce.pruning.prune import write_pruned

CPU = torch.device("cpu")
WIDE = {"num_heads": 4, "use_gate": True, "initializer_range": 0.1}
GROUPED = {"gated_deltanet": {"num_v_heads": 8, "head_dim": 8}}
KEEPS = [{"key": 5}, {"value": 5}, {"head": 3}, {"key": 5, "value": 6, "head": 3}]

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


def prune(tmp_path, model_type, keep, method="random", dtype=torch.float32, **config):
    model = build(model_type, WIDE | GROUPED.get(model_type, {}) | config).to(dtype)
    source = store(model, tmp_path / "source")
    plan = plan_of(source, keep, method)
    return source, cut(source, plan, tmp_path / "cut"), plan


@pytest.mark.parametrize("keep", KEEPS, ids=",".join)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_right_checkpoints_pass(tmp_path, model_type, keep):
    assert check_logits(*prune(tmp_path, model_type, keep), device=CPU) < 1e-4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_projections_pass(tmp_path, model_type):
    assert check_logits(*prune(tmp_path, model_type, {"key": 5}, "pca"), device=CPU) < 1e-4


@pytest.mark.parametrize("qk_norm", ["l2", "sum"])
@pytest.mark.parametrize("qk_activation", ["silu", "relu", "elu", "identity"])
@pytest.mark.parametrize("model_type", ["delta_net", "delta_net_2"])
def test_every_activation_and_norm(tmp_path, model_type, qk_activation, qk_norm):
    options = {"qk_activation": qk_activation, "qk_norm": qk_norm, "tie_word_embeddings": True}
    parts = prune(tmp_path, model_type, {"key": 5}, dtype=torch.float64, **options)
    assert compare_logits(*parts, device=CPU, dtype=torch.float64) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("keep", [{"key": 5}, {"value": 5}], ids=",".join)
def test_rounding_is_no_difference(tmp_path, keep, dtype):
    """Of what is folded and stored in 16 bits, both models hold the rounded numbers."""
    assert check_logits(*prune(tmp_path, "gated_deltanet", keep, dtype=dtype), device=CPU) < 1e-4


def test_a_cast_is_no_difference(tmp_path):
    source, _, plan = prune(tmp_path, "delta_net", {"key": 5, "value": 6})
    write_pruned(source, plan, tmp_path / "cast", dense=str(source.path), dtype=torch.bfloat16)
    assert check_logits(source, tmp_path / "cast", plan, device=CPU) < 1e-4


def swapped(tensor, place, other, length):
    """Two blocks of rows in each other's places."""
    blocks = tensor.unflatten(0, (-1, length)).clone()
    blocks[[place, other]] = blocks[[other, place]]
    return blocks.flatten(0, 1)


@pytest.mark.parametrize("fault", ["channels of k", "heads of v", "unscaled output", "nan"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_wrong_checkpoints_do_not(tmp_path, model_type, fault):
    source, folder, plan = prune(tmp_path, model_type, {"key": 5, "value": 6})
    first = "model.layers.0.attn."

    def damage(tensors):
        if fault == "channels of k":
            tensors[first + "k_proj.weight"] = swapped(tensors[first + "k_proj.weight"], 0, 1, 1)
        elif fault == "heads of v":
            tensors[first + "v_proj.weight"] = swapped(tensors[first + "v_proj.weight"], 0, 1, 6)
        elif fault == "unscaled output":
            tensors[first + "o_proj.weight"] *= (6 / plan.layers[0].before.head_v_dim) ** 0.5
        else:
            tensors[first + "o_proj.weight"][0, 0] = float("nan")

    edit_tensors(folder, damage)
    with pytest.raises(KeyreduceError, match="differ from those of the dense model .* by (nan|[0-9.]+) of"):
        check_logits(source, folder, plan, device=CPU)
