"""The whole line of commands on tiny hybrids of transformers, trained for some steps."""

import hybrid_models
import pytest
import torch
from tiny_models import tensors_of

TEXT = "the cat sat on the mat; the dog sat on the log. " * 60
SHAPE = ("--num-batches", 2, "--batch-size", 2, "--seq-len", 70)


def train(model, steps: int = 12) -> None:
    """Bring the loss on the text down, by a language model's own way to learn."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.tensor(list(TEXT.encode()))[: 4 * 64].view(4, 64)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("model_type", ["qwen3_next", "olmo_hybrid", "qwen3_5"])
def test_the_commands_one_after_another(keyreduce, tmp_path, model_type):
    (tmp_path / "text.txt").write_text(TEXT)
    model = hybrid_models.build(model_type)
    train(model)
    dense, text = hybrid_models.store(model, tmp_path / "dense"), ("--text", tmp_path / "text.txt")
    calibrated = keyreduce("calibrate", "--model", dense, *text, *SHAPE, "--gradients", "--json").json()
    assert (calibrated["tokens"], calibrated["layers"]) == (280, 2)

    pruned = {}
    for method, target in (("rrqr", "key"), ("taylor", "key,value"), ("pca", "key")):
        options = ("--method", method, "--target", target, "--ratio", 0.25, "--output", tmp_path / method)
        pruned[method] = keyreduce("prune", "--model", dense, *options, "--verify", "logits", "--json").json()
    assert pruned["rrqr"]["head_k_dim"] == pruned["pca"]["head_k_dim"] == [8, 6]
    assert pruned["taylor"]["head_v_dim"] == [6, 4]
    assert pruned["taylor"]["state_bytes_per_sequence"] == [4 * 2 * 4 * 8 * 6, 4 * 2 * 4 * 6 * 4]
    assert {"fla", "transformers"} <= set(pruned["taylor"]["suited_engines"])
    for method, result in pruned.items():
        assert result["model_parameters"][1] == sum(tensor.numel() for tensor in tensors_of(tmp_path / method).values())

    keyreduce("convert-dcp", tmp_path / "taylor", tmp_path / "dcp", "--json").json()
    keyreduce("convert-dcp", tmp_path / "dcp", tmp_path / "back", "--json").json()
    assert keyreduce("verify", tmp_path / "back").code == 0
    before, after = tensors_of(tmp_path / "taylor"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    pair = ("--model", dense, "--compressed", tmp_path / "rrqr")
    whole, cut = keyreduce("eval", *pair, *text, "--num-batches", 1, "--seq-len", 64, "--json").json()["models"]
    assert 1 < whole["perplexity_per_token"] < 100
    assert whole["perplexity_per_token"] != cut["perplexity_per_token"] < 264
    timed = keyreduce("benchmark", *pair, "--rounds", 2, "--seq-len", 64, "--json").json()
    assert [entry["head_k_dim"] for entry in timed["models"]] == [8, 6]


def test_a_hybrid_is_cut_out_of_a_distributed_checkpoint(keyreduce, tmp_path):
    dense = hybrid_models.store(hybrid_models.build("qwen3_5"), tmp_path / "dense")
    keyreduce("convert-dcp", dense, tmp_path / "dcp", "--json").json()
    for model, output in ((dense, "one"), (tmp_path / "dcp", "other")):
        keyreduce("prune", "--model", model, "--method", "l2", "--output", tmp_path / output, "--json").json()
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert len(one["model.language_model.layers.0.linear_attn.in_proj_qkv.weight"]) == 2 * 2 * 6 + 4 * 6
