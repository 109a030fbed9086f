import pytest
import torch

from keyreduce.benchmarking.forward import time_passes
from keyreduce.benchmarking.timed_models import timed_models
from keyreduce.benchmarking.work import model_work
from keyreduce.errors import KeyreduceError

SETTINGS = {"batch_size": 2, "seq_len": 70, "rounds": 3, "seed": 0}


def test_a_prefill_fills_a_cache_and_computes_one_row_of_logits(pair, roofline):
    asked, returned = [], []
    for timed in pair:
        timed.model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
        timed.model.register_forward_hook(lambda _, args, outputs: returned.append(outputs))
    ticks = []
    before = {name: tensor.clone() for name, tensor in pair[0].model.state_dict().items()}
    entries = time_passes(pair, roofline, "forward", **SETTINGS, progress=ticks.append)
    assert sum(ticks) == 3
    assert all(outputs.logits.shape == (2, 1, 264) for outputs in returned)
    assert all(outputs.past_key_values.get_seq_length() == 70 for outputs in returned)
    assert len({tuple(kwargs["input_ids"].flatten().tolist()) for kwargs in asked}) == 4
    for entry, timed in zip(entries, pair, strict=True):
        work = model_work(timed, batch_size=2, seq_len=70)
        seconds = entry["latency_seconds"]["median"]
        assert entry["compute_share"] == pytest.approx(work.flops / seconds / 1e9)
        assert entry["tokens_per_second"] == pytest.approx(140 / seconds)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair[0].model.state_dict().items())


def test_a_step_of_training_is_forward_backward_and_optimizer(pair, roofline):
    before = {name: tensor.detach().clone() for name, tensor in pair[0].model.named_parameters()}
    forward = time_passes(pair, roofline, "forward", **SETTINGS)
    train = time_passes(pair, roofline, "train_step", **SETTINGS)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in pair[0].model.named_parameters())
    assert not pair[0].model.training
    head = 2 * 2 * 69 * pair[0].model.lm_head.weight.numel()
    work = model_work(pair[0], batch_size=2, seq_len=70)
    for entry, flops in ((forward[0], work.flops), (train[0], 3 * (work.flops + head))):
        assert entry["teraflops"] == pytest.approx(flops / entry["latency_seconds"]["median"] / 1e12)
    assert train[0]["peak_memory_bytes"] > forward[0]["peak_memory_bytes"]


def test_a_hybrid_trains_after_a_prefill(loaded, roofline):
    """What rotary embeddings remember of a prefill must not be in the way of gradients."""
    models = timed_models({"hybrid": loaded(attn={"layers": [0], "num_heads": 2})})
    time_passes(models, roofline, "forward", **SETTINGS)
    (entry,) = time_passes(models, roofline, "train_step", **SETTINGS)
    assert entry["tokens_per_second"] > 0


@pytest.mark.parametrize("kind", ["forward", "train_step"])
def test_a_batch_beyond_all_memory_is_one_line(pair, roofline, kind):
    with pytest.raises(KeyreduceError, match="needs more memory than there is"):
        time_passes(pair, roofline, kind, **SETTINGS | {"batch_size": 10**12})
