"""DeltaNet2 to and from a folder, here and where keyreduce is not; and the configs it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fla_torch
import pytest
import torch
from tiny_models import COMMON, draw_tokens, tensors_of
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from keyreduce.models.delta_net_2 import DeltaNet2Config, DeltaNet2ForCausalLM, DeltaNet2Model

OPTIONS = dict(per_head_conv=True, share_kv_conv=True, expand_k=[0.5, 1.25], expand_v=0.75)
SCALED = dict(shift_only_conv=True, conv_scaled_shift=True, tie_word_embeddings=True)

ELSEWHERE = """
import sys
import fla_torch.registry
fla_torch.registry.mend = lambda: None  # what fla's own models need to decode, this one has
fla_torch.enable()
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens, logits = torch.load(f"{folder}/logits.pt")
    assert torch.equal(model(tokens).logits, logits)
    generated = model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = tokens[:, :4]
    for _ in range(3):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)
    assert not any(name.split(".")[0] == "keyreduce" for name in sys.modules)
    model.save_pretrained(f"{folder}-again")
"""


def build(**options) -> DeltaNet2ForCausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeltaNet2Config(**COMMON | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("options", [OPTIONS, SCALED], ids=["kernels", "scales"])
def test_a_saved_model_loads_again(tmp_path, options):
    model = build(**options)
    model.save_pretrained(tmp_path)
    tokens = draw_tokens(2, 9)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is DeltaNet2ForCausalLM
    assert not any(report.values())
    assert (again.lm_head.weight is again.model.embeddings.weight) == model.config.tie_word_embeddings
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert again.config.expand_k == options.get("expand_k", 1.0)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeltaNet2Config
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is DeltaNet2Model
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(tokens).logits.isfinite().all()


def test_one_tensor_holds_the_kernel_of_k_and_v(tmp_path):
    build(**OPTIONS).save_pretrained(tmp_path)
    names = {name.removeprefix("model.layers.1.attn.") for name in tensors_of(tmp_path) if "layers.1.attn." in name}
    assert {name for name in names if "conv" in name} == {"q_conv1d.weight", "kv_conv1d.weight"}
    assert {name for name in names if "conv" not in name} == {
        f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj")
    }


def test_saved_models_load_where_there_is_no_keyreduce(tmp_path):
    models = {name: build(**options) for name, options in (("kernels", OPTIONS), ("scales", SCALED))}
    tokens = draw_tokens(2, 9)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        torch.save((tokens, model(tokens).logits.detach()), tmp_path / name / "logits.pt")
    environment = os.environ | {
        "PYTHONPATH": str(Path(fla_torch.__file__).parents[1]),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    # From another working directory, and without the paths that this process found keyreduce by.
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *(tmp_path / name for name in models)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # What is saved there is a whole checkpoint as well.
    for name, model in models.items():
        folder, again = tmp_path / name, tmp_path / f"{name}-again"
        for path in ("modeling_delta_net_2.py", "mixer_delta_net_2.py", "configuration_delta_net_2.py"):
            assert (again / path).read_bytes() == (folder / path).read_bytes()
        assert json.loads((again / "config.json").read_text())["model_type"] == "delta_net_2"
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(expand_k=[1.0]), "expand_k lists 1 layers and num_hidden_layers is 2"),
        (dict(expand_k=[1.0, 1.0, 1.0]), "expand_k lists 3 layers"),
        (dict(expand_k=[1.0, 0.3]), r"expand_k 0\.3 makes 9\.6 channels of hidden_size 32"),
        (dict(expand_k=[1.0, 1 / 32]), "num_heads 2 does not divide"),
        (dict(expand_k=0), "expand_k is 0, where a positive number belongs"),
        (dict(expand_k=[1.0, None]), "expand_k is None"),
        (dict(expand_k="1"), "expand_k is '1'"),
        (dict(expand_v=float("nan")), "expand_v is nan"),
        (dict(expand_v=0.4), r"expand_v 0\.4 makes 12\.8 channels"),
        (dict(expand_v=True), "expand_v is True"),
        (dict(qk_norm="l1"), "qk_norm is 'l1', where one of l2, sum belongs"),
        (dict(qk_activation="gelu"), "qk_activation is 'gelu'"),
        (dict(attn_mode="fused_chunk"), "attn_mode is 'fused_chunk'"),
        (dict(per_head_conv="false"), "per_head_conv is 'false', where true or false belongs"),
        (dict(conv_scaled_shift=True), "set shift_only_conv too"),
        (dict(conv_size=0), "conv_size is 0"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(num_heads=2.0), r"num_heads is 2\.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        DeltaNet2Config(**COMMON | options)
    assert "\n" not in str(caught.value)


def test_a_config_that_was_spoilt_later_is_refused_when_a_model_is_built():
    config = DeltaNet2Config(**COMMON)
    config.expand_k = [1.0]
    with pytest.raises(ValueError, match="expand_k lists 1 layers"):
        DeltaNet2ForCausalLM(config)


def test_a_config_without_arguments_is_one_kernel_for_all_heads():
    config = DeltaNet2Config()
    assert (config.model_type, config.expand_k, config.per_head_conv) == ("delta_net_2", 1.0, False)
    assert DeltaNet2Config(expand_k=[1.0, 0.5], num_hidden_layers=2).expand_k_of(1) == 0.5
