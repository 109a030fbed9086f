"""The tensors that a checkpoint's mixers have: their names in files and in the model, and their shapes.

It is read from a family's table and a config alone, without the library that ships the model's class.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from keyreduce.errors import KeyreduceError, UnknownArchitecture
from keyreduce.families import family_of
from keyreduce.families.axes import length_of

_LISTED = 10


class MixerTensor(NamedTuple):
    """One tensor of one layer's mixer.

    ``name`` is its name below the mixer in files, as in the family's table, and ``inner`` that in the model, where
    pieces that the model joins have one name; what the model divides has several, and ``rows`` of it belong to each.
    ``shape`` is what the config makes it.
    """

    layer: int
    name: str
    inner: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...]


def expected_tensors(config: Mapping, names: Iterable[str] = ()) -> dict[str, MixerTensor]:
    """Return full name in files -> tensor, of all that the mixers of a config have, in the order of layer and table.

    ``names``, the tensors of the checkpoint, say under which path its mixers are, and which it has of those that no
    config asks for.

    Raises KeyreduceError if the config is of no known family, or does not say the sizes.
    """
    names = set(names)
    family, found = family_of(config, names), {}
    for layer in family.mixer_layers(config):
        lengths = family.axis_sizes(config, layer)
        for name, axes in family.tensors.items():
            full = family.tensor_name(layer, name)
            if full in names if name in family.optional else family.asks_for(config, name):
                shape = tuple(length_of(axis, lengths) for axis in axes)
                apart = family.apart.get(name, {family.inside.get(name, name): axes[0]})
                rows = tuple(length_of(axis, lengths) for axis in apart.values())
                found[full] = MixerTensor(layer, name, tuple(apart), shape, rows)
    return found


def below_mixers(config: Mapping, names: Iterable[str]) -> dict[str, str]:
    """Return full name -> name below the mixer, of those tensors that belong to a mixer, known to the table or not."""
    names = list(names)
    family = family_of(config, names)
    layers = set(family.mixer_layers(config))
    start, end = (re.escape(part) for part in family.mixer.split("{layer}"))
    matches = {name: re.fullmatch(rf"{start}(\d+){end}\.(.+)", name) for name in names}
    return {name: match[2] for name, match in matches.items() if match and int(match[1]) in layers}


def check_mixers(config: Mapping, shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Refuse a checkpoint whose mixers have not the tensors that its config asks for.

    A tensor that the model joins of pieces may be divided otherwise: transformers cuts it into equal ones when it
    saves, and puts them together when it loads.

    ``shapes`` are those of the whole checkpoint, and ``path`` is what to call it.

    Raises:
        UnknownArchitecture: nothing can be said of such a model; the checkpoint may be right.
        KeyreduceError: tensors are missing, left over or of another shape.
    """
    family = family_of(config, shapes)
    refuse_more_layers(config, len(shapes), path)
    expected = expected_tensors(config, shapes)
    reshaped = {}
    for name, tensor in expected.items():
        found, wanted = tuple(shapes.get(name, ())), tensor.shape
        pieces = [family.tensor_name(tensor.layer, piece) for piece in family.joined_with(tensor.name)]
        if len(pieces) > 1 and all(shapes.get(piece) for piece in pieces):
            found = (sum(shapes[piece][0] for piece in pieces), *found[1:])
            wanted = (sum(expected[piece].shape[0] for piece in pieces), *wanted[1:])
        if name in shapes and found != wanted and tuple(shapes[name]) != tensor.shape:
            reshaped[name] = (shapes[name], tensor.shape)
    missing = [name for name in expected if name not in shapes]
    for name in shapes if missing else ():
        if name.endswith(f".{missing[0]}"):
            prefix = name.removesuffix(missing[0])
            raise KeyreduceError(
                f"tensors of {path} have the prefix {prefix!r} in their names, such as {name!r}; rename them without it"
            )
    refuse_faults(
        path,
        missing=missing,
        left_over=[name for name in below_mixers(config, shapes) if name not in expected],
        reshaped=reshaped,
        # Of what quantisers put in the place of a weight the table says nothing.
        error=UnknownArchitecture if "quantization_config" in config else KeyreduceError,
    )


def refuse_faults(
    path: Path,
    *,
    missing: Sequence[str],
    left_over: Sequence[str],
    reshaped: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    error: type[KeyreduceError] = KeyreduceError,
) -> None:
    """Raise ``error`` if there is any fault in a checkpoint, naming ten tensors of each kind.

    ``reshaped`` is name -> the shape that the tensor has, and the one that it should have.
    """
    shapes = [f"{name} {list(found)} for {list(wanted)}" for name, (found, wanted) in reshaped.items()]
    faults = {"missing": missing, "left over": left_over, "of another shape": shapes}
    told = [
        f"{what}: {', '.join(names[:_LISTED])}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for what, names in faults.items()
        if names
    ]
    if told:
        raise error(f"the tensors of {path} are not those that its config.json asks for; {'; '.join(told)}")


def refuse_more_layers(config: Mapping, count: int, path: Path) -> None:
    """Refuse a config of more layers than there are tensors: each has one at least, and a billion take for ever."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            refuse_more_layers(value, count, path)
        elif "layer" in str(name) and isinstance(value, int | float) and value > max(count, 1):
            raise KeyreduceError(f"{path}: config.json says {name} {value:g}, but there are only {count} tensors")
