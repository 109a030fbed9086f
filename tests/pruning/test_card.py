"""The model card beside a pruned checkpoint: the hub can read it, its figures are the files', its code runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuts import config_of, cut, plan_of
from huggingface_hub import ModelCard
from tiny_models import FAMILIES as MODELS
from tiny_models import tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.checkpoint.card import model_card
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.record import Record
from keyreduce.families import FAMILIES
from keyreduce.pruning.methods import METHODS

REPOSITORY = Path(__file__).parents[2]
SIZES = {
    "key heads": "key_heads",
    "value heads": "value_heads",
    "key channels a head": "head_k_dim",
    "value channels a head": "head_v_dim",
}
# A front matter's end, HTML, a link, a table cell, code: what text of a record could break out with.
HOSTILE = "x\n---\nlicense: mit\n---\n# <b>hi</b> [a](b) | `c`\n```"


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def table_of(card: str) -> dict[str, list[str]]:
    """Return label -> its cells, of the card's table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {label: cells for label, *cells in rows[2:]}


def drawn_card(**changes) -> str:
    """Return a card of one step that no checkpoint has, with parts of its record changed."""
    sizes = {"key_heads": 2, "value_heads": 2, "head_k_dim": 8, "head_v_dim": 8}
    layers = {"0": {"before": sizes, "after": sizes | {"head_k_dim": 4}}}
    figures = {"state_bytes_per_sequence": [3 * 2**30, 3 * 2**19], "mixer_parameters": [20, 16]}
    step = {"inputs": {"method": "l2"}, "layers": layers, "ran": {"key": "l2"}, "figures": figures}
    step |= changes.pop("step", {})
    source_card = changes.pop("source_card", "")
    record = {"dense": "/models/some", "versions": {"keyreduce": "0.1.0"}, "steps": (step,)} | changes
    return model_card(Record(**record), {"model_type": "delta_net"}, source_card)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_hub_reads_its_front_matter(tiny_folder, pruned, model_type):
    card = ModelCard(card_of(pruned(tiny_folder(model_type), 5)))
    assert (card.data["library_name"], card.data["pipeline_tag"]) == ("transformers", "text-generation")
    assert card.data.tags == ["keyreduce", "pruned", "linear-attention", model_type]
    assert card.data.base_model is None  # a folder of this machine is none
    assert model_type.replace("_", r"\_") in card.text.split("\n## ")[0]


@pytest.mark.parametrize("dense, base", [("fla-hub/delta_net-1.3B", True), ("delta-net-5m", False), ("/a/b", False)])
def test_only_a_name_on_the_hub_is_a_base_model(dense, base):
    assert ModelCard(drawn_card(dense=dense)).data.base_model == (dense if base else None)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_table_is_that_of_the_files(tiny_folder, tmp_path, model_type):
    source = open_folder(tiny_folder(model_type))
    plan = plan_of(source, {"key": 5, "value": 6, "head": 1})
    target = cut(source, plan, tmp_path / "pruned")
    table = table_of(card_of(target))
    family = FAMILIES[model_type]
    sizes = [family.sizes(config_of(folder)) for folder in (source.path, target)]
    for label, name in SIZES.items():
        assert table.pop(label) == [str(getattr(layer, name)) for layer in sizes]
    models, mixers = [], []
    for tensors in (tensors_of(source.path), tensors_of(target)):
        models.append(sum(tensor.numel() for tensor in tensors.values()))
        mixers.append(sum(tensor.numel() for name, tensor in tensors.items() if ".attn." in name))
    assert table.pop("model parameters") == [f"{count:,}" for count in models]
    assert table.pop("mixer parameters") == [f"{count:,}" for count in mixers]
    assert table.keys() == {"state per sequence, float32"}


def test_the_state_is_in_mebibytes():
    """Of tiny models it rounds to nothing."""
    assert table_of(drawn_card())["state per sequence, float32"] == ["3,072.00 MiB", "1.50 MiB"]


def test_layers_that_differ_are_a_range(tiny_folder, pruned):
    card = card_of(pruned(tiny_folder("delta_net_2"), {0: 3, 1: 9}))
    assert table_of(card)["key channels a head"] == ["16", "3 to 9"]


