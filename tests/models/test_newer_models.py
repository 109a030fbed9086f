"""The newer families as models: what loads passes and nothing else, what was changed is written back, what they sum up.

Statistics are compared with what hooks of this file see. Shapes: B rows, T tokens, H key heads, K key channels of a
head, C channels that the output projection receives, D hidden.
"""

import hybrid_models
import pytest
import torch
import torch.nn.functional as F
import transformers
from hybrid_models import NEWER, WRAPPED, marked
from test_file_tensors import CPU
from tiny_models import draw_tokens, edit_config, tensors_of

from keyreduce.calibration.capture import collect
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.errors import KeyreduceError
from keyreduce.models.file_tensors import changed_tensors, rehearse_writing
from keyreduce.models.in_memory import ModuleCheckpoint, rebuilt
from keyreduce.models.loading import LoadedModel, load_model
from keyreduce.models.meta import check_loading, language_model
from keyreduce.models.offloading import offloading
from keyreduce.models.state_storage import stored_states
from keyreduce.pruning.state_budget import state_bytes
from keyreduce.recovery.streams import open_stream
from keyreduce.recovery.writing import Replace
from keyreduce.serving.capacity import CacheLayout

ALL = pytest.mark.parametrize("model_type", marked(NEWER))
OF_TRANSFORMERS = pytest.mark.parametrize("model_type", marked(n for n in NEWER if not n.startswith("precond")))
FUSED = {"lara_mini", "qwen4_exp_text", "qwen4_exp", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "jev"}
HEADLESS = {"jev"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Model type -> its folder, made once."""
    made = {}

    def make(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[model_type] = hybrid_models.store(hybrid_models.build(model_type), folder)
        return made[model_type]

    return make


def load(folder, **options) -> LoadedModel:
    return load_model(folder, CPU, torch.float32, with_head=False, **options)


@ALL
def test_what_loads_passes_and_nothing_else(stored, model_type):
    source = open_folder(stored(model_type))
    config, shapes = source.config, source.shapes
    check_loading(config, shapes, source.path)
    name = next(name for name in sorted(shapes) if name.endswith("dt_bias"))
    with pytest.raises(KeyreduceError, match=r"missing: .*dt_bias"):
        check_loading(config, {other: shape for other, shape in shapes.items() if other != name}, source.path)
    with pytest.raises(KeyreduceError, match=r"left over: .*\.more"):
        check_loading(config, shapes | {name.replace("dt_bias", "more"): (4,)}, source.path)
    with pytest.raises(KeyreduceError, match=r"of another shape: .* \[3\] for \["):
        check_loading(config, shapes | {name: (3,)}, source.path)


@ALL
def test_a_model_that_was_changed_is_written_back_and_loaded_again(tmp_path, stored, model_type):
    source = open_folder(stored(model_type))
    rehearse_writing(source)
    assert not list(changed_tensors(load(source.path).model, source, whole=True))
    model = load(source.path).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.rand_like(parameter)
    changed = dict(changed_tensors(model, source, whole=True))
    rewrite(source, tmp_path / "changed", edits={name: [Replace(tensor)] for name, tensor in changed.items()})
    again = dict(load(tmp_path / "changed").model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter), name


@ALL
def test_a_module_in_memory_is_saved_and_built_as_files_are(stored, model_type):
    loaded = load(stored(model_type))
    found = ModuleCheckpoint(loaded.model)
    for name, tensor in tensors_of(stored(model_type)).items():
        assert name not in found.tensors or torch.equal(found.read(name), tensor), name
    new = rebuilt(loaded.model, found.config, {name: found.read(name) for name in found.tensors})
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(new.get_parameter(name), parameter), name


@pytest.mark.parametrize("model_type", ["precond_gated_deltanet", "precond_kda"])
@torch.no_grad()
def test_preconditioned_states_have_the_bytes_of_their_cache(stored, model_type):
    loaded = load(stored(model_type))
    kept = loaded.model(input_ids=draw_tokens(2, 5), use_cache=True).past_key_values
    held = [tensor for layer in kept for tensor in layer["recurrent_state"] or ()]
    assert {tensor.ndim for tensor in held} == {3, 4} and {tensor.dtype for tensor in held} == {torch.float32}
    config = loaded.model.config.to_dict()
    assert 2 * loaded.family.state_bytes(config) == sum(tensor.nbytes for tensor in held)
    layout = CacheLayout.of(config)
    vectors = sum(tensor.nbytes for tensor in held if tensor.ndim == 3) // 2
    assert layout.state_bytes("float32") == loaded.family.state_bytes(config)
    assert layout.state_bytes("bfloat16") == (loaded.family.state_bytes(config) + vectors) // 2
    sizes = loaded.family.layer_sizes(config)
    assert state_bytes(loaded.family, "bfloat16", sizes) == layout.state_bytes("bfloat16")
    rounded = stored_states(loaded.model, loaded.family, "int8")
    with pytest.raises(KeyreduceError, match=r"`state_dtype`: .* float32"), rounded:
        pass


def operators_of(model):
    """The module of a model's mixers, and the names of what it calls with queries, keys and values."""
    mixers = {name.split(".")[-1]: module for name, module in model.named_modules() if ".layers.0." in f".{name}"}
    mixer = mixers.get("linear_attn", mixers.get("attn", mixers.get("self_attn")))
    module = __import__(type(mixer).forward.__module__, fromlist=["x"])
    return module, [name for name in vars(module) if name.startswith(("chunk_", "torch_chunk_", "fused_recurrent_"))]


@ALL
@torch.no_grad()
def test_sums_are_those_of_what_the_operators_get(stored, monkeypatch, model_type):
    loaded, tokens, seen = load(stored(model_type)), draw_tokens(2, 70), []
    module, names = operators_of(loaded.model)
    for name in names:

        def watched(*args, operator=getattr(module, name), **rest):
            seen.append((args[1] if args else rest["k"])[0:].double())
            return operator(*args, **rest)

        monkeypatch.setattr(module, name, watched)
    layers, count = collect(loaded, [tokens])
    assert (sorted(layers), count, len(seen)) == ([0, 2], 140, 2)
    for key_BTHK, statistics in zip(seen, layers.values(), strict=True):
        key_HK = key_BTHK[:, :, :: key_BTHK.shape[2] // 2].flatten(0, 1)
        torch.testing.assert_close(
            statistics.key_gram_HKK, torch.einsum("nhk,nhl->hkl", key_HK, key_HK), rtol=1e-5, atol=1e-6
        )
        assert statistics.output_energy_W.all() and statistics.input_square_D.all()


@pytest.mark.parametrize("model_type", marked(name for name in NEWER if name not in HEADLESS))
def test_gradients_of_projections_are_those_of_autograd(stored, model_type):
    loaded, tokens = load(stored(model_type)), draw_tokens(1, 9)
    layers, _ = collect(loaded, [tokens], gradients=True)
    model = loaded.model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    F.cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:]).backward()
    mixer = model.get_submodule(loaded.family.mixer.format(layer=2))
    names = ("in_proj_qkv", "out_proj") if model_type in FUSED else ("k_proj", "o_proj")
    rows = slice(16, 32) if model_type in FUSED else slice(0, 16)
    for name, word, dim in zip(names, ("key", "output"), (1, 0), strict=True):
        weight = getattr(mixer, name).weight
        effect = (weight.detach() * weight.grad).double().sum(dim)
        expected = effect[rows] if word == "key" else effect
        torch.testing.assert_close(layers[2].taylor.of("signed", word).flatten(), expected, rtol=1e-3, atol=1e-6)


