"""The model card of a pruned checkpoint, made from its record: what was removed, how, and how to load what is left."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keyreduce.checkpoint.record import Entry, Record
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.versions import generation_note
from keyreduce.workspace import RECORD_NAME

CARD_NAME = "README.md"

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_KEPT_HEADING = re.compile(r"licen[cs]|\busages?\b|\buses?\b|\busing\b|\bterms\b", re.IGNORECASE)
# An absolute path, alone or within a text; not the slash of owner/name, of a relative path or of a web address.
_PATH = re.compile(r"(?<![\w:/.~-])(?:file://|~|[A-Za-z]:)?[\\/][^\s,;'\"]*[^\s,;'\"\\/][\\/]*")
_MARK = "<!-- What follows is from the card of the model that this one was made from. -->"
_LABELS = {"key_heads": "key heads", "value_heads": "value heads"}
_LABELS |= {"head_k_dim": "key channels a head", "head_v_dim": "value channels a head"}
_FIGURES = {
    "state_bytes_per_sequence": ("state per sequence, float32", lambda size: f"{size / 2**20:,.2f} MiB"),
    "mixer_parameters": ("mixer parameters", "{:,}".format),
    "model_parameters": ("model parameters", "{:,}".format),
}


def model_card(record: Record, config: Mapping[str, Any], source_card: str = "") -> str:
    """Return the text of the card of a pruned checkpoint, in the hub's form. No absolute path of the record is in it.

    Of ``source_card``, the card of what it was made from, the licence in the front matter is kept, and the sections
    about licence and use.

    Raises KeyreduceError if the record is damaged: it does not say what was removed.
    """
    from huggingface_hub import ModelCardData

    try:
        body = _body(record, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise KeyreduceError(
            f"the source's {RECORD_NAME} is damaged: it does not say what earlier steps removed; remove it, or prune "
            "the dense model"
        ) from error
    front, text = _split(source_card)
    named = {name: front[name] for name in ("license", "license_name", "license_link", "language") if name in front}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["keyreduce", "pruned", "linear-attention", _line(config.get("model_type"))],
        base_model=record.dense if _HUB_NAME.fullmatch(record.dense or "") else None,
        **named,
    )
    parts = [f"---\n{data.to_yaml()}\n---\n", *body, _MARK, *_kept_sections(text)]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part.strip())


def read_card(folder: Path) -> str:
    """Return the text of a checkpoint folder's card; empty where there is none."""
    try:
        return (folder / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def write_record(written: Checkpoint, record: Record, checksums: Mapping[str, str], source_card: str) -> None:
    """Write the record and the card of a checkpoint into its folder.

    Args:
        written: the checkpoint, without them.
        record: what is known of it but for its files.
        checksums: file name -> xxh3_128 of those.
        source_card: the card of what it was made from. Of a conversion, which is the same model, it is the card.

    Raises KeyreduceError if the record is damaged, or they cannot be written.
    """
    record = dataclasses.replace(record, identity=written.identity, checksums=checksums)
    record.write(written.path)
    is_pruned = bool(record.steps) and record.converted is None
    card = model_card(record, written.config, source_card) if is_pruned else source_card
    if card:
        try:
            (written.path / CARD_NAME).write_text(card, encoding="utf-8", errors="replace")
        except OSError as error:
            raise KeyreduceError(f"cannot write to {written.path}: {error.strerror}") from error


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Return a card's front matter and the text after it; a front matter that is damaged is left out."""
    if not card.strip():
        return {}, ""
    from huggingface_hub import ModelCard

    try:
        read = ModelCard(card, ignore_metadata_errors=True)
    except Exception:  # it is anybody's YAML, and the parser lets through whatever is raised on the way
        return {}, card
    return read.data.to_dict(), read.text


def _body(record: Record, config: Mapping[str, Any]) -> list[str]:
    dense = _without_paths(record.dense or "a model that has no name")
    name, number = _last_part(dense), len(record.steps)
    recovery = ["## Recovery", "\n".join(line for one in record.repairs for line in _recovery(one))]
    version = _plain(record.versions.get("keyreduce", ""))
    return [
        f"# {_plain(name)}, pruned",
        f"Made from {_code(dense)} with keyreduce {version}, in {number} step{'s' if number > 1 else ''}.",
        "## What was removed",
        "\n".join(["| | before | after |", "|---|---|---|", *_rows(record.steps)]),
        "## How",
        *("\n".join(_step(step)) for step in record.steps),
        "The channels that stayed, layer by layer and head by head, are in `keyreduce.json`.",
        *(recovery if record.repairs else ()),
        "## How to load it",
        "\n".join(_loading(config, record.shipped_by)),
        *([f"{note[0].upper()}{note[1:]}."] if (note := generation_note(record.shipped_by)) else ()),
        "`keyreduce verify` reads every value and checks it against the record; `keyreduce eval` and "
        "`keyreduce benchmark` compare it with the dense model.",
    ]


def _rows(steps: tuple[Entry, ...]) -> Iterator[str]:
    for size, label in _LABELS.items():
        before = _range({layer["before"][size] for layer in steps[0]["layers"].values()})
        after = _range({layer["after"][size] for layer in steps[-1]["layers"].values()})
        yield f"| {label} | {before} | {after} |"
    for name, (label, form) in _FIGURES.items():
        if name not in steps[-1]["figures"]:
            continue  # a record of version 0.1 has the state alone
        first = steps[0] if name in steps[0]["figures"] else steps[-1]
        rest = "" if first is steps[0] else " (last step)"
        yield f"| {label}{rest} | {form(first['figures'][name][0])} | {form(steps[-1]['figures'][name][1])} |"


def _range(sizes: set[int]) -> str:
    return f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"


def _step(step: Entry) -> Iterator[str]:
    inputs, methods = step["inputs"], step.get("methods", {})
    targets: dict[str, list[str]] = {}
    for target, name in step["ran"].items():
        targets.setdefault(name, []).append(target)
    for name, of in targets.items():
        told = f" ({methods[name]['summary']}; {methods[name]['citation']})" if name in methods else ""
        words = " and ".join(filter(None, [", ".join(of[:-1]), of[-1]]))
        yield f"- method{'' if len(targets) == 1 else f' for {_plain(words)}'}: {_plain(name + told)}"
    for key in ("target", "ratio", "keep", "seed", "calibration"):
        if key in inputs:
            yield f"- {key}: {_code(json.dumps(_without_paths(inputs[key])))}"
    yield from _command(step)


def _recovery(entry: Entry) -> Iterator[str]:
    inputs = entry["inputs"]
    summary = f": {entry['summary']}" if "summary" in entry else ""
    share = inputs.get("repeats")
    rest = f", {share:.1%} of the rows random tokens that repeat" if share else ""
    yield f"- {_plain(inputs['mode'] + summary)}; {entry['tokens']:,} tokens of text{rest}"
    yield from (f"  {line}" for line in _command(entry))


def _command(entry: Entry) -> Iterator[str]:
    if "command" in entry:
        try:
            words = shlex.join(_without_paths(shlex.split(entry["command"])))
        except ValueError:
            words = _without_paths(entry["command"])  # no line of a shell
        yield f"- command: {_code(words)}"


def _loading(config: Mapping[str, Any], shipped_by: str | None) -> list[str]:
    # Classes that fla ships need no code of the folder's, which may be anybody's; nor does code of another repository.
    ours = shipped_by == "keyreduce"
    code = config.get("auto_map", {}).get("AutoModelForCausalLM", "--")
    custom = ours and isinstance(code, str) and "--" not in code
    return [
        "```python",
        "# on a machine without a GPU, first: import fla_torch; fla_torch.enable()",
        "import fla  # registers the model's classes with transformers",
        *(["import keyreduce.models.delta_net_2  # registers this architecture"] if ours and not custom else []),
        f"from transformers import {_class_name(config)}, AutoTokenizer",
        "",
        'folder = "."  # where this file is',
        f"model = {_class_name(config)}.from_pretrained(folder{', trust_remote_code=True' if custom else ''})",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
    ]


def _class_name(config: Mapping[str, Any]) -> str:
    """The class that loads a model: of a larger one than a language model not one auto class is the right one."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    is_larger = isinstance(config.get("text_config"), Mapping)
    return name if is_larger and isinstance(name, str) and name.isidentifier() else "AutoModelForCausalLM"


def _kept_sections(card: str) -> Iterator[str]:
    """Yield the sections of a card that tell of licence and use, as they are, each up to the next heading as high."""
    _, marked, kept = card.partition(_MARK)
    if marked:
        yield kept  # this is a card of ours, where they are together already
        return
    level, lines, is_code = 0, [], False
    for line in card.splitlines():
        is_code ^= bool(_FENCE.match(line))
        heading = None if is_code else _HEADING.fullmatch(line)
        if heading and level and len(heading[1]) <= level:
            yield "\n".join(lines)
            level, lines = 0, []
        if heading and not level and _KEPT_HEADING.search(heading[2]):
            level = len(heading[1])
        if level:
            lines.append(line)
    if lines:
        yield "\n".join(lines)


def _without_paths(value: Any) -> Any:
    """Return JSON with absolute paths shortened to their last part."""
    if isinstance(value, Mapping):
        return {_without_paths(key): _without_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(one) for one in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(?:file://|~|[A-Za-z]:)?[\\/]", value):
        return _last_part(value)  # all of it is one path, whatever characters it has
    return _PATH.sub(lambda found: _last_part(found[0]), value)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _plain(text: object) -> str:
    """A record's words in one line, without what Markdown and HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", _line(text))


def _code(text: object) -> str:
    return "`" + _line(text).replace("`", "'") + "`"


def _line(text: object) -> str:
    """One line of what can be shown: no surrogates, which no file holds, no control or direction characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))
