"""Layer-wise recovery of tiny random models of all families, checked from outside: with hooks on whole models."""

import contextlib
import json
from pathlib import Path

import hybrid_models
import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, build, save, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.batches import batches, spread_rows, text_token_ids, token_rows
from keyreduce.data.text import FileText
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import load_model
from keyreduce.recovery import modes
from keyreduce.recovery.layers import recover_checkpoint, recover_layers
from keyreduce.recovery.modes import MODES, Steps, make_steps
from keyreduce.recovery.repeats import with_repeats
from keyreduce.recovery.writing import write_recovered

CPU = torch.device("cpu")
SETTINGS = Settings(num_batches=8, batch_size=2, seq_len=80)
TARGETS = [{"key": 6}, {"value": 6}, {"head": 1}, {"key": 5, "value": 7, "head": 1}]


@pytest.fixture
def text(tmp_path: Path) -> FileText:
    drawn = np.random.default_rng(0).integers(32, 127, 4000).astype(np.uint8)
    (tmp_path / "text.txt").write_bytes(drawn.tobytes())
    return FileText([tmp_path / "text.txt"])


@pytest.fixture
def recovered(tmp_path, text):
    """A function: the folder of a pruned model, recovered, and the figures."""

    def run(dense: Path, pruned: Path, steps: Steps | None = None, settings: Settings = SETTINGS, repeats: float = 0):
        sources = open_folder(dense), open_folder(pruned)
        result = recover_checkpoint(*sources, text, settings, steps=steps, repeats=repeats, device=CPU)
        inputs = {"mode": "least-squares" if steps is None else "reconstruct"}
        target = tmp_path / f"{pruned.name}-recovered"
        write_recovered(sources[1], result, target, inputs=inputs, seconds=1.0, overwrite=True)
        return target, result

    return run


