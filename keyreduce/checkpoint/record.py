"""The record of a checkpoint, ``keyreduce.json``: what it was made from and how. Nothing heavy is imported here."""

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from keyreduce import __version__
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json, write_json
from keyreduce.workspace import RECORD_NAME

SCHEMA = 1
_FIRST_AUTO = {"key": "rrqr", "value": "energy", "head": "wanda"}  # what the method auto was in version 0.1
_KINDS = {"steps": "pruned", "repairs": "recovered"}

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What is known of a checkpoint beside its weights; a record is changed by making another one.

    An entry of ``steps``, ``repairs`` and ``converted`` has ``inputs`` (equal inputs give an equal result), figures
    that the command reports and that cannot be had again, and the ``command`` line, if there was one.

    Attributes:
        schema: the version of this form.
        dense: the model that was first pruned, as the user called it: a folder's full path, or a name.
        dense_config: the config that the user named for it.
        dense_identity: the identity of its checkpoint.
        shipped_by: the package that has the model's class: fla, transformers or keyreduce.
        versions: package -> version, of those that made it.
        steps: the pruning steps, oldest first. Each has ``layers``, the plan; ``ran``, target -> the method that chose;
            ``methods``, the summary, citation and options of those; and ``figures``.
        repairs: the recoveries, oldest first, each with ``after_step``, the number of pruning steps before it.
        converted: the conversion that made this checkpoint, if it was one.
        dcp_layout: the layout of the distributed checkpoint that it was converted from or to: flat or nested.
        identity: the identity of this checkpoint.
        checksums: file name -> xxh3_128 of the file, in hex, of all that hold weights; None if nobody took them.
    """

    schema: int = SCHEMA
    dense: str | None = None
    dense_config: str | None = None
    dense_identity: str | None = None
    shipped_by: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Entry, ...] = ()
    repairs: tuple[Entry, ...] = ()
    converted: Entry | None = None
    dcp_layout: str | None = None
    identity: str | None = None
    checksums: Mapping[str, str] | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the record of a checkpoint folder, an empty one where there is none.

        Raises KeyreduceError if it is damaged, or a later version of keyreduce wrote it.
        """
        path = Path(folder) / RECORD_NAME
        if not path.is_file():
            return cls()
        content = read_json(path)
        schema = content.get("schema", SCHEMA)
        if type(schema) is int and schema > SCHEMA:
            raise KeyreduceError(f"{path} is of schema {schema}, which a later keyreduce wrote; update keyreduce")
        for name, verb in _KINDS.items():
            entries = content.get(name, [])
            if not isinstance(entries, list) or not all(_is_entry(one) for one in entries):
                raise KeyreduceError(f"{path} is damaged: it does not say what was {verb}; remove it, or prune again")
        try:
            content = _migrated(content)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise KeyreduceError(
                f"{path} is damaged: its steps are not those of a record; remove it, or prune again"
            ) from None
        values = {one.name: content[one.name] for one in dataclasses.fields(cls) if one.name in content}
        values |= {name: tuple(values[name]) for name in _KINDS if name in values}
        if wrong := [name for name, value in values.items() if not _fits(name, value)]:
            raise KeyreduceError(f"{path} is damaged: its {wrong[0]!r} holds no valid value; remove it, or prune again")
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Write the record into a checkpoint folder. Raises KeyreduceError if it cannot be written."""
        content = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        write_json(folder / RECORD_NAME, {name: value for name, value in content.items() if value}, overwrite=True)

    def with_step(
        self,
        plan: Entry,
        *,
        dense: str,
        dense_config: str | None,
        shipped_by: str,
        figures: Entry,
        command: str | None = None,
    ) -> Self:
        """Return the record of what a pruning step makes of this checkpoint.

        The arguments are the fields of the record and of its entry; ``plan`` is the plan as JSON, with ``inputs``,
        ``layers``, ``ran`` and ``methods``. A checkpoint that was pruned already keeps the name that it has.
        """
        was_named = self.dense is not None
        return self._changed(
            dense=self.dense if was_named else dense,
            dense_config=self.dense_config if was_named else dense_config,
            dense_identity=self.dense_identity if self.steps else plan["inputs"].get("source"),
            shipped_by=shipped_by,
            steps=(*self.steps, dict(plan) | {"figures": figures} | _told(command)),
        )

    def with_recovery(
        self, inputs: Entry, figures: Entry, *, summary: str, shipped_by: str | None, command: str | None = None
    ) -> Self:
        """Return the record of what a recovery makes of this checkpoint.

        ``inputs`` has the ``mode``, and ``summary`` says what that does.
        """
        entry = {"inputs": inputs, "after_step": len(self.steps), "summary": summary, **figures} | _told(command)
        return self._changed(shipped_by=shipped_by or self.shipped_by, repairs=(*self.repairs, entry))

    def with_conversion(self, inputs: Entry, *, layout: str, command: str | None = None) -> Self:
        """Return the record of what a conversion makes of this checkpoint; ``layout`` is that of the DCP."""
        entry = {"inputs": inputs} | _told(command)
        return dataclasses.replace(self._changed(), converted=entry, dcp_layout=layout, versions=self.versions)

    def _changed(self, **changes: Any) -> Self:
        """Return the record of another checkpoint: of this one's files and conversion it says nothing."""
        gone = {"converted": None, "identity": None, "checksums": None}
        versions = {"keyreduce": __version__, "python": platform.python_version(), "torch": version("torch")}
        return dataclasses.replace(self, **{"versions": versions} | gone | changes)