@OF_TRANSFORMERS
def test_layers_wait_on_the_disk(stored, model_type):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    source, tokens = open_folder(stored(model_type)), draw_tokens(2, 20)
    whole, _ = collect(load(source.path), [tokens])
    with offloading(source.config, CPU, "disk") as placement:
        loaded = load(source.path, placement=placement)
        layers = loaded.family.mixer.split(".{layer}")[0]
        for name, parameter in loaded.model.named_parameters():
            assert parameter.is_meta == name.startswith(f"{layers}."), name
        offloaded, _ = collect(loaded, [tokens])
    for layer, statistics in whole.items():
        for name, tensor in statistics.tensors().items():
            assert torch.equal(offloaded[layer].tensors()[name], tensor), name


@ALL
@torch.no_grad()
def test_blocks_one_by_one_are_the_model(stored, model_type):
    loaded, tokens = load(stored(model_type)), draw_tokens(2, 11)
    seen = []
    last = loaded.model.get_submodule(loaded.family.mixer.format(layer=2).rpartition(".")[0])
    hook = last.register_forward_hook(lambda module, args, output: seen.append(output))
    loaded.model.base_model(input_ids=tokens, use_cache=False)
    hook.remove()
    stream = open_stream(loaded.model, loaded.family, [tokens, tokens.flip(0)], CPU)
    for layer in range(3):
        stream.advance(layer)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(stream.hidden[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stream.hidden[1], expected.flip(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", marked(["glm5_next"]))
def test_blocks_that_share_what_an_indexer_chose_are_refused(model_type):
    model = hybrid_models.build(model_type)
    model.config.text_config.indexer_types = ["full", "full", "shared"]
    with pytest.raises(KeyreduceError, match="share what an indexer chose"):
        open_stream(model, None, [draw_tokens(1, 4)], CPU)


@pytest.mark.parametrize("model_type", marked(WRAPPED))
def test_a_larger_model_is_of_the_class_that_its_config_names(stored, model_type):
    config = open_folder(stored(model_type)).config
    found = language_model(config)[0].__name__
    assert found == ("Qwen4ExpForCausalLM" if model_type == "qwen4_exp" else config["architectures"][0])
    assert type(load(stored(model_type)).model).__name__ == found
    if model_type != "jev":  # the class of a config that names none is that of its type
        assert language_model({**config, "architectures": None})[0].__name__ == found
        assert language_model({**config, "architectures": ["NoSuchModel", "LlamaModel"]})[0].__name__ == found


def test_a_class_that_generates_nothing_is_taken_too(tmp_path):
    """Of Qwen3.5 whole and alone, and of a reward model of it, which has no head for text."""
    folder = hybrid_models.store(hybrid_models.build("qwen3_5"), tmp_path / "whole")
    assert type(load(folder).model).__name__ == "Qwen3_5ForCausalLM"
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen3_5_text", **hybrid_models.LANGUAGE["qwen3_5_text"])
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    folder = hybrid_models.store(model, tmp_path / "reward")
    loaded, tokens = load(folder), draw_tokens(1, 5)
    assert type(loaded.model) is type(model)
    torch.testing.assert_close(loaded.model(tokens).logits, model(tokens).logits)
    with pytest.raises(KeyreduceError, match=f"{folder} is a {type(model).__name__}, which predicts no tokens"):
        load_model(folder, CPU, torch.float32)
    edit_config(folder, architectures=["Qwen3_5ForCausalLM"])
    with pytest.raises(KeyreduceError, match="missing: lm_head.weight"):
        load(folder)
