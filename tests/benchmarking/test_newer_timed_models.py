"""Random models of the newer families for benchmarks: one mixer, or all layers, of several key sizes."""

import hybrid_models
import pytest
import torch
from hybrid_models import marked

from keyreduce.benchmarking.timed_models import random_models, sizes_named

CPU = torch.device("cpu")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("model_type", marked(["qwen3_5", "qwen4_exp", "lara_mini", "minicpmv4_6", "precond_kda"]))
@torch.no_grad()
def test_models_of_one_config(model_type, whole):
    config = hybrid_models.build(model_type).config.to_dict()
    made = random_models(config, sizes_named(config, [(8, None), (4, None)]), CPU, torch.float32, whole=whole, seed=0)
    assert [one.sizes.head_k_dim for one in made] == [8, 4]
    for one in made:
        assert (one.hidden, one.layer) == (32, 0)
        assert one.family.depth(one.model.config.to_dict()) == 3
        output = one.mixer(hidden_states=torch.randn(1, 5, 32))
        assert (output[0] if isinstance(output, tuple) else output).shape == (1, 5, 32)
    states = [one.describe()["state_bytes_per_sequence"] for one in made]
    assert states[0] == 2 * states[1]


@pytest.mark.parametrize("model_type", marked(["glm5_next", "bailing_hybrid"]))
def test_models_whose_config_says_one_size(model_type):
    config = hybrid_models.build(model_type).config.to_dict()
    (whole,) = random_models(config, sizes_named(config, [(8, None)]), CPU, torch.float32, whole=False, seed=0)
    assert whole.mixer.head_dim == 8
