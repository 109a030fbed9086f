"""The architectures that keyreduce knows, one table each."""

from collections.abc import Iterable, Mapping

from keyreduce.errors import UnknownArchitecture
from keyreduce.families.axes import Axis, Joined, Part
from keyreduce.families.delta_net import DELTA_NET
from keyreduce.families.delta_net_2 import DELTA_NET_2
from keyreduce.families.gated_deltanet import GATED_DELTANET
from keyreduce.families.kda import KDA, KIMI_LINEAR
from keyreduce.families.olmo_hybrid import OLMO_HYBRID
from keyreduce.families.qwen3_next import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT, QWEN3_NEXT
from keyreduce.families.table import Family, MixerSizes

_OF_FLA = (DELTA_NET, DELTA_NET_2, GATED_DELTANET, KDA)
_OF_TRANSFORMERS = (KIMI_LINEAR, OLMO_HYBRID, QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT, QWEN3_NEXT)
FAMILIES = {family.model_type: family for family in (*_OF_FLA, *_OF_TRANSFORMERS)}

REFUSED = {
    "comba": "its operator takes a third vector of the key's size, which calibration does not watch and no backend of "
    "ours computes on a CPU",
    "gated_deltaproduct": "it writes several keys for each token, which calibration would take for tokens",
    "mamba2": "it has no delta rule: its state has no keys to normalise, and no table here says what is dropped",
}
"""Model types of the same kin -> why they are refused."""

__all__ = ["FAMILIES", "REFUSED", "Axis", "Family", "Joined", "MixerSizes", "Part", "family_of"]


def family_of(config: Mapping, names: Iterable[str] = ()) -> Family:
    """Return the table of the model that ``config`` (config.json as a mapping) describes.

    ``names`` are the tensors of its checkpoint; the family's path of the mixer is that of the model without them.

    Raises UnknownArchitecture if it is not one of :data:`FAMILIES`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if isinstance(model_type, str) and model_type in REFUSED:
            raise UnknownArchitecture(f"model_type {model_type!r} cannot be pruned yet: {REFUSED[model_type]}")
        raise UnknownArchitecture(
            f"model_type {model_type!r} is not of the DeltaNet family; keyreduce knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type].located(names)
