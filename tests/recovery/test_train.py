"""Training of tiny pruned models on a CPU: what is trained, on what, towards what, and what comes out."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, build, draw_tokens, edit_config, edit_tensors, save, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import FileText
from keyreduce.errors import KeyreduceError
from keyreduce.models import miscompiled
from keyreduce.models.loading import load_model
from keyreduce.recovery.modes import make_training
from keyreduce.recovery.training import checks, run
from keyreduce.recovery.training import trainer as trainer_module
from keyreduce.recovery.training.checks import Needs, refuse_other_vocabulary
from keyreduce.recovery.training.lora import add_lora, find_targets, merge_lora
from keyreduce.recovery.training.run import train
from keyreduce.recovery.training.trainer import Rows, teacher_loss, text_loss

CPU = torch.device("cpu")
SETTINGS = Settings(num_batches=8, batch_size=4, seq_len=32)


@pytest.fixture
def text(tmp_path: Path) -> FileText:
    (tmp_path / "text.txt").write_text("".join(f"value {n} is {n * n}, yes\n" for n in range(300)))
    return FileText([tmp_path / "text.txt"])


@pytest.fixture
def trained(tmp_path, text):
    """A function: train the model of a folder, and return what came of it."""

    def start(student: Path, mode: str = "full", *, settings: Settings = SETTINGS, teacher: Path | None = None, **more):
        folder, inputs = more.pop("folder", tmp_path / "training"), more.pop("inputs", {"of": "a test"})
        overwrite, note = more.pop("overwrite", False), more.pop("note", lambda message: None)
        taught_by = None if teacher is None else open_folder(teacher)
        options = make_training(mode, {"lr": 1e-2} | more)
        return train(
            open_folder(student),
            taught_by,
            text,
            settings,
            mode,
            options,
            device=CPU,
            folder=folder,
            inputs=inputs,
            overwrite=overwrite,
            note=note,
        )

    return start


@pytest.fixture
def student(tmp_path) -> Path:
    return save(build("delta_net", initializer_range=0.02, intermediate_size=64), tmp_path / "student")


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_loss_falls_in_every_family(model_type, mode, trained, tmp_path):
    folder = save(build(model_type, initializer_range=0.05), tmp_path / "student")
    told = []
    result = trained(folder, mode, note=told.append, settings=SETTINGS._replace(num_batches=12))
    assert list(result.logged) == list(range(1, 13))
    assert result.losses[0] == pytest.approx(math.log(264), abs=0.5)
    # Additions to q, k and v alone have little to say while embeddings are random.
    assert result.losses[-1] < result.losses[0] - (0.5 if mode == "full" else 0.005)
    assert result.tokens == 12 * 4 * 32
    assert told[-1].startswith("step 12 of 12: loss ") and "tokens/s" in told[-1]


def test_full_training_is_adamw_step_by_step(trained, student, text):
    """The same steps taken by hand in float64, with the optimizer and schedule written out."""
    settings = Settings(num_batches=3, batch_size=2, seq_len=24)
    result = trained(student, settings=settings, warmup=0.0, lr=1e-3)
    loaded = load_model(student, CPU, torch.float32, gradients=True)
    rows = iter(Rows(text, loaded.tokenizer, 24, 0))
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        tokens_BT = torch.stack([next(rows)["input_ids"] for _ in range(2)])
        logits = model(tokens_BT).logits.double()
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])
        loss = -chosen.mean()
        assert result.losses[step] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in result.tensors:
            torch.testing.assert_close(result.tensors[name], parameter.detach(), atol=2e-5, rtol=1e-3)


def test_micro_batches_and_recomputation_change_nothing(trained, student, tmp_path):
    whole = trained(student, folder=tmp_path / "whole")
    pieces = trained(student, folder=tmp_path / "pieces", micro_batch=1, gradient_checkpointing=True)
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-5)
    for name in whole.tensors:
        torch.testing.assert_close(pieces.tensors[name], whole.tensors[name], atol=1e-4, rtol=1e-2)


def test_a_broken_off_run_ends_in_the_same_weights(trained, student, tmp_path):
    unbroken = trained(student, folder=tmp_path / "unbroken", save_every=3)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "unbroken", broken, ignore=shutil.ignore_patterns("checkpoint-8"))
    # A run that is killed while it saves leaves a checkpoint without the file that is written last.
    ignored = shutil.ignore_patterns("trainer_state.json")
    shutil.copytree(tmp_path / "unbroken/checkpoint-8", broken / "checkpoint-7", ignore=ignored)
    told = []
    resumed = trained(student, folder=broken, save_every=3, note=told.append)
    assert told[0].endswith("checkpoint-6")
    assert resumed.losses == unbroken.losses
    assert resumed.tensors.keys() == unbroken.tensors.keys()
    assert all(resumed.tensors[name].equal(unbroken.tensors[name]) for name in unbroken.tensors)
    with pytest.raises(KeyreduceError, match="from other inputs; pass `overwrite`"):
        trained(student, folder=broken, inputs={"of": "another test"})
    anew = []
    trained(student, folder=broken, inputs={"of": "another test"}, overwrite=True, note=anew.append)
    assert anew[0].startswith("step 1 of")


def test_lora_changes_its_targets_alone_and_ends_as_an_ordinary_model(trained, student, tmp_path):
    result = trained(student, "lora", lora_rank=3, lora_alpha=6.0)
    projections = [f"model.layers.{layer}.attn.{name}_proj.weight" for layer in (0, 1) for name in "qkv"]
    assert sorted(result.tensors) == sorted(projections)
    before = tensors_of(student)
    for name in projections:
        difference = (result.tensors[name] - before[name]).double()
        assert np.linalg.matrix_rank(difference.numpy(), tol=1e-6) == 3
    assert result.losses[-1] < result.losses[0]


def test_merged_additions_give_the_logits_that_they_gave_apart(student):
    model = build("gated_deltanet", initializer_range=0.1)
    family = load_model(save(model, student.with_name("gated")), CPU, torch.float32).family
    targets = find_targets(model, family, ["o_proj", "mlp.up_proj"])
    assert targets == sorted(f"model.layers.{n}.{name}" for n in (0, 1) for name in ("attn.o_proj", "mlp.up_proj"))
    tokens_BT = draw_tokens(2, 40)
    with torch.no_grad():
        plain = model(tokens_BT).logits
        whole = add_lora(model, targets, make_training("lora", {"lora_rank": 4}), seed=0)
        assert torch.equal(whole(tokens_BT).logits, plain)
        for name, parameter in whole.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
        apart = whole(tokens_BT).logits
        merged = merge_lora(whole)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(tokens_BT).logits, apart, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(apart, plain, atol=1e-2)


def test_losses_against_plain_loops():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) * 3 for _ in range(2))
    tokens = torch.randint(7, (2, 5), generator=generator)
    temperature, divergence, entropy = 2.0, 0.0, 0.0
    for row in range(2):
        for place in range(5):
            odds = [
                np.exp((logits[row, place].double() / temperature).numpy() - float(logits[row, place].max()) / 2)
                for logits in (student, teacher)
            ]
            q, p = (one / one.sum() for one in odds)
            divergence += sum(p[v] * math.log(p[v] / q[v]) for v in range(7))
            if place < 4:
                odds = np.exp(student[row, place].double().numpy())
                entropy -= math.log(odds[tokens[row, place + 1]] / odds.sum())
    assert teacher_loss(student, teacher, temperature).item() == pytest.approx(divergence / 10 * 4, rel=1e-5)
    assert text_loss(student, tokens).item() == pytest.approx(entropy / 8, rel=1e-5)
    assert teacher_loss(student, student, temperature).item() == pytest.approx(0, abs=1e-6)


def test_a_student_comes_to_say_what_its_teacher_says(trained, student, tmp_path, text):
    teacher = save(build("gated_deltanet", seed=3, initializer_range=0.3), tmp_path / "teacher")
    # Text like the one that it is taught on, and not in it.
    tokens_BT = torch.tensor([list(f"value {n} is {n * n}, yes, yes"[:24].encode()) for n in (301, 777)])
    with torch.no_grad():
        logits = [load_model(folder, CPU, torch.float32).model(tokens_BT).logits for folder in (student, teacher)]
    mixed = trained(student, teacher=teacher, distill_weight=0.25, folder=tmp_path / "mixed")
    alone = trained(student, teacher=teacher, folder=tmp_path / "alone")
    plain = trained(student, folder=tmp_path / "plain")
    # The first loss is that of the same weights and rows.
    assert mixed.losses[0] == pytest.approx(0.25 * alone.losses[0] + 0.75 * plain.losses[0], rel=1e-4)
    assert alone.losses[-1] < 0.95 * alone.losses[0]
    before = teacher_loss(*logits, 2.0)
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    model.load_state_dict(alone.tensors, strict=False)
    with torch.no_grad():
        assert teacher_loss(model(tokens_BT).logits, logits[1], 2.0) < before


def test_rows_are_the_text_once_and_then_once_more(text, monkeypatch):
    tokenizer = load_model(Path(run.__file__).parents[2] / "models/shipped/delta-net-5m", CPU, torch.float32).tokenizer
    monkeypatch.setattr(trainer_module, "_SHUFFLE_BUFFER", 20)
    rows = Rows(text, tokenizer, 50, seed=0)
    stream = iter(rows)
    whole = [256, *text.paths[0].read_bytes()]
    inorder = [whole[start : start + 50] for start in range(0, len(whole) - 49, 50)]
    drawn = [next(stream)["input_ids"].tolist() for _ in inorder]
    assert drawn != inorder and sorted(drawn) == sorted(inorder)
    # A row comes at most as many places early as the buffer holds.
    assert all(inorder.index(row) <= place + 20 for place, row in enumerate(drawn))
    assert rows.passes == 1
    again = [next(stream)["input_ids"].tolist() for _ in inorder]
    assert rows.passes == 2 and again != drawn and sorted(again) == sorted(inorder)
    assert [next(one)["input_ids"].tolist() for one in [iter(rows)] for _ in drawn] == drawn
    with pytest.raises(KeyreduceError, match="do not fill one row of 100,000"):
        Rows(text, tokenizer, 100_000, seed=0)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(trained, student, tmp_path, monkeypatch):
    calls, plain = [], run.RecoveryTrainer.compute_loss

    def breaks(self, *arguments, **more):
        calls.append(None)
        return plain(self, *arguments, **more) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(run.RecoveryTrainer, "compute_loss", breaks)
    with pytest.raises(KeyreduceError, match=r"NaN or inf at step 6: the last good checkpoint is .*checkpoint-4"):
        trained(student, save_every=2, folder=tmp_path / "training")
    kept = tensors_of(tmp_path / "training/checkpoint-4")
    assert kept and all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_no_room_is_told_with_what_would_fit(trained, student, monkeypatch, tmp_path):
    numbers = sum(tensor.numel() for tensor in tensors_of(student).values())
    added = 2 * 3 * 32 * (32 + 32)
    rows = 4 * 32 * 264
    assert Needs(numbers, numbers, 0, rows).nbytes == 16 * numbers + 12 * rows
    monkeypatch.setattr(checks, "available_memory", lambda device: 16 * numbers)
    with pytest.raises(
        KeyreduceError, match=r"training takes at least .* GiB.*these fit: .*`mode` lora `micro_batch` 1"
    ):
        trained(student)
    monkeypatch.setattr(checks, "available_memory", lambda device: 100)
    with pytest.raises(KeyreduceError, match="take a larger device"):
        trained(student, "lora")
    assert not (tmp_path / "training").exists()
    lora = Needs(weights=numbers, trained=added, teacher=0, logits=rows)
    assert lora.nbytes == 4 * (numbers - added) + 16 * added + 12 * rows


def test_bad_input_is_refused_before_anything_is_written(trained, student, tmp_path):
    teacher = save(build("delta_net", vocab_size=300), tmp_path / "teacher")
    with pytest.raises(KeyreduceError, match="its vocabulary has 300 tokens, not 264"):
        trained(student, teacher=teacher)
    shuffled = save(build("delta_net"), tmp_path / "shuffled")
    tokenizer = json.loads((shuffled / "tokenizer.json").read_text())
    numbers = tokenizer["model"]["vocab"]
    numbers["A"], numbers["B"] = numbers["B"], numbers["A"]
    (shuffled / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(KeyreduceError, match="give different ids to the same tokens"):
        refuse_other_vocabulary(open_folder(student), open_folder(shuffled))
    for mode, options, told in (
        ("lora", {"lora_targets": ("z_proj",)}, r"z_proj matches no linear layer; there are .*q_proj"),
        ("full", {"lora_rank": 3}, "takes no `lora_rank`; leave it out, or take `mode` lora"),
        ("full", {"lr": 0.0}, "`lr` is 0; it is above 0"),
        ("full", {"warmup": 1.0}, "`warmup` is 1; it is a share"),
        ("full", {"steps": 3}, "takes no `steps`"),
        ("full", {"micro_batch": 3}, "`micro_batch` 3 does not divide the 4 rows"),
        ("full", {"shard": True}, "start keyreduce under torchrun"),
    ):
        with pytest.raises(KeyreduceError, match=told):
            trained(student, mode, **options)
    with pytest.raises(KeyreduceError, match="do not fill one row"):
        trained(student, settings=SETTINGS._replace(seq_len=50_000))
    with pytest.raises(KeyreduceError, match="at least 2, to predict"):
        trained(student, settings=SETTINGS._replace(seq_len=1))
    assert not list((tmp_path / "training").glob("checkpoint*"))


def test_numbers_that_are_not_there_stop_at_the_first_step(trained, student):
    edit_tensors(student, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    edit_config(student, tie_word_embeddings=False)
    with pytest.raises(KeyreduceError, match="at step 1: there was no checkpoint yet"):
        trained(student)


def test_kernels_whose_gradients_are_wrong_here_are_not_trained_on(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(miscompiled, "_is_affected", lambda device: True)
    gated = save(build("gated_deltanet"), tmp_path / "gated")
    with pytest.raises(KeyreduceError, match=r"of the gated rule may be wrong.*, or take `kernels` torch$"):
        trained(gated, kernels="fla")
    assert not (tmp_path / "training").exists()
    assert trained(gated, settings=SETTINGS._replace(num_batches=1)).logged.keys() == {1}
