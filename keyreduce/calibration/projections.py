"""The four projections of a mixer that calibration looks into, found through the family's table by what they map."""

from keyreduce.families import Family, Part

PROJECTIONS = {
    "query": (Part.QUERY, Part.HIDDEN),
    "key": (Part.KEY, Part.HIDDEN),
    "value": (Part.VALUE, Part.HIDDEN),
    "output": (Part.HIDDEN, Part.VALUE),
}
"""Word -> what the axes of the weight hold: the channels are rows, but of the output projection columns."""


def projection_name(family: Family, layer: int, word: str) -> str:
    """Return the full name of a projection's weight in the model."""
    (name,) = [name for name, parts in family.tensors.items() if parts == PROJECTIONS[word]]
    return family.tensor_name(layer, name)
