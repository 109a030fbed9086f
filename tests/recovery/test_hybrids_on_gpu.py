"""Every mode of recovery on a GPU, of the hybrids that people serve, against the same on a CPU."""

import hybrid_models
import pytest
from tiny_models import tensors_of

from keyreduce.api import prune, recover
from keyreduce.recovery.modes import MODES, TRAINING_MODES

pytestmark = pytest.mark.gpu
AMOUNT = {"num_batches": 8, "batch_size": 4, "seq_len": 64}
SETTINGS = {"reconstruct": {"steps": 24}, "lora": {"lr": 1e-2}, "full": {"lr": 1e-2}}


@pytest.mark.parametrize("mode", [*MODES, *TRAINING_MODES])
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"])
def test_a_gpu_recovers_as_a_cpu_does(tmp_path, model_type, mode):
    text, dense, pruned = tmp_path / "text.txt", tmp_path / "dense", tmp_path / "pruned"
    text.write_text("".join(f"value {n} is {n * n}, yes\n" for n in range(600)))
    hybrid_models.store(hybrid_models.build(model_type), dense)
    cut = {"method": "l2", "target": ("key", "value"), "ratio": ("0.5", "0.5")}
    prune.run(prune.PruneRequest(model=str(dense), output=pruned, work=tmp_path, **cut))
    fields = {"compressed": str(pruned), "model": str(dense), "mode": mode, "text": (text,), **AMOUNT}
    fields |= {"work": tmp_path, **SETTINGS.get(mode, {})}
    on_gpu, on_cpu = (
        recover.run(recover.RecoverRequest(device=device, output=tmp_path / device, **fields))
        for device in ("cuda", "cpu")
    )
    if mode in TRAINING_MODES:
        assert on_gpu.loss_last < on_gpu.loss_first
        assert on_gpu.loss_last == pytest.approx(on_cpu.loss_last, rel=0.1)  # a GPU trains in bfloat16
    else:
        assert on_gpu.layers and on_gpu.layers.keys() == on_cpu.layers.keys()
        left = "missing_after" if mode == "least-squares" else "missing_reconstructed"
        for layer, figures in on_gpu.layers.items():
            assert figures[left] < figures["missing_before"]
            assert figures[left] == pytest.approx(on_cpu.layers[layer][left], rel=0.1), layer
    before, after, theirs = (tensors_of(folder) for folder in (pruned, tmp_path / "cuda", tmp_path / "cpu"))
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    # A gradient that is next to nothing may be 0 in bfloat16: a router's, of two experts.
    assert changed and changed <= {name for name, tensor in theirs.items() if not tensor.equal(before[name])}
