"""Loading without numbers: what transformers would load whole passes, and nothing else."""

import hybrid_models
import pytest
from tiny_models import tensors_of

from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.models.rehearsal import rehearse_loading


@pytest.fixture(scope="module", params=hybrid_models.HYBRIDS)
def stored(request, tmp_path_factory):
    """Config, shapes and folder of a hybrid, and the prefix of its first mixer's tensors."""
    model_type = request.param
    folder = hybrid_models.store(hybrid_models.build(model_type), tmp_path_factory.mktemp(model_type))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(folder).items()}
    prefix = next(name for name in shapes if name.endswith("linear_attn.A_log")).removesuffix("A_log")
    return open_folder(folder).config, shapes, folder, prefix


def test_what_loads_passes(stored):
    config, shapes, folder, _ = stored
    rehearse_loading(config, shapes, folder)
    rehearse_loading(config, shapes | {"mtp.norm.weight": (4,)}, folder)


def test_a_missing_tensor_is_named(stored):
    config, shapes, folder, prefix = stored
    rest = {name: shape for name, shape in shapes.items() if name != f"{prefix}A_log"}
    with pytest.raises(KeyreduceError, match=r"missing: model\.layers\.[02]\.linear_attn\.A_log"):
        rehearse_loading(config, rest, folder)


def test_a_tensor_that_nothing_asks_for_is_named(stored):
    config, shapes, folder, prefix = stored
    with pytest.raises(KeyreduceError, match=r"left over: .*linear_attn\.more"):
        rehearse_loading(config, shapes | {f"{prefix}more": (4,)}, folder)


def test_a_tensor_of_another_shape_is_named(stored):
    config, shapes, folder, prefix = stored
    with pytest.raises(KeyreduceError, match=r"of another shape: .*dt_bias \[3\] for \[4\]"):
        rehearse_loading(config, shapes | {f"{prefix}dt_bias": (3,)}, folder)


def test_a_config_of_no_model_is_refused(tmp_path):
    with pytest.raises(KeyreduceError, match="transformers does not load it"):
        rehearse_loading({"model_type": "qwen3_next", "hidden_size": "wide"}, {}, tmp_path)
