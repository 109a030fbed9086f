"""Training of the hybrids that people serve, whose files name and divide tensors otherwise than the model does."""

import hybrid_models
import pytest
import torch

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import FileText
from keyreduce.models.loading import load_model
from keyreduce.recovery.layers import Recovered
from keyreduce.recovery.modes import make_training
from keyreduce.recovery.training.run import train
from keyreduce.recovery.writing import write_recovered

CPU = torch.device("cpu")
SETTINGS = Settings(num_batches=4, batch_size=4, seq_len=32)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"])
def test_what_was_trained_is_what_loads_again(tmp_path, model_type, mode):
    (tmp_path / "text.txt").write_text("".join(f"value {n} is {n * n}, yes\n" for n in range(300)))
    source = open_folder(hybrid_models.store(hybrid_models.build(model_type), tmp_path / "student"))
    training = make_training(mode, {"lr": 1e-2})
    trained = train(
        source, None, FileText([tmp_path / "text.txt"]), SETTINGS, mode, training,
        device=CPU, folder=tmp_path / "training", inputs={},
    )  # fmt: skip
    assert trained.tensors.keys() <= source.tensors.keys()
    write_recovered(source, Recovered(trained.tensors, 0, {}), tmp_path / "made", inputs={"mode": mode}, seconds=0)
    before, after = (dict(load_model(path, CPU, torch.float32).model.named_parameters())
                     for path in (source.path, tmp_path / "made"))  # fmt: skip
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if mode == "full":
        assert trained.losses[-1] < trained.losses[0]
        assert any(".mlp." in name for name in changed) and any("attn" in name for name in changed)
    else:
        assert changed and all("attn" in name for name in changed)
