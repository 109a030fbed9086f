"""The script as a user runs it, and then in forks of one process: tiny models, a few steps, no GPU."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fla  # noqa: F401  (transformers learns fla's model types)
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY, BATCH_SIZE, SEQ_LEN = 4, 2, 4, 32
TINY = {
    "model_type": "delta_net",
    "hidden_size": 32,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "vocab_size": 264,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "tie_word_embeddings": True,
}


def pretrain(
    python: str, folder: Path, output: Path, *options: str, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """Run flame/pretrain.py on the files that `corpus` wrote into ``folder``."""
    sizes = ["--steps", STEPS, "--save-every", SAVE_EVERY, "--batch-size", BATCH_SIZE, "--seq-len", SEQ_LEN]
    command = [python, *launcher, ROOT / "flame/pretrain.py", "--config", folder / "tiny.json", *sizes]
    command += ["--output", output, "--text", folder / "train.txt", "--heldout-text", folder / "heldout.txt", *options]
    path = f"{ROOT}{os.pathsep}{ROOT / 'flash-linear-attention'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "train.txt").write_text("".join(f"value {n} is {n * n}, é\n" for n in range(300)))
    (folder / "heldout.txt").write_text("".join(f"value {n} is {n * n}, é\n" for n in range(300, 320)))
    return folder


@pytest.fixture(scope="module")
def trained(corpus) -> Path:
    """The output folder of one unbroken run."""
    run = pretrain(sys.executable, corpus, corpus / "unbroken")
    assert run.returncode == 0, run.stderr
    return corpus / "unbroken"


def test_output_is_a_plain_checkpoint(trained):
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id == 256
    text = "def é(四):\r\n\t\x00 \u2028 don't 😀"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_record_tells_what_was_given_and_reached(trained, corpus):
    record = json.loads((trained / "model/training.json").read_text())
    assert record["tokens_seen"] == STEPS * BATCH_SIZE * SEQ_LEN
    assert record["text_tokens"] == 1 + len((corpus / "train.txt").read_bytes())
    assert record["arguments"]["config"] == TINY
    assert set(record["heldout_bits_per_byte_at_step"]) == {str(STEPS)}
    assert 0 < record["train_bits_per_token"] < 9
    # The weights that were written, measured another way: every token is a byte, but for the separator, and that comes
    # first, where nothing predicts it.
    model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype="auto")
    heldout = [256, *(corpus / "heldout.txt").read_bytes()]
    rows = torch.tensor(heldout[: len(heldout) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)
    with torch.no_grad():
        logits = model(rows).logits
    nats = F.cross_entropy(logits[:, :-1].reshape(-1, 264).float(), rows[:, 1:].reshape(-1))
    assert record["heldout_bits_per_byte"] == pytest.approx(nats.item() / math.log(2), rel=1e-3)


def test_training_again_is_refused(python, trained, corpus):
    run = pretrain(python, corpus, trained)
    assert run.returncode != 0
    assert "so this training is done" in run.stderr.splitlines()[-1]


def test_interrupted_run_goes_on_to_the_same_weights(python, trained, corpus):
    broken = corpus / "broken"
    shutil.copytree(trained, broken, ignore=shutil.ignore_patterns("model", f"checkpoint-{STEPS}"))
    # A run that is killed while it saves leaves a checkpoint without the file that is written last.
    shutil.copytree(
        trained / f"checkpoints/checkpoint-{STEPS}",
        broken / "checkpoints/checkpoint-3",
        ignore=shutil.ignore_patterns("trainer_state.json"),
    )
    other = pretrain(python, corpus, broken, "--seed", "5")
    assert other.returncode != 0
    assert "other arguments" in other.stderr.splitlines()[-1]
    run = pretrain(python, corpus, broken)
    assert run.returncode == 0, run.stderr
    resumed = load_file(broken / "model/model.safetensors")
    unbroken = load_file(trained / "model/model.safetensors")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_two_processes_train_as_one(python, trained, corpus):
    output = corpus / "two"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = pretrain(python, corpus, output, launcher=torchrun)
    assert run.returncode == 0, run.stderr
    records = [json.loads((folder / "model/training.json").read_text()) for folder in (output, trained)]
    assert [record["processes"] for record in records] == [2, 1]
    two, one = (record["heldout_bits_per_byte"] for record in records)
    assert two == pytest.approx(one, rel=2e-3)
    weights = [load_file(folder / "model/model.safetensors") for folder in (output, trained)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("config", sorted((ROOT / "configs/pretrain").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_are_about_five_million_parameters(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    assert 4.5e6 < model.num_parameters() < 5.5e6
    assert model.config.vocab_size >= 257
    assert model.config.bos_token_id == model.config.eos_token_id == 256
