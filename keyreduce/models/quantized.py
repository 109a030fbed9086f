"""Quantised checkpoints: recognised from their headers, and refused where it is the mixers that are quantised."""

from keyreduce.checkpoint.shards import COMPANION, PLAIN
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.families.mixer_tensors import below_mixers


def refuse_quantized(source: Checkpoint) -> None:
    """Refuse a checkpoint whose mixers are quantised; where other parts are, a cut leaves them as they are.

    Scales belong to blocks of channels, 128 x 128 or 1 x 128 in most formats, and packed numbers lie eight in a word:
    channels that stay are of many blocks, so that no scale of a cut tensor would be right.

    Raises:
        KeyreduceError: names the first such tensor.
    """
    known, settings = family_of(source.config).tensors, source.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    told = f" ({method})" if isinstance(method, str) else ""
    for name, short in below_mixers(source.config, source.tensors).items():
        dtype = source.tensors[name].dtype
        if dtype not in PLAIN or (short not in known and COMPANION.search(short)):
            raise KeyreduceError(
                f"{source.path} is quantised{told}: tensor {name!r} ({dtype}) holds numbers or "
                "scales of blocks of channels, which a cut would divide; prune the unquantised checkpoint, and then "
                "quantise the result"
            )
