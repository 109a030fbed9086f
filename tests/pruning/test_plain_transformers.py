"""Pruned hybrids in a process that has never heard of keyreduce, and where fla is not installed."""

import json
import os
import subprocess
import sys

import hybrid_models
import pytest
import torch
from cuts import cut, load, plan_of
from tiny_models import draw_tokens

from keyreduce.checkpoint.folder import open_folder

MODEL_TYPES = (*hybrid_models.HYBRIDS, "kimi_linear")
# transformers finds out what is installed from the names of packages: one that cannot be imported is none.
PLAIN = """
import importlib.util, json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fla", "keyreduce", "fla_torch"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "fla" else find_spec(name, *rest)

import torch, transformers
torch.set_grad_enabled(False)
device = sys.argv[1]
tokens = torch.tensor(json.loads(sys.argv[2]), device=device)
found = []
for path in sys.argv[3:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
    whole = model(tokens, use_cache=False).logits
    step = model(tokens[:, :4], use_cache=True)
    logits = [step.logits]
    for t in range(4, tokens.shape[1]):
        step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    difference = (torch.cat(logits, dim=1) - whole).abs().max() / whole.abs().max()
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    found.append({"logits": whole.tolist(), "difference": difference.item(), "generated": generated.tolist()})
modules = [name for name in sys.modules if name.split(".")[0] in ("keyreduce", "fla", "fla_torch")]
print()
print(json.dumps({"found": found, "modules": modules}))
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_prefill_equals_decode_and_both_equal_what_fla_computes(tmp_path, device):
    tokens, folders = draw_tokens(1, 9), []
    for model_type in MODEL_TYPES:
        source = open_folder(hybrid_models.store(hybrid_models.build(model_type), tmp_path / model_type))
        plan = plan_of(source, {"key": 5, "value": 5, "head": 1})
        folders.append(cut(source, plan, tmp_path / f"{model_type}-cut"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, device, json.dumps(tokens.tolist()), *map(str, folders)],
        capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False,
        env=environment | {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["modules"] == []
    assert len(result["found"]) == len(MODEL_TYPES)
    for folder, found in zip(folders, result["found"], strict=True):
        model = load(folder, torch.float32)
        logits = model(tokens, use_cache=False).logits
        assert found["difference"] < 1e-4
        torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-3, atol=1e-4 * logits.abs().max())
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert found["generated"] == generated.tolist()
