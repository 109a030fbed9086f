"""From text and a checkpoint to sums: what is taken, what is told, and what is refused."""

import contextlib

import fla_torch
import pytest
import torch
from tiny_models import FAMILIES, edit_tensors

from keyreduce.calibration import capture
from keyreduce.calibration.run import Settings, calibrate, describe_inputs
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import FileText
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import prepare_backend

CPU = torch.device("cpu")
QUERY = "model.layers.1.attn.q_proj.weight"


@pytest.fixture
def text(tmp_path):
    """A function: files that hold one document each."""

    def write(*documents: str) -> FileText:
        folder = tmp_path / "text"
        folder.mkdir()
        for number, document in enumerate(documents):
            (folder / f"{number}.txt").write_text(document)
        return FileText([folder])

    return write


def run(folder, text, settings, dtype=torch.float32, **options) -> tuple[Statistics, list[str], list[int]]:
    notes, seen = [], []
    source = open_folder(folder)
    statistics = calibrate(
        source, text, settings, device=CPU, dtype=dtype, progress=seen.append, note=notes.append, **options
    )
    return statistics, notes, seen


def sums(statistics: Statistics) -> torch.Tensor:
    return torch.cat([t.flatten() for layer in statistics.layers.values() for t in layer.tensors().values()])


def test_as_many_tokens_as_were_asked_for(tiny_folder, text):
    statistics, notes, seen = run(tiny_folder("delta_net"), text("abc" * 200), Settings(3, 2, 16))
    assert (statistics.tokens, notes, seen) == (96, [], [32, 32, 32])
    assert statistics.tokens == Settings(3, 2, 16).tokens
    source = open_folder(tiny_folder("delta_net"))
    assert statistics.model == source.identity
    unit = statistics.layers[0].unit_query_gram_HKK.diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(unit, torch.full((2,), 96.0).double(), rtol=1e-3, atol=0)


def test_text_shorter_than_one_row_is_used_and_said(tiny_folder, text):
    statistics, notes, _ = run(tiny_folder("delta_net"), text("hi"), Settings(2, 2, 16))
    assert statistics.tokens == 3  # the separator comes first
    assert notes == ["the text is shorter than one sequence: 3 tokens instead of 16"]


def test_text_that_ends_early_is_used_and_said(tiny_folder, text):
    statistics, notes, _ = run(tiny_folder("delta_net"), text("x" * 50), Settings(4, 2, 16))
    assert statistics.tokens == 48
    assert notes == ["the text ended after 48 of 128 tokens"]


def test_empty_text_is_refused(tiny_folder, text):
    with pytest.raises(KeyreduceError, match="the text is empty"):
        run(tiny_folder("delta_net"), text("", ""), Settings(1, 1, 16))


def test_the_order_of_documents_depends_on_the_seed_alone(tiny_folder, text):
    documents = text(*(f"document {number} " * 3 for number in range(20)))
    first, again, other = (
        sums(run(tiny_folder("delta_net"), documents, Settings(1, 2, 32, seed))[0]) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", [QUERY, "model.layers.0.mlp.up_proj.weight", "model.embeddings.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_copy, text, name, value):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    with pytest.raises(KeyreduceError, match=f"tensor '{name}' of .* holds NaN or inf"):
        run(folder, text("abc"), Settings(1, 1, 16))


def test_activations_that_overflow_name_their_layer(tiny_copy, text):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors[QUERY].fill_(3e38))
    with pytest.raises(KeyreduceError, match="activations of layer 1 hold NaN or inf .query_gram"):
        run(folder, text("abc"), Settings(1, 1, 16))


