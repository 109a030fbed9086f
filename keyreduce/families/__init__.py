"""The architectures that keyreduce knows, one table each."""

from collections.abc import Iterable, Mapping

from keyreduce.errors import UnknownArchitecture
from keyreduce.families.axes import Axis, Joined, Part
from keyreduce.families.delta_net import DELTA_NET
from keyreduce.families.delta_net_2 import DELTA_NET_2
from keyreduce.families.gated_deltanet import GATED_DELTANET
from keyreduce.families.kda import BAILING_HYBRID, GLM5_NEXT_TEXT, KDA, KIMI_LINEAR
from keyreduce.families.olmo_hybrid import OLMO_HYBRID
from keyreduce.families.preconditioned import PRECOND_GATED_DELTANET, PRECOND_KDA
from keyreduce.families.qwen3_next import LARA_MINI, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT, QWEN3_NEXT, QWEN4_EXP_TEXT
from keyreduce.families.table import Family, MixerSizes

_OF_FLA = (DELTA_NET, DELTA_NET_2, GATED_DELTANET, KDA, PRECOND_GATED_DELTANET, PRECOND_KDA)
_OF_TRANSFORMERS = (
    BAILING_HYBRID,
    GLM5_NEXT_TEXT,
    KIMI_LINEAR,
    LARA_MINI,
    OLMO_HYBRID,
    QWEN3_5_MOE_TEXT,
    QWEN3_5_TEXT,
    QWEN3_NEXT,
    QWEN4_EXP_TEXT,
)
LANGUAGE_MODELS = {family.model_type: family for family in (*_OF_FLA, *_OF_TRANSFORMERS)}
WRAPPERS = {
    "glm5_next": GLM5_NEXT_TEXT,
    "jev": QWEN3_5_TEXT,
    "minicpm_ocr": QWEN3_5_TEXT,
    "minicpmv4_6": QWEN3_5_TEXT,
    "minicpmv4_7": QWEN3_5_TEXT,
    "qwen3_5": QWEN3_5_TEXT,
    "qwen3_5_moe": QWEN3_5_MOE_TEXT,
    "qwen4_exp": QWEN4_EXP_TEXT,
}
"""Larger models, of whose config ``text_config`` is that of a language model -> which it is if it does not say it.

Others are known by what their ``text_config`` says.
"""
FAMILIES = LANGUAGE_MODELS | {model_type: family.within(model_type) for model_type, family in WRAPPERS.items()}

_ENGINES_ALONE = "neither transformers nor fla has a class of it with which a cut could be checked"
REFUSED = {
    "comba": "its operator takes a third vector of the key's size, which calibration does not watch and no backend of "
    "ours computes on a CPU",
    "deltaformer": "it has no recurrent state: its attention applies the delta rule to the values of all tokens, and "
    "keeps the keys and values of each",
    "gated_deltaproduct": "it writes several keys for each token, which calibration would take for tokens",
    "gigachat3_5": "its state is that of Gated DeltaNet, but a config chooses among four output norms, one of them "
    f"without a weight to fold, and {_ENGINES_ALONE}",
    "intern_s2_preview": f"its state is that of Qwen3.5, but {_ENGINES_ALONE}",
    "jet_nemotron": "its state is that of Gated DeltaNet, but the convolution of its values has kernels that another "
    f"network makes for each token, and {_ENGINES_ALONE}",
    "kimi_k3": f"its state is that of Kimi Delta Attention, but {_ENGINES_ALONE}",
    "mamba2": "it has no delta rule: its state has no keys to normalise, and no table here says what is dropped",
    "mesa_net": "it has two states, of keys with keys and of keys with values, and solves a linear system in the "
    "first at each token; no method here weighs what a key channel does there, and no backend of ours does it on a CPU",
    "mom": "it has several states in each head, among which a router divides the tokens; calibration would add those "
    "of all of them up",
    "path_attn": "it has no recurrent state: it is softmax attention, whose positions are products of Householder "
    "matrices, and keeps the keys and values of all tokens",
    "rwkv7": "its state is erased along a vector of its own, which is not the key that is written; calibration does "
    "not watch it, and no backend of ours computes it on a CPU",
    "yoco": "its first layers may have states of Gated DeltaNet, but its config says their sizes in a section of which "
    "no table here tells, and whether they are of that kind at all",
}
"""Model types of the same kin -> why they are refused."""

__all__ = [
    "FAMILIES", "LANGUAGE_MODELS", "REFUSED", "WRAPPERS", "Axis", "Family", "Joined", "MixerSizes", "Part", "family_of",
]  # fmt: skip


def family_of(config: Mapping, names: Iterable[str] = ()) -> Family:
    """Return the table of the model that ``config`` (config.json as a mapping) describes.

    ``names`` are the tensors of its checkpoint, or of the model; the family's path of the mixer is that of the model
    without them.

    Raises UnknownArchitecture if it is not one of :data:`FAMILIES`, and its ``text_config`` is not of one either.
    """
    return _family_of(config).located(names)


def _family_of(config: Mapping) -> Family:
    model_type, text = config.get("model_type"), config.get("text_config")
    named = model_type if isinstance(model_type, str) else None
    if named in REFUSED:
        raise UnknownArchitecture(f"model_type {named!r} cannot be pruned yet: {REFUSED[named]}")
    if named in LANGUAGE_MODELS:
        return LANGUAGE_MODELS[named]
    if named is not None and isinstance(text, Mapping) and text.get("model_type") is not None:
        try:
            return _family_of(text).within(named)
        except UnknownArchitecture as error:
            raise UnknownArchitecture(f"text_config of model_type {named!r}: {error}") from None
    if named in WRAPPERS:
        return FAMILIES[named]
    raise UnknownArchitecture(
        f"model_type {model_type!r} is none of the delta-rule models that keyreduce knows: "
        f"{', '.join(sorted(FAMILIES))}"
    )