def _migrated(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record's content in the form of today's schema. Version 0.1 wrote neither a schema nor versions."""
    if "schema" in content:
        return content

    def with_versions(entry: Entry, **versions: int) -> Entry:
        return {**entry, "inputs": {**entry["inputs"], "algorithm": 1, **versions}}

    changed: dict[str, Any] = {"schema": SCHEMA}
    if steps := content.get("steps"):
        changed["dense_identity"] = steps[0]["inputs"].get("source")
        changed["steps"] = [
            {**with_versions(step, method_version=1), "figures": _state_bytes(step), "ran": _methods_of(step["inputs"])}
            for step in steps
        ]
    if repairs := content.get("repairs"):
        changed["repairs"] = [with_versions(one) for one in repairs]
    if converted := content.get("converted"):
        changed["converted"] = with_versions({"inputs": converted})
    return {**content, **changed}


def _methods_of(inputs: Entry) -> dict[str, str]:
    """Return target -> the method that chose, of a step of version 0.1."""
    method, targets = str(inputs.get("method")), str(inputs.get("target", "key")).split(",")
    return {target: _FIRST_AUTO.get(target, method) if method == "auto" else method for target in targets}


def _state_bytes(step: Entry) -> dict[str, list[int]]:
    """The bytes of recurrent state that a sequence holds in float32, before and after."""
    sizes = [[layer[when] for layer in step.get("layers", {}).values()] for when in ("before", "after")]
    names = ("value_heads", "head_k_dim", "head_v_dim")
    products = [[layer[names[0]] * layer[names[1]] * layer[names[2]] for layer in layers] for layers in sizes]
    return {"state_bytes_per_sequence": [4 * sum(layers) for layers in products]}


def _told(command: str | None) -> dict[str, str]:
    return {"command": command} if command else {}


def _is_entry(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("inputs"), Mapping)


def _fits(name: str, value: object) -> bool:
    """Whether a field of a record can have a value; the entries were looked at already."""
    if name in _KINDS:
        return True
    if name == "schema":
        return value == SCHEMA
    if name in ("versions", "checksums"):
        return isinstance(value, Mapping) and all(isinstance(one, str) for one in value.values())
    return _is_entry(value) if name == "converted" else isinstance(value, str)