def test_half_precision_sums_are_near_those_of_float32(tiny_folder, text):
    documents, settings = text("the state is low-rank " * 20), Settings(1, 4, 32)
    expected = sums(run(tiny_folder("gated_deltanet"), documents, settings)[0])
    found = sums(run(tiny_folder("gated_deltanet"), documents, settings, torch.bfloat16)[0])
    assert found.dtype == torch.float64
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_added_where_they_are_asked_for(tiny_folder, text, model_type):
    documents, settings = text("the state is low-rank " * 20), Settings(2, 2, 32)
    plain, with_gradients = (
        run(tiny_folder(model_type), documents, settings, gradients=gradients) for gradients in (False, True)
    )
    assert with_gradients[1:] == plain[1:]
    assert (plain[0].inputs["gradients"], with_gradients[0].inputs["gradients"]) == (False, True)
    for layer, statistics in with_gradients[0].layers.items():
        assert plain[0].layers[layer].taylor is None
        assert all(sums.any() for sums in vars(statistics.taylor).values())
        for name, sums in plain[0].layers[layer].tensors().items():
            torch.testing.assert_close(statistics.tensors()[name], sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "gradients", "on_cuda"),
    [("cpu", False, False), ("cpu", True, False), ("cuda", False, None), ("cuda", True, True)],
)
def test_gradients_on_a_gpu_take_our_backend(monkeypatch, device, gradients, on_cuda):
    seen = []
    monkeypatch.setattr(fla_torch, "is_enabled", lambda: bool(seen))
    monkeypatch.setattr(fla_torch, "enable", lambda **options: seen.append(options))
    prepare_backend(torch.device(device), gradients=gradients)
    assert seen == ([] if on_cuda is None else [{"cuda": on_cuda}])
    # The next model of the same process gets the kernels back.
    prepare_backend(torch.device("cuda"))
    assert seen[1:] == ([] if on_cuda is None else [{"cuda": False}])


def test_gradients_take_two_tokens(tiny_folder, text):
    with pytest.raises(KeyreduceError, match="`seq_len` is 1; `gradients` need at least 2"):
        run(tiny_folder("delta_net"), text("abc"), Settings(1, 1, 1), gradients=True)


def test_gradients_that_overflow_name_their_layer(tiny_copy, text):
    folder = tiny_copy()
    # The logits are near the largest number that there is, and the loss is finite; its slope is not.
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(1e37))
    with pytest.raises(KeyreduceError, match="gradients of layer 0 hold NaN or inf .taylor."):
        run(folder, text("abc"), Settings(1, 1, 16), gradients=True)


@pytest.mark.parametrize("name", ["num_batches", "batch_size", "seq_len"])
@pytest.mark.parametrize("value", [0, -1])
def test_impossible_settings_are_refused(tiny_folder, text, name, value):
    with pytest.raises(KeyreduceError, match=f"`{name}` is {value}"):
        run(tiny_folder("delta_net"), text("abc"), Settings()._replace(**{name: value}))


def test_inputs_tell_apart_all_that_changes_the_sums(tiny_folder, text, tmp_path):
    source, other = open_folder(tiny_folder("delta_net")), open_folder(tiny_folder("gated_deltanet"))
    documents, settings = text("abc"), Settings(1, 2, 3, 4)
    same = describe_inputs(source, documents, settings, torch.float32)
    assert describe_inputs(source, FileText(documents.paths), settings, torch.float32) == same
    (tmp_path / "text" / "0.txt").write_text("abd")
    changed = [
        describe_inputs(other, documents, settings, torch.float32),
        describe_inputs(source, FileText(documents.paths), settings, torch.float32),
        describe_inputs(source, documents, settings, torch.bfloat16),
        describe_inputs(source, documents, settings, torch.float32, gradients=True),
        *(describe_inputs(source, documents, settings._replace(**{f: 9}), torch.float32) for f in Settings._fields),
    ]
    assert all(inputs != same for inputs in changed)


def test_operators_that_were_never_seen_are_refused(tiny_folder, text, monkeypatch):
    """A mixer that calls them from where nothing is replaced leaves sums of zeros, by which prune would choose."""
    monkeypatch.setattr(capture, "replaced_operators", lambda *arguments: contextlib.nullcontext())
    with pytest.raises(KeyreduceError, match=r"layer 0 hold none of its queries.* 5\.6\.2 to 5\.24") as told:
        run(tiny_folder("delta_net"), text("abc" * 20), Settings(1, 1, 16))
    assert "\n" not in str(told.value)


def test_keys_that_are_all_zero_are_refused(tiny_copy, text):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.attn.k_proj.weight"].zero_())
    with pytest.raises(KeyreduceError, match="layer 1 hold none of its keys"):
        run(folder, text("abc" * 20), Settings(1, 1, 16))
