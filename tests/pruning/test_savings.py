"""What a cut saves, counted from headers, against the files that were written and the caches that models make."""

import pytest
import torch
from cuts import build, configs, cut, folder, numbers, plan_of, store
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES as MODELS
from tiny_models import draw_tokens, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.checkpoint.folder import open_folder
from keyreduce.pruning.savings import Savings, savings

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


@pytest.mark.parametrize("model_type", MODELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
@torch.no_grad()
def test_savings_are_those_of_the_files(model_type, data):
    with folder() as path:
        source = store(build(model_type, data.draw(configs(model_type))), path / "source")
        targets = data.draw(st.sampled_from([("key",), ("value",), ("head",), ("key", "value", "head")]))
        plan = plan_of(source, data.draw(numbers(source, targets)))
        cut(source, plan, path / "cut")
        saved = savings(source, open_folder(path / "cut"))
        prefixes = tuple(f"model.layers.{layer}.attn." for layer in plan.layers)
        counts, states = [], []
        for name in ("source", "cut"):
            tensors = tensors_of(path / name)
            mixers = [tensor.numel() for tensor_name, tensor in tensors.items() if tensor_name.startswith(prefixes)]
            counts.append((sum(mixers), sum(tensor.numel() for tensor in tensors.values())))
            model = AutoModelForCausalLM.from_pretrained(path / name)
            cache = model(draw_tokens(1, 3), use_cache=True).past_key_values
            states.append(4 * sum(cache[layer]["recurrent_state"].numel() for layer in plan.layers))
    assert saved.mixer_parameters == tuple(mixer for mixer, _ in counts)
    assert saved.model_parameters == tuple(whole for _, whole in counts)
    assert saved.state_bytes_per_sequence == tuple(states)


def test_projections_and_the_sentence(tmp_path):
    source = store(build("delta_net", {}), tmp_path / "source")
    plan = plan_of(source, {"key": 4}, "pca")
    tensors = tensors_of(cut(source, plan, tmp_path / "cut"))
    saved = savings(source, open_folder(tmp_path / "cut"))
    assert saved.model_parameters[1] == sum(tensor.numel() for tensor in tensors.values())
    assert Savings((2**22, 2**20), (1000, 600), (3000, 2600)).sentence == (
        "the state of a sequence is 75.0% smaller (4.00 to 1.00 MiB in float32), "
        "the mixers are 40.0% smaller, the whole model 13.3%"
    )
