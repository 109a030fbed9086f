"""``keyreduce prune`` with a budget for the state: what is said, written and refused."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import draw_tokens, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.pruning import trial

WORK = Path("keyreduce-out")
REPORT, PICTURE = WORK / "state-budget.json", WORK / "state-budget.png"
TEXT = "A state that is smaller forgets more, unless what reads it makes up for that: line {}.\n"
# Statistics and candidates take less text here than they do of larger models.
CALIBRATE = ("calibrate", "--num-batches", 2, "--batch-size", 2, "--seq-len", 64)


@pytest.fixture
def model(tiny_folder, keyreduce, monkeypatch) -> tuple:
    """The arguments of a tiny model and its text, calibrated."""
    for name, value in (("ROWS", 4), ("ROW_LENGTH", 64), ("BATCH", 2)):
        monkeypatch.setattr(trial, name, value)
    few = trial.RECOVERED["cpu"]._replace(num_batches=1, batch_size=2, seq_len=64)
    monkeypatch.setattr(trial, "RECOVERED", {"cpu": few})
    Path("text.md").write_text("".join(TEXT.format(line) for line in range(60)))
    given = ("--model", tiny_folder("gated_deltanet"), "--text", "text.md")
    assert keyreduce(*CALIBRATE, *given).code == 0
    return given


def test_a_dry_run_writes_its_report_alone(keyreduce, model):
    result = keyreduce("prune", *model, "--state-ratio", 0.5, "--search", "predicted", "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert {path.name for path in WORK.iterdir()} == {"calibration.safetensors", REPORT.name, PICTURE.name}
    content = json.loads(REPORT.read_text())
    rows = content["candidates"]
    assert rows[0] == content["chosen"] and content["model"] == "gated_deltanet" and len(rows) > 5
    assert content["dense_state_bytes"] == 4 * 2 * 4 * 12 * 24
    assert all(row["state_bytes"] <= content["dense_state_bytes"] // 2 for row in rows)
    assert PICTURE.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    chosen = f"{rows[0]['key_heads']} x {rows[0]['head_k_dim']} x {rows[0]['head_v_dim']}"
    assert f"{len(rows)} candidates, the choice first" in result.out and chosen in result.out
    assert f"wrote {REPORT} and {PICTURE.name}" in result.out

    said = keyreduce("prune", *model, "--state-bytes", "4.5KiB", "--search", "predicted", "--dry-run", "--json").json()
    assert said["state_budget"]["candidates"] == rows and said["report"] == str(REPORT)


def test_a_budget_for_which_statistics_of_few_tokens_are_refused_before_the_search(keyreduce, model):
    Path("short.md").write_text("elevenchar")  # with the separator before it
    given = (*model[:2], "--text", "short.md")
    for search in ("predicted", "measured"):
        result = keyreduce("prune", *given, "--work", search, "--state-ratio", 0.5, "--search", search)
        told = "the calibration statistics are of 11 tokens, too few to choose among 24 channels; calibrate on more"
        assert result.code == 2 and told in result.err.splitlines()[-1]
        assert {path.name for path in Path(search).iterdir()} == {"calibration.safetensors"}


@torch.no_grad()
def test_a_budget_is_met_and_recovered_in_one_command(keyreduce, model):
    how = ("--recover", "auto", "--device", "cpu", "--verify", "logits")
    arguments = ("prune", *model, "--state-ratio", 0.5, *how)
    result = keyreduce(*arguments, "--json").json()
    assert result["made"] and result["repair"]["mode"] == "least-squares"
    before, after = result["state_bytes_per_sequence"]
    assert before == 4 * 2 * 4 * 12 * 24 and after <= before // 2
    found = result["state_budget"]
    assert (found["search"], found["recover"]) == ("measured", "least-squares")
    chosen = found["chosen"]
    assert {name: result[name][1] for name in ("key_heads", "head_k_dim", "head_v_dim")} == {
        name: chosen[name] for name in ("key_heads", "head_k_dim", "head_v_dim")
    }
    assert {"perplexity_increase", "perplexity_error"} < chosen.keys()
    assert json.loads(REPORT.read_text())["chosen"] == chosen
    record = json.loads((WORK / "pruned" / "keyreduce.json").read_text())
    assert record["steps"][-1]["inputs"]["keep"] == {"state_ratio": 0.5, "state_dtypes": ["float32"]}
    assert not any("correction" in layer for layer in record["steps"][-1]["layers"].values())

    loaded, report = AutoModelForCausalLM.from_pretrained(WORK / "pruned", output_loading_info=True)
    assert not any(report.values())
    tokens, loaded = draw_tokens(2, 12), loaded.eval()
    whole = loaded(tokens, use_cache=False).logits
    part = loaded(tokens[:, :8], use_cache=True)
    logits = [part.logits]
    for step in range(8, 12):
        part = loaded(tokens[:, step : step + 1], past_key_values=part.past_key_values, use_cache=True)
        logits.append(part.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-3, atol=1e-3)

    again = keyreduce(*arguments, "--json")
    assert again.json()["made"] is False and "state_budget" not in again.json()
    assert "is there already, from the same inputs" in again.err
    other = keyreduce("prune", *model, "--state-ratio", 0.6, "--recover", "least-squares")
    assert other.code == 2 and "differs in keep" in other.err


def test_nothing_said_is_half_of_the_state_and_corrected(keyreduce, model):
    result = keyreduce("prune", *model, "--search", "predicted", "--json").json()
    before, after = result["state_bytes_per_sequence"]
    assert before // 4 < after <= before // 2
    layers = json.loads((WORK / "pruned" / "keyreduce.json").read_text())["steps"][-1]["layers"]
    for layer in layers.values():
        correction, heads = layer["correction"], len(layer["value"])
        assert len(correction["value_scale"]) == len(correction["beta_shift"]) == heads
        assert all(0 < factor <= 1 for factor in correction["value_scale"])
        assert all(shift <= 0 for shift in correction["beta_shift"])
    exact = keyreduce("prune", *model, "--search", "predicted", "--uncorrected", "--output", "exact", "--json").json()
    assert exact["state_budget"] == result["state_budget"]
    corrected, plain = tensors_of(WORK / "pruned"), tensors_of(Path("exact"))
    different = {name.partition(".attn.")[2] for name in plain if not torch.equal(plain[name], corrected[name])}
    assert different and different <= {"o_proj.weight", "b_proj.weight"}


def test_a_format_alone_can_be_enough(keyreduce, model):
    """Of the bytes of float32 half are those of bfloat16: the model stays as it is."""
    given = ("--state-ratio", 0.5, "--state-dtypes", "float32,bfloat16", "--search", "predicted")
    result = keyreduce("prune", *model, *given, "--json").json()
    assert result["state_budget"]["chosen"]["state_dtype"] == "bfloat16"
    assert result["head_k_dim"] == [12, 12] and result["head_v_dim"] == [24, 24]
    before, after = tensors_of(model[1]), tensors_of(WORK / "pruned")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert keyreduce("prune", *model, *given).code == 0


REFUSED = {
    "--state-ratio chooses what to remove, and --ratio says it": ("--state-ratio", 0.5, "--ratio", 0.5),
    "--state-bytes chooses what to remove, and --keep says it": ("--state-bytes", "4KiB", "--keep", 4),
    "--state-ratio and --fit both say": ("--state-ratio", 0.5, "--fit", "80GB,4096,200"),
    "--state-ratio is 1.5; it is the share": ("--state-ratio", 1.5),
    "--state-ratio is 'abc'; it is the share of the state's bytes to remove, one number": ("--state-ratio", "abc"),
    "--state-ratio is '0.5,0.25'; it is the share": ("--state-ratio", "0.5,0.25"),
    "--fit is '80GB'": ("--fit", "80GB"),
    "--dry-run goes with a budget: give --state-ratio": ("--dry-run", "--ratio", 0.5),
    "--state-dtypes goes with a budget": ("--state-dtypes", "int8", "--keep", 4),
    "there is nothing to remove": ("--state-bytes", "1GiB"),
    "no cut of key brings the state": ("--state-ratio", 0.99, "--target", "key"),
    "--allocate goes with --ratio or --keep": ("--state-ratio", 0.5, "--allocate", "energy"),
    "--search is 'luck'": ("--search", "luck"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_the_work(keyreduce, tiny_folder, message):
    result = keyreduce("prune", "--model", tiny_folder("gated_deltanet"), *REFUSED[message])
    assert result.code == 2 and message in result.err
    assert len(result.err.splitlines()) == 1
    assert not WORK.exists()
