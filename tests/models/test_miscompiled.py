"""What is refused, and warned of, where Triton is known to compile fla's kernels wrong."""

import fla.utils
import pytest
import torch

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES
from keyreduce.models import miscompiled
from keyreduce.models.miscompiled import has_wrong_gated_gradients, refuse_wrong_gradients, warn_of_wrong_results

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Of two heads; DeltaNet's config has widths, Gated DeltaNet's the size of a head and a ratio.
GATED = {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 64, "expand_v": 1}
KDA = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32, "expand_v": 2}


def delta_net(keys: int, values: int) -> dict:
    return {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "expand_k": keys / 64, "expand_v": values / 64}


@pytest.fixture
def on_hopper(monkeypatch):
    """Make fla see a GPU of that kind, and the Triton that it warns of, or another one."""

    def feign(is_hopper=True, is_above_3_4=True, is_above_3_7_1=False):
        monkeypatch.setattr(fla.utils, "IS_NVIDIA_HOPPER", is_hopper)
        monkeypatch.setattr(fla.utils, "TRITON_ABOVE_3_4_0", is_above_3_4)
        monkeypatch.setattr(fla.utils, "TRITON_ABOVE_3_7_1", is_above_3_7_1)

    feign()
    return feign


@pytest.mark.parametrize("channels", [(24, 128), (16, 128), (32, 64), (32, 128), (64, 32)])
def test_a_small_side_and_a_large_one_are_suspected(on_hopper, caplog, channels):
    family, config = FAMILIES["delta_net"], delta_net(*channels)
    told = rf"gradients .* of heads of {channels[0]} x {channels[1]} channels may be"
    with pytest.raises(KeyreduceError, match=told):
        refuse_wrong_gradients(family, config, GPU)
    warn_of_wrong_results(family, config, GPU)
    (record,) = caplog.records
    assert "results of fla's kernels of heads of" in record.message and "install Triton 3.7.1" in record.message


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("delta_net", delta_net(*channels)) for channels in ((16, 16), (32, 32), (48, 128), (64, 128), (128, 128))]
    + [("kda", KDA)],
)
def test_other_sizes_and_rules_are_not(on_hopper, caplog, model_type, config):
    refuse_wrong_gradients(FAMILIES[model_type], config, GPU)
    warn_of_wrong_results(FAMILIES[model_type], config, GPU)
    assert not caplog.records


def test_the_gated_rule_is_not_trained_without_other_kernels(on_hopper, monkeypatch, caplog):
    gated = (FAMILIES["gated_deltanet"], GATED, GPU)
    with pytest.raises(KeyreduceError, match="of the gated rule may be wrong.*, or take `kernels` torch$"):
        refuse_wrong_gradients(*gated, ", or take `kernels` torch")
    warn_of_wrong_results(*gated)
    assert not caplog.records
    for model_type in ("gated_deltanet", "qwen3_next", "qwen3_5_text", "olmo_hybrid"):
        assert has_wrong_gated_gradients(FAMILIES[model_type], GPU)
    assert not has_wrong_gated_gradients(FAMILIES["gated_deltanet"], CPU)
    assert not has_wrong_gated_gradients(FAMILIES["delta_net"], GPU)
    monkeypatch.setattr(miscompiled.importlib.util, "find_spec", lambda name: name == "tilelang")
    refuse_wrong_gradients(*gated)


@pytest.mark.parametrize(
    ("device", "feigned"),
    [(CPU, {}), (GPU, {"is_hopper": False}), (GPU, {"is_above_3_7_1": True}), (GPU, {"is_above_3_4": False})],
)
def test_elsewhere_nothing_is(on_hopper, caplog, device, feigned):
    on_hopper(**feigned)
    for model_type, config in (("delta_net", delta_net(32, 128)), ("gated_deltanet", GATED)):
        refuse_wrong_gradients(FAMILIES[model_type], config, device)
        warn_of_wrong_results(FAMILIES[model_type], config, device)
    assert not caplog.records
