"""From what a user calls a model to a loaded one."""

import json
import logging
import os

import fla_torch
import pytest
import torch
from tiny_models import FAMILIES, draw_tokens, edit_config, edit_tensors, tensors_of

from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.find import DEFAULT_MODEL, SHIPPED, find_model, model_name, shipped_models
from keyreduce.checkpoint.folder import open_folder
from keyreduce.devices import pick_device, pick_dtype
from keyreduce.errors import KeyreduceError
from keyreduce.models import tokenizers
from keyreduce.models.loading import load_model
from keyreduce.models.tokenizers import load_tokenizer

CPU = torch.device("cpu")


def load(folder):
    return load_model(folder, CPU, torch.float32)


def test_shipped_models():
    assert shipped_models() == ["delta-net-5m", "gated-deltanet-5m"]
    assert find_model(None) == find_model(DEFAULT_MODEL) == SHIPPED / DEFAULT_MODEL
    for name in shipped_models():
        loaded = load(find_model(name))
        assert loaded.family.sizes(loaded.model.config.to_dict()).head_k_dim == 128
        assert loaded.tokenizer("a")["input_ids"] == [97]
        text = loaded.tokenizer.decode(loaded.model.generate(torch.tensor([list(b"import ")]), max_new_tokens=4)[0])
        assert text.startswith("import ")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_folder_loads_as_it_is(tiny_folder, model_type):
    folder = tiny_folder(model_type)
    loaded = load(find_model(str(folder)))
    assert (loaded.family.model_type, loaded.folder) == (model_type, folder)
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors_of(folder).items())
    assert load_model(folder, CPU, torch.bfloat16).model.dtype == torch.bfloat16


def test_a_distributed_checkpoint_is_converted(tiny_folder, tmp_path):
    folder, step = tiny_folder("delta_net"), tmp_path / "dcp" / "step-2"
    step.mkdir(parents=True)
    write_dcp(open_folder(folder), step)
    tokens = draw_tokens(1, 9)
    with torch.no_grad():
        logits = [load(find_model(str(path))).model(tokens).logits for path in (folder, step, step.parent)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_folder_goes_before_a_name(tiny_copy, monkeypatch):
    folder = tiny_copy("delta-net-5m")
    monkeypatch.chdir(folder.parent)
    assert find_model("delta-net-5m").resolve() == folder
    assert model_name("delta-net-5m") == str(folder)


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name(None) == DEFAULT_MODEL
    assert model_name("owner/name") == "owner/name"
    assert model_name(".") == os.path.realpath(tmp_path)


@pytest.mark.parametrize("name", ["nonsense", "n" * 5000, "../nonsense/", "a b/c", "/nonsense"])
def test_no_such_model(name):
    with pytest.raises(KeyreduceError, match="there is no model .* a shipped model .delta-net-5m, gated-deltanet-5m"):
        find_model(name)


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KeyreduceError, match="there is no folder owner/nonsense, and the hub did not give"):
        find_model("owner/nonsense")


