"""Calibration of models whose layers wait outside a GPU, or are on several: the sums are those of one whole model.

With gradients, so that our PyTorch backend runs instead of fla's kernels, which would tune themselves for minutes.
"""

import hybrid_models
import pytest
import torch

from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import text_source
from keyreduce.models.loading import load_model
from keyreduce.models.offloading import offloading

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.gpu
SETTINGS = Settings(num_batches=2, batch_size=2, seq_len=20)
GPU = torch.device("cuda:0")
ALL = pytest.mark.parametrize("model_type", (*hybrid_models.HYBRIDS, "kimi_linear"))


def store(tmp_path, model_type, **changes):
    return open_folder(hybrid_models.store(hybrid_models.build(model_type, **changes), tmp_path / model_type))


def sums(tmp_path, source, offload=None, device=GPU):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    text = text_source((path,), None, None, None, default="calibration")
    return calibrate(source, text, SETTINGS, device=device, dtype=torch.float32, offload=offload, gradients=True)


def assert_near(found, expected, tolerance):
    assert (found.tokens, found.layers.keys()) == (expected.tokens, expected.layers.keys())
    for layer, statistics in expected.layers.items():
        for name, tensor in statistics.tensors().items():
            difference = (found.layers[layer].tensors()[name] - tensor).abs().max()
            assert difference <= tolerance * tensor.abs().max(), name


@ALL
def test_layers_may_wait_anywhere(tmp_path, model_type):
    source = store(tmp_path, model_type)
    whole = sums(tmp_path, source)
    assert_near(whole, sums(tmp_path, source, device=torch.device("cpu")), 1e-3)
    for place in ("disk", "cpu", "auto"):
        assert_near(sums(tmp_path, source, place), whole, 1e-4)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_layers_are_on_the_gpu_in_their_turn_alone(tmp_path, place):
    source = store(tmp_path, "qwen3_next")
    with offloading(source.config, GPU, place) as placement:
        model = load_model(source.path, GPU, torch.float32, gradients=True, placement=placement).model
        for name, parameter in model.named_parameters():
            assert parameter.is_meta == ("layers" in name), name
            assert parameter.is_meta or parameter.device == GPU, name


@ALL
def test_auto_divides_a_model_between_gpus(tmp_path, model_type):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    kinds = ["linear_attention", "full_attention"] * 4
    source = store(tmp_path, model_type, num_hidden_layers=len(kinds), layer_types=kinds)
    with offloading(source.config, GPU, "auto") as placement:
        model = load_model(source.path, GPU, torch.float32, gradients=True, placement=placement).model
        assert len({parameter.device for parameter in model.parameters()}) > 1
    assert_near(sums(tmp_path, source, "auto"), sums(tmp_path, source), 1e-4)