def run_hooked(
    folder: Path, text: FileText, repeats: float = 0
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """What each output projection of a whole model receives, and what it gives, in rows."""
    loaded = load_model(folder, CPU, torch.float32)
    received, given = {}, {}
    with contextlib.ExitStack() as undo, torch.no_grad():
        for layer, block in enumerate(loaded.model.model.layers):

            def hook(module, args, output, layer=layer):
                received.setdefault(layer, []).append(args[0].flatten(0, 1).double())
                given.setdefault(layer, []).append(output.flatten(0, 1).double())

            undo.callback(block.attn.o_proj.register_forward_hook(hook).remove)
        rows = token_rows(text.documents(SETTINGS.seed), loaded.tokenizer, SETTINGS.seq_len)
        rows = spread_rows(rows, SETTINGS.num_batches * SETTINGS.batch_size)
        rows = with_repeats(rows, repeats, text_token_ids(loaded.tokenizer, loaded.model.config.vocab_size), seed=7)
        for batch in batches(rows, SETTINGS.batch_size, SETTINGS.num_batches):
            loaded.model(batch, use_cache=False)
    return tuple({layer: torch.cat(parts) for layer, parts in found.items()} for found in (received, given))


@pytest.mark.parametrize(
    ("model_type", "keep"),
    [("delta_net", keep) for keep in TARGETS] + [("delta_net_2", TARGETS[3]), ("gated_deltanet", TARGETS[3])],
    ids=str,
)
def test_each_layer_is_the_least_squares_fit_on_the_recovered_path(pruned_pair, recovered, text, model_type, keep):
    dense, pruned = pruned_pair(build(model_type), **keep)
    folder, result = recovered(dense, pruned)
    _, wanted = run_hooked(dense, text)
    received, given = run_hooked(folder, text)
    _, before = run_hooked(pruned, text)
    for layer, inputs_NC in received.items():
        best, *_ = np.linalg.lstsq(inputs_NC.numpy(), wanted[layer].numpy(), rcond=None)
        missing = (wanted[layer] - given[layer]).square().sum().item()
        least = np.square(wanted[layer].numpy() - inputs_NC.numpy() @ best).sum()
        # The penalty costs a little, which held-out rows repay.
        assert least * (1 - 1e-6) <= missing <= 1.05 * least
        share = missing / wanted[layer].square().sum().item()
        assert result.layers[layer]["missing_after"] == pytest.approx(share, rel=1e-2)
        assert result.layers[layer]["missing_before"] > share
    # The first layer's inputs are those of the pruned model.
    share = ((wanted[0] - before[0]).square().sum() / wanted[0].square().sum()).item()
    assert result.layers[0]["missing_before"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_where_all_is_kept_nothing_changes(tmp_path, recovered, model_type):
    dense = save(build(model_type), tmp_path / "dense")
    folder, result = recovered(dense, save(build(model_type), tmp_path / "same"))
    assert result.tensors == {}
    assert all(figures["missing_before"] == figures["missing_after"] == 0 for figures in result.layers.values())
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()


def test_only_output_projections_change_and_the_folder_is_an_ordinary_one(pruned_pair, recovered):
    dense, pruned = pruned_pair(build("delta_net").bfloat16(), key=6)
    folder, result = recovered(dense, pruned)
    before, after = tensors_of(pruned), tensors_of(folder)
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert changed == {f"model.layers.{layer}.attn.o_proj.weight" for layer in (0, 1)} == result.tensors.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert (folder / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert tensor.equal(after.get(name, after["model.embeddings.weight"]))


def test_rows_that_repeat_are_fitted_too(pruned_pair, recovered, text):
    (text.paths[0]).write_text("ab" * 2000)  # as unlike random tokens as can be
    dense, pruned = pruned_pair(build("delta_net", initializer_range=0.3), key=6)
    wanted_ND = run_hooked(dense, text, repeats=0.9)[1][0]
    errors = []
    for share in (0, 0.5):
        folder, _ = recovered(dense, pruned, repeats=share)
        errors.append(float((run_hooked(folder, text, repeats=0.9)[1][0] - wanted_ND).square().sum()))
    assert errors[1] < errors[0]


def test_a_layer_that_says_nothing_ends_well(pruned_pair, recovered):
    """With no values the projection receives zeros: there is nothing to fit on."""
    model = build("delta_net")
    with torch.no_grad():
        model.model.layers[0].attn.v_proj.weight.zero_()
    dense, pruned = pruned_pair(model, key=6)
    _, result = recovered(dense, pruned)
    assert "model.layers.0.attn.o_proj.weight" not in result.tensors
    assert result.layers[0]["missing_after"] == 0
    assert 0 < result.layers[1]["missing_after"] < result.layers[1]["missing_before"]


def test_a_hybrid_keeps_its_softmax_layers(pruned_pair, recovered):
    model = build("delta_net", num_hidden_layers=3, attn={"layers": [1], "num_heads": 2})
    dense, pruned = pruned_pair(model, key=6)
    _, result = recovered(dense, pruned)
    assert result.tensors.keys() == {f"model.layers.{layer}.attn.o_proj.weight" for layer in (0, 2)}


FEW = Settings(num_batches=2, batch_size=2, seq_len=70)


@pytest.mark.parametrize(
    ("model_type", "scope"), [("delta_net", "mixer"), ("delta_net_2", "block"), ("gated_deltanet", "mixer-in-block")]
)
def test_gradient_steps_come_nearer_and_stay_in_their_layer(pruned_pair, recovered, model_type, scope):
    dense, pruned = pruned_pair(build(model_type), key=6)
    _, result = recovered(dense, pruned, Steps(32, 3e-3, scope), FEW)
    for layer, figures in result.layers.items():
        assert figures["error_last"] < 0.95 * figures["error_first"]
        names = {name for name in result.tensors if f"layers.{layer}." in name}
        assert any("q_proj" in name for name in names)
        assert any(".mlp." in name for name in names) == (scope == "block")
    assert not {name for name in result.tensors if "layers" not in name}


def test_experts_are_fitted_under_the_names_that_files_have(pruned_pair, recovered):
    dense, pruned = pruned_pair(hybrid_models.build("qwen3_next"), key=4)
    _, result = recovered(dense, pruned, Steps(16, 3e-3, "block"), FEW)
    assert {"error_first", "error_last"} <= result.layers[2].keys()
    assert any(name.startswith("model.layers.2.mlp.experts.1.") for name in result.tensors)
    assert result.tensors.keys() <= open_folder(pruned).tensors.keys()


def test_gradient_steps_bring_the_first_mixer_nearer_than_least_squares(pruned_pair, recovered, text):
    dense, pruned = pruned_pair(build("delta_net", num_hidden_layers=1), key=6)
    plain = recovered(dense, pruned)[1].layers[0]["missing_after"]
    folder, result = recovered(dense, pruned, Steps(32, 3e-3, "mixer"))
    wanted, given = (run_hooked(path, text)[1][0] for path in (dense, folder))
    missing = ((wanted - given).square().sum() / wanted.square().sum()).item()
    assert missing < 0.95 * plain
    assert result.layers[0]["missing_after"] == plain
    assert result.layers[0]["missing_reconstructed"] == pytest.approx(missing, rel=1e-3)


def test_steps_follow_the_text_that_there_is(pruned_pair, recovered, monkeypatch):
    dense, pruned = pruned_pair(build("delta_net", num_hidden_layers=1), key=6)
    monkeypatch.setattr(modes, "LEAST_STEPS", 1)
    monkeypatch.setattr(modes, "PASSES", 2)
    _, result = recovered(dense, pruned, Steps(), SETTINGS._replace(num_batches=1000))
    assert result.layers[0]["steps"] == 2 * 25  # 4,000 bytes are 25 batches of 2 rows of 80 tokens


def test_gradient_steps_repeat(pruned_pair, recovered):
    dense, pruned = pruned_pair(build("delta_net"), key=6)
    one, other = (recovered(dense, pruned, Steps(8, 1e-3, "block"), FEW)[1] for _ in range(2))
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_steps_that_run_away_are_refused(pruned_pair, recovered):
    dense, pruned = pruned_pair(build("delta_net"), key=6)
    with pytest.raises(KeyreduceError, match="give a lower `lr`"):
        recovered(dense, pruned, Steps(20, 1e18, "block"), FEW)


@pytest.mark.parametrize("steps", [None, Steps(4, 1e-3, "block")])
def test_models_in_memory_come_out_as_folders_do(pruned_pair, recovered, text, steps):
    """Bitwise, rounding to bfloat16 included (gradient steps repeat up to rounding); the dense model stays as it is."""
    dense, pruned = pruned_pair(build("gated_deltanet").bfloat16(), key=6)
    folder, of_folder = recovered(dense, pruned, steps, FEW)
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(pruned).items()}
    models = [load_model(path, CPU, torch.float32) for path in (dense, pruned)]
    before = {name: tensor.clone() for name, tensor in models[0].model.state_dict().items()}
    tokens, layers = recover_layers(*models, dtypes, text, FEW, steps=steps, repeats=0, device=CPU)
    assert tokens == of_folder.tokens and layers.keys() == of_folder.layers.keys()
    tolerance = 0 if steps is None else 1e-3
    for layer, figures in layers.items():
        assert figures == pytest.approx(of_folder.layers[layer], rel=tolerance)
    given = models[1].model.state_dict()
    for name, wanted in tensors_of(folder).items():
        assert wanted.dtype == torch.bfloat16 and given[name].dtype == torch.float32
        torch.testing.assert_close(given[name], wanted.float(), rtol=10 * tolerance, atol=tolerance)
    assert all(tensor.equal(before[name]) for name, tensor in models[0].model.state_dict().items())


@pytest.mark.parametrize(
    ("mode", "options", "told"),
    [
        ("least-squares", {"lr": 1.0}, "takes no `lr`; leave it out, or take `mode` reconstruct or lora or full"),
        ("reconstruct", {"warmup": 0.1}, "takes no `warmup`"),
        ("reconstruct", {"lr": 0.0}, "`lr` is 0; it is above 0"),
    ],
)
def test_settings_that_a_mode_does_not_have_are_refused(mode, options, told):
    with pytest.raises(KeyreduceError, match=told):
        make_steps(mode, options)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(hidden_size=64), "hidden size"),
        (dict(num_hidden_layers=3), "number of layers"),
        (dict(vocab_size=300), "vocabulary"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(tmp_path, recovered, changes, what):
    one, other = (save(build("delta_net", **sizes), tmp_path / str(len(sizes))) for sizes in ({}, changes))
    with pytest.raises(KeyreduceError, match=f"was not pruned from .*{what}"):
        recovered(other, one)


def test_the_record_and_the_card_tell_of_the_recovery(pruned_pair, recovered):
    dense, pruned = pruned_pair(build("delta_net"), key=6)
    folder, _ = recovered(dense, pruned)
    before, record = (json.loads((path / "keyreduce.json").read_text()) for path in (pruned, folder))
    (entry,) = record["repairs"]
    assert (entry["inputs"], entry["after_step"], entry["tokens"]) == ({"mode": "least-squares"}, 1, 8 * 2 * 80)
    assert entry["layers"].keys() == {"0", "1"}
    assert (record["steps"], record["dense"]) == (before["steps"], before["dense"])
    assert record["identity"] == open_folder(folder).identity != before["identity"]
    card = (folder / "README.md").read_text()
    # The card is that of the pruned checkpoint, and a section more.
    told = card.split("## Recovery\n")[1].split("## How to load it")[0]
    assert card.replace(f"## Recovery\n{told}", "") == (pruned / "README.md").read_text()
    assert told.strip() == f"- least-squares: {MODES['least-squares']}; 1,280 tokens of text"
