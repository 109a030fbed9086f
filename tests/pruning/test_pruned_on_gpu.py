"""Pruned models in fla's own Triton kernels, against our backend on a CPU: every architecture, every target.

Rows of up to 64 tokens take the recurrent kernels, which know float32; the chunked ones want 16 bits.
"""

import pytest
import torch
from cuts import budget_of
from tiny_models import FAMILIES, build, draw_tokens, save
from transformers import AutoModelForCausalLM

from keyreduce.checkpoint.folder import open_folder
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.planning import make_plan
from keyreduce.pruning.prune import write_pruned

pytestmark = pytest.mark.gpu
CASES = [(model_type, target) for model_type in FAMILIES for target in ("key", "value", "head", "key,value,head")]


def prune(model_type, target, tmp_path):
    source = open_folder(save(build(model_type), tmp_path / "source"))
    keep = budget_of(target, ratio="0.5").numbers(source.config, None, METHODS["random"], {})
    plan = make_plan(source, METHODS["random"], keep, seed=1, statistics=None, inputs={})
    write_pruned(source, plan, tmp_path / "pruned", dense="tiny")
    return tmp_path / "pruned"


def logits(folder, tokens, device, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    with torch.no_grad():
        return model(tokens.to(device)).logits.cpu().float()


@pytest.mark.parametrize(("model_type", "target"), CASES)
def test_recurrent_kernels_agree_with_the_backend(tmp_path, model_type, target):
    folder, tokens = prune(model_type, target, tmp_path), draw_tokens(2, 40)
    expected = logits(folder, tokens, "cpu", torch.float32)
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits(folder, tokens, "cuda", torch.float32), expected, rtol=0, atol=5e-3 * scale)


def test_chunked_kernels_agree_with_the_backend(tmp_path):
    folder, tokens = prune("delta_net_2", "key,value", tmp_path), draw_tokens(2, 100)
    expected = logits(folder, tokens, "cpu", torch.float32)
    close = (logits(folder, tokens, "cuda", torch.bfloat16) - expected).abs().mean()
    assert close < 0.05 * expected.abs().mean()
