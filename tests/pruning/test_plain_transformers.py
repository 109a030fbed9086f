"""Pruned models in a process that has never heard of keyreduce: what decodes is what one pass gives, in every family.

The models of transformers load where fla is not installed either; those of fla have its kernels' place taken by our
backend, which knows nothing of keyreduce.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fla_torch
import hybrid_models
import pytest
import tiny_models
import torch
from cuts import cut, load, plan_of
from tiny_models import draw_tokens
from transformers import CONFIG_MAPPING

from keyreduce.checkpoint.folder import open_folder
from keyreduce.families import FAMILIES

MODEL_TYPES = {shipped_by: [] for shipped_by in ("transformers", "fla", "keyreduce")}
for name, family in FAMILIES.items():
    # One decides and does not generate, and a class with a head is there for its larger model alone.
    if name in CONFIG_MAPPING and name not in ("jev", "glm5_next_text"):
        MODEL_TYPES[family.shipped_by].append(name)
# transformers finds out what is installed from the names of packages: one that cannot be imported is none.
PLAIN = """
import importlib.util, json, sys

hidden, device, tokens, folders = map(json.loads, sys.argv[1:])

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)

if "fla" not in hidden:
    import fla_torch
    fla_torch.enable()
    import fla
import torch, transformers
torch.set_grad_enabled(False)
tokens = torch.tensor(tokens, device=device)
found = []
for path in folders:
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    is_causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    auto = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    model = model.eval().to(device)
    whole = model(tokens, use_cache=False).logits
    step = model(tokens[:, :4], use_cache=True)
    logits = [step.logits]
    for t in range(4, tokens.shape[1]):
        step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    difference = (torch.cat(logits, dim=1) - whole).abs().max() / whole.abs().max()
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    found.append({"logits": whole.tolist(), "difference": difference.item(), "generated": generated.tolist()})
print()
print(json.dumps({"found": found, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def store(model_type, folder):
    if model_type in tiny_models.FAMILIES:
        return tiny_models.save(tiny_models.build(model_type), folder)
    return hybrid_models.store(hybrid_models.build(model_type), folder)


@pytest.mark.parametrize(
    ("hidden", "device"),
    [
        pytest.param(["keyreduce", "fla", "fla_torch"], "cpu", id="without fla"),
        pytest.param(["keyreduce", "fla", "fla_torch"], "cuda", id="without fla, on a GPU", marks=pytest.mark.gpu),
        pytest.param(["keyreduce"], "cpu", id="with fla"),
    ],
)
@torch.no_grad()
def test_prefill_equals_decode_and_both_equal_what_is_computed_here(tmp_path, hidden, device):
    model_types = MODEL_TYPES["transformers"] if "fla" in hidden else MODEL_TYPES["fla"] + MODEL_TYPES["keyreduce"]
    tokens, folders = draw_tokens(1, 9), []
    for model_type in model_types:
        source = open_folder(store(model_type, tmp_path / model_type))
        plan = plan_of(source, {"key": 5, "value": 5, "head": 1})
        folders.append(cut(source, plan, tmp_path / f"{model_type}-cut"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    if "fla_torch" not in hidden:
        paths = [str(Path(fla_torch.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    arguments = [json.dumps(given) for given in (hidden, device, tokens.tolist(), [*map(str, folders)])]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *arguments],
        capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False,
        env=environment | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not {*result["modules"]} & {*hidden}
    assert len(result["found"]) == len(model_types) > 1
    for folder, found in zip(folders, result["found"], strict=True):
        model = load(folder, torch.float32)
        logits = model(tokens, use_cache=False).logits
        assert found["difference"] < 1e-4
        torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-3, atol=1e-4 * logits.abs().max())
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert found["generated"] == generated.tolist()
