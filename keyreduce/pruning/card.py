"""The model card of a pruned checkpoint: what was removed, how, and how to load what is left."""

import json
import re
from collections.abc import Mapping

from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.pruning.methods import method_named
from keyreduce.pruning.savings import Savings
from keyreduce.workspace import RECORD_NAME

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LABELS = {
    "key_heads": "key heads",
    "value_heads": "value heads",
    "head_k_dim": "key channels a head",
    "head_v_dim": "value channels a head",
}


def model_card(config: Mapping, record: Mapping, saved: Savings) -> str:
    """Return the text of the card, in the hub's form.

    Args:
        config: the pruned checkpoint's config.
        record: its record, with ``dense``, ``versions`` and ``steps``.
        saved: what the last step saved.

    Raises:
        KeyreduceError: the record of an earlier step, which came with the source, is damaged.
    """
    try:
        return _card(config, record, saved)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise KeyreduceError(
            f"the source's {RECORD_NAME} is damaged: it does not say what earlier steps removed; remove it"
        ) from error


def _card(config: Mapping, record: Mapping, saved: Savings) -> str:
    dense = str(record["dense"])
    name = re.split(r"[\\/]", dense.rstrip("\\/"))[-1]
    front = {
        "library_name": "transformers",
        "tags": ["keyreduce", "pruned", "linear-attention", str(config.get("model_type"))],
        **({"base_model": dense} if _HUB_NAME.fullmatch(dense) else {}),
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML, and quotes what needs it
        "---",
        "",
        f"# {_plain(name)}, pruned",
        "",
        f"Made from {_code(dense)} with keyreduce {_plain(record['versions']['keyreduce'])}, in "
        f"{len(record['steps'])} step{'s' if len(record['steps']) > 1 else ''}.",
        "",
        "## What was removed",
        "",
        "| | before | after |",
        "|---|---|---|",
        *_rows(record["steps"], saved),
        "",
        "## How",
        "",
        *(_describe(step) for step in record["steps"]),
        "",
        "The channels that stayed, layer by layer and head by head, are in `keyreduce.json`.",
        "",
        "## How to load it",
        "",
        *_loading(config),
        "",
        "`keyreduce verify` reads every value and checks it against the record; `keyreduce eval` and "
        "`keyreduce benchmark` compare it with the dense model.",
        "",
    ]
    return "\n".join(lines)


def _rows(steps: list, saved: Savings) -> list[str]:
    first, last = steps[0]["layers"], steps[-1]["layers"]
    rows = []
    for size, label in _LABELS.items():
        before, after = (
            _range(layer[when][size] for layer in layers.values())
            for layers, when in ((first, "before"), (last, "after"))
        )
        rows.append(f"| {label} | {before} | {after} |")
    state = [f"{size / 2**20:,.2f} MiB" for size in saved.state_bytes_per_sequence]
    last_step = " (last step)" if len(steps) > 1 else ""
    for label, (before, after) in (
        ("state per sequence, float32", state),
        ("mixer parameters", [f"{count:,}" for count in saved.mixer_parameters]),
        ("model parameters", [f"{count:,}" for count in saved.model_parameters]),
    ):
        rows.append(f"| {label}{last_step} | {before} | {after} |")
    return rows


def _range(values) -> str:
    sizes = sorted(set(values))
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _describe(step: Mapping) -> str:
    inputs = step["inputs"]
    name = str(inputs.get("method"))
    try:
        method = method_named(name)
        what = f"{name} ({method.summary}; {method.citation})"
    except KeyreduceError:
        what = name  # of another package, or of a later version
    told = [f"- method: {_plain(what)}"]
    known = [key for key in ("target", "ratio", "keep", "seed") if key in inputs]
    told += [f"- {key}: {_code(json.dumps(inputs[key]))}" for key in known]
    calibration = inputs.get("calibration")
    if isinstance(calibration, Mapping):
        told.append(f"- calibration: {_code(json.dumps(calibration))}")
    if "command" in step:
        told.append(f"- command: {_code(step['command'])}")
    return "\n".join(told)


def _loading(config: Mapping) -> list[str]:
    # Classes that fla ships need no code of the folder's, which may be anybody's; nor does code of another repository.
    ours = family_of(config).shipped_by == "keyreduce"
    code = config.get("auto_map", {}).get("AutoModelForCausalLM", "--")
    custom = ours and isinstance(code, str) and "--" not in code
    return [
        "```python",
        "# on a machine without a GPU, first: import fla_torch; fla_torch.enable()",
        "import fla  # registers the model's classes with transformers",
        *(["import keyreduce.models  # knows this architecture"] if ours and not custom else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file is',
        f"model = AutoModelForCausalLM.from_pretrained(folder{', trust_remote_code=True' if custom else ''})",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
    ]


def _plain(text: object) -> str:
    """A record's words in one line, without what Markdown and HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", _line(text))


def _code(text: object) -> str:
    return "`" + _line(text).replace("`", "'") + "`"


def _line(text: object) -> str:
    """One line of what can be shown: no surrogates, which no file holds, no control or direction characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))
