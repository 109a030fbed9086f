"""The model card as a function of record, config and source card: what it takes from the source, what it leaves out."""

import pytest
from huggingface_hub import ModelCard

from keyreduce.checkpoint.card import model_card, read_card
from keyreduce.checkpoint.record import Record

SIZES = {"key_heads": 2, "value_heads": 2, "head_k_dim": 8, "head_v_dim": 8}
STEP = {
    "inputs": {"source": "an identity", "method": "wanda", "target": "key"},
    "layers": {"0": {"before": SIZES, "after": SIZES | {"head_k_dim": 4}}},
    "ran": {"key": "wanda"},
    "figures": {"state_bytes_per_sequence": [512, 256]},
}
CONFIG = {"model_type": "delta_net"}
SOURCE = """---
license: other
license_name: some-license
license_link: LICENSE
language: en
library_name: fla
tags: [dense]
datasets: [owner/text]
---
# Model of somebody

What it is.

## License

Under the licence.

### What that means

No harm.

## Training

On text.

## Intended use

    ## Training is no heading here

```bash
# Neither is this
```

Talk.

# Citation

None.
"""


def card(source: str = "", *, steps=(STEP,), **fields) -> str:
    return model_card(Record(steps=steps, **{"dense": "owner/dense"} | fields), CONFIG, source)


def test_the_licence_is_that_of_the_source():
    data = ModelCard(card(SOURCE)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "some-license", "LICENSE")
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("owner/dense", "transformers", "text-generation")
    assert data.tags == ["keyreduce", "pruned", "linear-attention", "delta_net"]
    assert data.datasets is None  # what it was trained on, this one was not
    assert ModelCard(card()).data.license is None


def test_the_sections_of_licence_and_use_are_kept_as_they_are():
    text = card(SOURCE)
    begin, end = SOURCE.index("## License"), SOURCE.index("## Training\n")
    assert SOURCE[begin:end].strip() in text
    begin, end = SOURCE.index("## Intended use"), SOURCE.index("# Citation")
    assert SOURCE[begin:end].strip() in text
    assert "On text." not in text and "What it is." not in text and "None." not in text


def test_a_second_card_keeps_what_the_first_kept():
    once = card(SOURCE)
    assert card(once) == once
    assert card(card()) == card()
    # Not even a model whose name is about use makes a card of ours part of the next.
    odd = card(SOURCE, dense="owner/licence-of-use")
    assert card(odd, dense="owner/licence-of-use") == odd


@pytest.mark.parametrize("front", ["license: [", "model-index: 3", "- a list"])
def test_front_matter_that_is_damaged_costs_nothing_else(front):
    assert card(f"---\n{front}\n---\n## License\nfree").endswith("## License\nfree\n")


PATHS = [
    "keyreduce prune --model /home/me/models/dense --output=/data/out/cut",
    "keyreduce prune --model '/home/me/my models/dense' --text ~/text.md",
    r"keyreduce prune --model 'C:\Users\me\dense'",
    "keyreduce prune --text file:///home/me/x.md",
    "keyreduce prune --text '/home/me/unbalanced",
]


@pytest.mark.parametrize("command", PATHS)
def test_no_absolute_path_is_told(command):
    inputs = STEP["inputs"] | {"calibration": {"text": {"files": ["/home/me/text.md"]}, "dtype": "float32"}}
    repair = {"inputs": {"mode": "lora"}, "after_step": 1, "tokens": 5, "command": command}
    steps = (STEP | {"inputs": inputs, "command": command},)
    text = card(steps=steps, dense="/home/me/models/dense", repairs=(repair,))
    assert not any(part in text for part in ("/home", "/data", "~", "Users", "file:"))
    assert text.count("- command: `keyreduce prune --") == 2 and '"text.md"' in text
    assert "# dense, pruned" in text and ModelCard(text).data.base_model is None


def test_relative_paths_and_names_stay():
    command = "keyreduce prune --model owner/dense --text docs/a.md --set ratio=1/2 --output ../out/cut"
    assert f"- command: `{command}`" in card(steps=(STEP | {"command": command},))


def test_each_recovery_is_told():
    repairs = (
        {"inputs": {"mode": "least-squares", "repeats": 0.125}, "summary": "refits", "tokens": 2048, "command": "one"},
        {"inputs": {"mode": "lora"}, "tokens": 5, "command": "two"},
    )
    told = card(repairs=repairs).split("## Recovery\n")[1].split("\n## ")[0].strip().splitlines()
    assert told == [
        "- least-squares: refits; 2,048 tokens of text, 12.5% of the rows random tokens that repeat",
        "  - command: `one`",
        "- lora; 5 tokens of text",
        "  - command: `two`",
    ]


def test_figures_that_the_first_step_lacks_are_those_of_the_last():
    new = STEP | {"figures": {"state_bytes_per_sequence": [256, 128], "model_parameters": [30, 20]}}
    text = card(steps=(STEP, new))
    assert "| state per sequence, float32 | 0.00 MiB | 0.00 MiB |" in text
    assert "| model parameters (last step) | 30 | 20 |" in text


def test_a_class_of_ours_is_imported_first():
    assert "import keyreduce.models" in card(shipped_by="keyreduce")
    assert "import keyreduce.models" not in card(shipped_by="fla")
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    record = Record(dense="x", steps=(STEP,), shipped_by="keyreduce")
    assert "trust_remote_code=True" in model_card(record, config)


def test_a_folder_without_a_card(tmp_path):
    assert read_card(tmp_path) == ""


def test_the_card_of_a_model_of_fla_says_with_which_versions_it_generates():
    assert "To generate: transformers 5.6.2 to 5.23, or fla_torch.mend() first" in card(shipped_by="fla")
    for shipped_by in ("transformers", "keyreduce", None):
        assert "To generate" not in card(shipped_by=shipped_by)
