"""The line of commands on models that are larger than a language model, or no language model at all."""

from pathlib import Path

import hybrid_models
import pytest
from hybrid_models import marked

TEXT = "the cat sat on the mat; the dog sat on the log. " * 30
SHAPE = ("--num-batches", 2, "--batch-size", 2, "--seq-len", 32)


@pytest.mark.parametrize("model_type", marked(["minicpm_ocr", "jev"]))
def test_the_commands_one_after_another(keyreduce, tmp_path, model_type):
    (tmp_path / "text.txt").write_text(TEXT)
    dense = hybrid_models.store(hybrid_models.build(model_type), tmp_path / "dense")
    text = ("--text", tmp_path / "text.txt", *SHAPE)
    calibrated = keyreduce("calibrate", "--model", dense, *text, "--json").json()
    assert (calibrated["tokens"], calibrated["layers"]) == (128, 2)
    options = ("--target", "key,value", "--keep", "4,3", "--verify", "logits", "--json")
    pruned = keyreduce("prune", "--model", dense, *options).json()
    assert (pruned["head_k_dim"], pruned["head_v_dim"]) == ([8, 4], [6, 3])
    card = Path("keyreduce-out/pruned/README.md").read_text()
    name = {"minicpm_ocr": "MiniCPMOcrForConditionalGeneration", "jev": "JevForDecision"}[model_type]
    assert f"model = {name}.from_pretrained(folder)" in card
    assert keyreduce("verify", "--load").code == 0
    least = keyreduce("recover", "--mode", "least-squares", *text, "--json").json()
    assert least["made"]
    evaluated = keyreduce("eval", *text[:2], "--num-batches", 1, "--seq-len", 32, "--json")
    if model_type == "jev":
        assert evaluated.code == 2
        assert "is a JevForDecision, which predicts no tokens" in evaluated.err
        taylor = keyreduce("calibrate", "--model", dense, *text, "--gradients", "--overwrite")
        assert taylor.code == 2 and "predicts no tokens" in taylor.err
    else:
        assert len(evaluated.json()["models"]) == 3


@pytest.mark.parametrize("model_type", marked(["bailing_hybrid"]))
def test_heads_that_engines_take_from_softmax_attention(keyreduce, tmp_path, model_type):
    """vLLM would read two heads where one is left: refused before anything is written, and told by inspect."""
    dense = hybrid_models.store(hybrid_models.build(model_type), tmp_path / "dense")
    cut = ("prune", "--model", dense, "--method", "l1", "--target", "head", "--keep", 1)
    for engine in ("vllm", "sglang"):
        refused = keyreduce(*cut, "--engine", engine)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1
        assert f"--engine {engine} takes the number of heads of bailing_hybrid's mixers from num_att" in refused.err
        assert "stays 2; it cannot run mixers of 1: cut channels, and leave the heads" in refused.err
        assert not Path("keyreduce-out").exists()
    pruned = keyreduce(*cut, "--json").json()
    assert "transformers" in pruned["suited_engines"]
    assert any(one.startswith("vLLM") and "as many heads as" in one for one in pruned["unsuited_engines"])
    for model, is_run in ((dense, True), ("keyreduce-out/pruned", False)):
        engines = keyreduce("inspect", model, "--json").json()["engines"]
        assert {one["name"]: one["runs"] for one in engines}["vllm"] == is_run
