"""The architectures that keyreduce knows, one table each."""

from collections.abc import Mapping

from keyreduce.errors import KeyreduceError
from keyreduce.families.delta_net import DELTA_NET
from keyreduce.families.delta_net_2 import DELTA_NET_2
from keyreduce.families.gated_deltanet import GATED_DELTANET
from keyreduce.families.table import Family, MixerSizes, Part

FAMILIES = {family.model_type: family for family in (DELTA_NET, DELTA_NET_2, GATED_DELTANET)}

__all__ = ["FAMILIES", "Family", "MixerSizes", "Part", "family_of"]


def family_of(config: Mapping) -> Family:
    """Return the table of the model that ``config`` (config.json as a mapping) describes.

    Raises:
        KeyreduceError: it is not one of :data:`FAMILIES`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise KeyreduceError(
            f"model_type {model_type!r} is not of the DeltaNet family; keyreduce knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