def test_devices_and_dtypes():
    assert pick_device("cpu") == CPU
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype(None, CPU) == torch.float32
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", CPU) == torch.float16
    for device in ("", "bogus", "meta", "cuda:99"):
        with pytest.raises(KeyreduceError, match=f"device '{device}' cannot be used here: [^\n]{{1,300}}$"):
            pick_device(device)
    with pytest.raises(KeyreduceError, match="take one of float32, bfloat16, float16"):
        pick_dtype("float13", CPU)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "keyreduce knows: .*delta_net, delta_net_2, gated_deltanet"),
        ({"num_heads": None, "hidden_size": 40}, "head_k_dim comes to 2.5"),
        ({"num_heads": 4}, r"of another shape: model.layers.0.attn.b_proj.weight \[2, 32\] for \[4, 32\]"),
        ({"vocab_size": 99}, r"of another shape: .*embeddings.weight \[264, 32\] for \[99, 32\]"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"num_hidden_layers": None}, "missing: model.layers.2.attn.q_proj.weight, .* more"),
        ({"vocab_size": "x"}, "loads? .*validat"),
        ({"hidden_act": "nonsense"}, "does not load: .*nonsense"),
        ({"qk_activation": "nonsense"}, "does not load: "),
        ({"attn": {"layers": [1]}}, "does not load: .*num_heads"),
    ],
    ids=str,
)
def test_configs_of_no_model_are_told_in_one_line(tiny_copy, capfd, changes, told):
    folder = tiny_copy()
    edit_config(folder, **changes)
    with pytest.raises(KeyreduceError, match=told):
        load(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_missing_weight_is_not_made_up(tiny_copy):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(KeyreduceError, match="missing: model.layers.1.mlp.up_proj.weight$"):
        load(folder)


def test_weights_that_the_model_has_no_place_for_are_mentioned(tiny_copy, caplog):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.D": torch.ones(2)}))
    with caplog.at_level(logging.WARNING):
        load(folder)
    (record,) = [record for record in caplog.records if record.name == "keyreduce.models.loading"]
    told = f"{folder}: the model has no place for 1 of its tensors, such as 'model.layers.0.mlp.D'"
    assert record.getMessage() == told


@pytest.mark.parametrize("name", ["attn.D", "attn.norm.weight"])
def test_a_mixer_of_another_version_of_the_library_is_refused_unread(tiny_copy, monkeypatch, name):
    """Without them it would be another model, and its figures those of no model."""
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors.update({f"model.layers.0.{name}": torch.ones(2)}))
    monkeypatch.setattr("keyreduce.models.loading.AutoModelForCausalLM", None)
    with pytest.raises(KeyreduceError, match=rf"the tensors of {folder} .*; left over: model\.layers\.0\.{name}$"):
        load(folder)


def test_a_tokenizer_of_another_model(tiny_copy, monkeypatch):
    folder = tiny_copy()
    edit_config(folder, vocab_size=250)
    rows = {"lm_head.weight", "model.embeddings.weight"}
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:250].clone() for name in rows}))
    monkeypatch.setattr("keyreduce.models.loading.AutoModelForCausalLM", None)
    told = rf"the tokenizer of {folder} has ids up to 256, and the model embeddings of 250 tokens, 0 to 249"
    with pytest.raises(KeyreduceError, match=told):
        load(folder)
    assert load_tokenizer(folder)("a")["input_ids"] == [97]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "there is no file of one"),
        ({"tokenizer.model": "\n"}, "the package sentencepiece is missing: pip install sentencepiece protobuf"),
        ({"tiktoken.model": "IQ== 0\n"}, "the package tiktoken is missing: pip install tiktoken"),
        (
            {
                "tiktoken.model": "IQ== 0\n",
                "tokenization_kimi.py": "raise SystemExit('was run')\n",
                "tokenizer_config.json": json.dumps(
                    {
                        "tokenizer_class": "TikTokenTokenizer",
                        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
                    }
                ),
            },
            "it is code of the model's repository, which keyreduce does not run, and it needs the package tiktoken",
        ),
    ],
)
def test_tokenizers_that_need_something(tiny_copy, monkeypatch, capsys, files, told):
    folder = tiny_copy()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for name, content in files.items():
        (folder / name).write_text(content)
    missing = {"sentencepiece", "google.protobuf", "tiktoken"}
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("transformers asked"))
    with pytest.raises(KeyreduceError) as refusal:
        load(folder)
    told = f"{folder} has no tokenizer that loads ({told}); put the tokenizer.json of the model there"
    assert str(refusal.value) == told
    assert capsys.readouterr() == ("", "")


def test_a_weight_that_is_not_finite_is_named(tiny_copy):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"][5].fill_(float("inf")))
    with pytest.raises(KeyreduceError, match="tensor 'lm_head.weight' of .* holds NaN or inf"):
        load(folder)


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', "[]", ""])
def test_a_damaged_tokenizer(tiny_copy, content):
    folder = tiny_copy()
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(KeyreduceError, match="has no tokenizer that loads .*put the tokenizer.json of the model there"):
        load(folder)


def test_an_fla_that_the_backend_does_not_fit(tiny_folder, monkeypatch):
    def refuse(**options):
        raise fla_torch.UnsupportedVersionError("the PyTorch backend works with flash-linear-attention 0.6.0")

    monkeypatch.setattr(fla_torch, "enable", refuse)
    with pytest.raises(KeyreduceError, match="works with flash-linear-attention 0.6.0"):
        load(tiny_folder("delta_net"))
