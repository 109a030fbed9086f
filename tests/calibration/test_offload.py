"""Calibration of a model whose layers wait on the disk: the sums are those of the model that is there as a whole."""

import hybrid_models
import pytest
import tiny_models
import torch

from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import text_source
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import load_model
from keyreduce.models.offloading import offloading

pytest.importorskip("accelerate", reason="accelerate is not installed")

CPU, SETTINGS = torch.device("cpu"), Settings(num_batches=2, batch_size=2, seq_len=20)
MODEL_TYPES = (*hybrid_models.HYBRIDS, "kimi_linear")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return text_source((path,), None, None, None, default="calibration")


def store(tmp_path, model_type):
    return open_folder(hybrid_models.store(hybrid_models.build(model_type), tmp_path / model_type))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sums_are_the_same_bit_by_bit(tmp_path, text, model_type, gradients):
    source = store(tmp_path, model_type)
    whole, offloaded = (
        calibrate(source, text, SETTINGS, device=CPU, dtype=torch.float32, offload=offload, gradients=gradients)
        for offload in (None, "disk")
    )
    assert (whole.tokens, whole.inputs) == (offloaded.tokens, offloaded.inputs)
    assert whole.layers.keys() == offloaded.layers.keys()
    for layer, statistics in whole.layers.items():
        assert statistics.output_energy_W.all()
        assert (statistics.taylor is not None) == gradients
        for name, tensor in statistics.tensors().items():
            assert torch.equal(offloaded.layers[layer].tensors()[name], tensor), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_hold_no_numbers_before_their_turn_and_after_it(tmp_path, model_type):
    source = store(tmp_path, model_type)
    with offloading(source.config, CPU, "disk") as placement:
        model = load_model(source.path, CPU, torch.float32, placement=placement).model
        tokens = tiny_models.draw_tokens(1, 5)
        for _ in range(2):
            for name, parameter in model.named_parameters():
                assert parameter.is_meta == ("layers" in name), name
            with torch.no_grad():
                logits = model(tokens).logits
    whole = load_model(source.path, CPU, torch.float32).model
    with torch.no_grad():
        assert torch.equal(whole(tokens).logits, logits)


def test_auto_leaves_what_has_room_where_it_is(tmp_path, text):
    source = store(tmp_path, "qwen3_next")
    whole, automatic = (
        calibrate(source, text, SETTINGS, device=CPU, dtype=torch.float32, offload=offload)
        for offload in (None, "auto")
    )
    for name, tensor in whole.layers[0].tensors().items():
        torch.testing.assert_close(automatic.layers[0].tensors()[name].cpu(), tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"offload": "tape"}, "`offload` is 'tape'; take one of disk, cpu, auto"), ({"offload": "cpu"}, "`offload` disk")],
)
def test_what_cannot_be_is_refused(tmp_path, text, options, told):
    source = store(tmp_path, "qwen3_next")
    with pytest.raises(KeyreduceError, match=told):
        calibrate(source, text, SETTINGS, device=CPU, dtype=torch.float32, **options)


def test_models_of_fla_are_refused(tmp_path, text):
    source = open_folder(tiny_models.save(tiny_models.build("delta_net"), tmp_path / "dense"))
    with pytest.raises(KeyreduceError, match="those of fla, such as delta_net"):
        calibrate(source, text, SETTINGS, device=CPU, dtype=torch.float32, offload="disk")
