"""Pruned models in mlx-lm, where it is installed: its logits and its greedy tokens are those of transformers."""

import json
import subprocess
import sys

import hybrid_models
import pytest
import torch
from cuts import cut, load, plan_of
from tiny_models import draw_tokens

from keyreduce.checkpoint.folder import open_folder

pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

LAYERS = dict(num_hidden_layers=4, layer_types=[*["linear_attention"] * 3, "full_attention"])
# On a CPU any key size is right; on Metal multiples of 32 are.
CUTS = [{"key": 32}, {"key": 48}, {"key": 32, "value": 32, "head": 1}, {}]
# In a process of its own: mlx-lm and transformers would each take the names of the other's classes.
PROGRAM = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
tokens = json.loads(sys.argv[2])
logits = model(mx.array([tokens])).astype(mx.float32).tolist()
generated = list(tokens)
for _ in range(6):
    generated.append(int(mx.argmax(model(mx.array([generated]))[0, -1])))
print(json.dumps({"logits": logits, "generated": generated}))
"""


@pytest.mark.parametrize("keep", CUTS, ids=str)
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5"])
@torch.no_grad()
def test_it_computes_what_transformers_does(tmp_path, model_type, keep):
    if model_type == "qwen3_next" and not keep:
        pytest.skip("what transformers saves itself lacks rope_theta at the top of its config")
    sizes = dict(linear_key_head_dim=64, linear_value_head_dim=64)
    dense = hybrid_models.store(hybrid_models.build(model_type, **LAYERS | sizes), tmp_path / "dense")
    source = open_folder(dense)
    folder = cut(source, plan_of(source, keep), tmp_path / "cut")
    tokens = draw_tokens(1, 12)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), json.dumps(tokens[0].tolist())],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    model = load(folder, torch.float32)
    expected = model(tokens).logits
    worst = (torch.tensor(found["logits"]) - expected).abs().max() / expected.abs().max()
    assert worst < 1e-4
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found["generated"] == generated[0].tolist()