def test_each_step_is_told(tiny_folder, pruned):
    once = pruned(tiny_folder("delta_net"), 9, method="l2", name="once")
    folders = tiny_folder("delta_net"), pruned(once, 4, method="rrqr", name="twice")
    card = card_of(folders[1])
    assert "in 2 steps" in card and "in 1 step." in card_of(once)
    assert table_of(card)["key channels a head"] == ["16", "4"]
    dense, end = (sum(tensor.numel() for tensor in tensors_of(folder).values()) for folder in folders)
    assert table_of(card)["model parameters"] == [f"{dense:,}", f"{end:,}"]
    places = [card.index(METHODS[name].citation) for name in ("l2", "rrqr")]
    assert places == sorted(places)
    assert all(METHODS[name].summary in card for name in ("l2", "rrqr"))


def test_how_it_was_made():
    calibration = {"text": {"kind": "stdlib"}, "num_batches": 16, "seq_len": 512}
    inputs = {"method": "wanda", "target": "key", "keep": {"key": 96}, "seed": 7, "calibration": calibration}
    card = drawn_card(step={"inputs": inputs, "command": "keyreduce prune --seed 7"})
    assert "- seed: `7`\n" in card
    assert '- target: `"key"`\n' in card
    assert '- keep: `{"key": 96}`\n' in card
    assert f"- calibration: `{json.dumps(calibration)}`\n" in card
    assert "- command: `keyreduce prune --seed 7`\n" in card
    assert "command:" not in drawn_card()


@pytest.mark.parametrize(
    "changes",
    [
        {"dense": HOSTILE},
        {"dense": f"owner/{HOSTILE}"},
        {"step": {"inputs": {"target": HOSTILE, "keep": {HOSTILE: 1}, "seed": HOSTILE}, "ran": {"key": HOSTILE}}},
        {"versions": {"keyreduce": HOSTILE}},
        {"step": {"command": HOSTILE}},
        {"step": {"inputs": {"method": "l2", "calibration": {"text": HOSTILE}}}},
    ],
)
def test_text_of_a_record_stays_text(changes):
    told, plain = drawn_card(**changes), drawn_card()
    assert ModelCard(told).data.to_dict() == ModelCard(plain).data.to_dict()
    assert [line for line in told.splitlines() if line[:3] in ("---", "```")] == ["---", "---", "```python", "```"]
    assert [line for line in told.splitlines() if line[:2] == "##"] == [
        line for line in plain.splitlines() if line[:2] == "##"
    ]
    assert table_of(told) == table_of(plain)
    outside_code = re.sub(r"```.*?```|`[^`\n]*`", "", told.replace("\\`", ""), flags=re.DOTALL)
    assert "`" not in outside_code
    assert not re.search(r"(?<!\\)<b>|(?<!\\)\[a", outside_code)


def test_each_target_says_which_method_ran(tiny_folder, pruned):
    card = card_of(pruned(tiny_folder("delta_net"), 9, method="auto", value=8, head=1))
    for target, name in (("key", "rrqr"), ("value", "energy"), ("head", "wanda")):
        assert f"- method for {target}: {name} ({METHODS[name].summary}; {METHODS[name].citation})" in card
    assert "auto" not in card.split("## How to load it")[0]


RUN_SNIPPETS = """
import json, os, sys
logits = []
for path, code in json.loads(sys.stdin.read()):
    os.chdir(path)
    names = {}
    exec(code, names)
    tokens = names["tokenizer"]("def", return_tensors="pt").input_ids
    logits.append(names["model"](tokens).logits[0, -1].tolist())
print()
print(json.dumps(logits))
"""


def test_the_code_that_loads_it_runs_on_a_cpu(tiny_folder, pruned):
    folders = [pruned(tiny_folder(name), 5, name=name) for name in ("delta_net", "delta_net_2")]
    snippets = []
    for folder in folders:
        (code,) = re.findall(r"```python\n(.*?)```", card_of(folder), re.DOTALL)
        # The card has the line for a CPU as a comment: here it is what the reader is told to run first.
        first = re.search(r"^# on a machine without a GPU, first: (.*)$", code, re.MULTILINE)[1]
        assert "\nimport fla " in code  # on a CPU that line is not missed: the backend imports fla too
        snippets.append((str(folder), f"{first}\n{code}"))
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY / "flash-linear-attention"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folders[0].parent / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_SNIPPETS],
        input=json.dumps(snippets), capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, found in zip(folders, json.loads(done.stdout.splitlines()[-1]), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = model(torch.tensor([list(b"def")])).logits[0, -1].tolist()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
