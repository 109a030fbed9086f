"""Tensors of a model under the names of its checkpoint: what was loaded is found again, and what changed since too."""

import hybrid_models
import pytest
import tiny_models
import torch

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.models.file_tensors import changed_tensors, file_tensors, mixer_tensors, rehearse_writing
from keyreduce.models.loading import load_model
from keyreduce.recovery.writing import Replace

CPU = torch.device("cpu")
MODEL_TYPES = [*hybrid_models.HYBRIDS, *hybrid_models.CHANNEL_DECAY, *tiny_models.FAMILIES]


def store(model_type, folder):
    if model_type in tiny_models.FAMILIES:
        return open_folder(tiny_models.save(tiny_models.build(model_type), folder))
    return open_folder(hybrid_models.store(hybrid_models.build(model_type), folder))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_that_was_changed_is_written_back_and_loaded_again(tmp_path, model_type):
    source = store(model_type, tmp_path / "model")
    rehearse_writing(source)
    assert not list(changed_tensors(load_model(source.path, CPU, torch.float32).model, source, whole=True))
    model = load_model(source.path, CPU, torch.float32).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.rand_like(parameter)
    changed = dict(changed_tensors(model, source, whole=True))
    assert sum(tensor.numel() for tensor in changed.values()) == sum(p.numel() for p in model.parameters())
    rewrite(source, tmp_path / "changed", edits={name: [Replace(tensor)] for name, tensor in changed.items()})
    again = dict(load_model(tmp_path / "changed", CPU, torch.float32).model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter), name


@pytest.mark.parametrize("is_twice", [False, True])
def test_tied_weights_are_written_under_the_names_that_the_checkpoint_has(tmp_path, is_twice):
    folder = tiny_models.save(tiny_models.build("gated_deltanet", tie_word_embeddings=True), tmp_path)
    if is_twice:
        embeddings = tiny_models.tensors_of(folder)["model.embeddings.weight"]
        tiny_models.edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": embeddings.clone()}))
    source = open_folder(folder)
    model = load_model(folder, CPU, torch.float32).model
    with torch.no_grad():
        model.lm_head.weight += 1
    changed = dict(changed_tensors(model, source, whole=True))
    assert changed.keys() == {"model.embeddings.weight"} | ({"lm_head.weight"} if is_twice else set())
    assert all(torch.equal(tensor, model.lm_head.weight) for tensor in changed.values())


def test_what_the_checkpoint_has_otherwise_is_refused(tmp_path):
    source = store("qwen3_next", tmp_path)
    model = load_model(source.path, CPU, torch.float32).model
    del source.tensors["model.layers.0.mlp.experts.1.down_proj.weight"]
    with pytest.raises(KeyreduceError, match="layers.0.mlp.experts.1.down_proj.weight.*cannot be written back"):
        file_tensors(model, source)


def test_pieces_of_other_lengths_are_found_again(tmp_path):
    """transformers cuts what it joined into thirds when it saves."""
    check(open_folder(tiny_models.save(hybrid_models.build("olmo_hybrid"), tmp_path)))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_was_loaded_is_found_again(tmp_path, model_type):
    check(store(model_type, tmp_path))


def check(source):
    model = load_model(source.path, CPU, torch.float32).model
    found = dict(mixer_tensors(model, source))
    family = family_of(source.config, source.tensors)
    prefixes = tuple(family.tensor_name(layer, "") for layer in family.mixer_layers(source.config))
    assert found.keys() == {name for name in source.tensors if name.startswith(prefixes)}
    for name, tensor in found.items():
        assert torch.equal(tensor, source.read(name)), name


@pytest.mark.parametrize("model_type", ["olmo_hybrid", "kimi_linear", "qwen3_5"])
def test_what_changed_since_is_found(tmp_path, model_type):
    source = store(model_type, tmp_path)
    model = load_model(source.path, CPU, torch.float32).model
    family = family_of(model.config.to_dict())
    mixer = model.get_submodule(family.mixer.format(layer=2))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 1
    changed = {name for name, tensor in mixer_tensors(model, source) if not torch.equal(tensor, source.read(name))}
    prefix = family_of(source.config, source.tensors).tensor_name(2, "")
    assert changed == {name for name in source.tensors if name.startswith(prefix)}
