"""The softmax attention layers of hybrid models: what they keep of each token, read from a config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from keyreduce.errors import KeyreduceError
from keyreduce.families.fields import Field, Ratio
from keyreduce.families.table import Family


class SoftmaxLayer(NamedTuple):
    """What one layer of softmax attention keeps of each token.

    ``heads`` key/value heads keep a key and a value of ``head_dim`` numbers each. A layer of latent attention (MLA,
    arXiv:2405.04434) keeps one vector of ``head_dim`` numbers instead, for all heads. With a ``window`` only so many
    tokens are kept.
    """

    heads: int
    head_dim: int
    is_latent: bool = False
    window: int | None = None

    @property
    def numbers_per_token(self) -> int:
        """How many numbers the layer keeps of one token."""
        return self.head_dim if self.is_latent else 2 * self.heads * self.head_dim

    def numbers(self, tokens: int) -> int:
        """Return how many numbers the layer keeps of a sequence."""
        return self.numbers_per_token * min(tokens, self.window or tokens)


@dataclass(frozen=True)
class _Fields:
    """Where a config of transformers says the sizes of softmax attention."""

    heads: Field
    head_dim: Field | Ratio
    latent: tuple[Field, ...] = ()  # of latent attention: the sizes that add up to its vector


def _grouped(heads: int, head_dim: int = 256) -> _Fields:
    return _Fields(Field("num_key_value_heads", heads), Field("head_dim", head_dim))


def _latent(*sizes: Field) -> _Fields:
    return _Fields(Field("num_key_value_heads", 32), Field("head_dim", 64), latent=sizes)


_ATTENTION_HEADS = Field("num_attention_heads", 30)
_OLMO = _Fields(
    Field("num_key_value_heads", _ATTENTION_HEADS), Ratio("", 1, of=Field("hidden_size", 3840), over=_ATTENTION_HEADS)
)
_RANK, _ROPE = Field("kv_lora_rank", 512), Field("qk_rope_head_dim", 64)
_OF_TRANSFORMERS = {
    "bailing_hybrid": _latent(_RANK, _ROPE),
    "glm5_next_text": _latent(_RANK),
    "kimi_linear": _latent(_RANK, _ROPE),
    "lara_mini": _grouped(4, 128),
    "olmo_hybrid": _OLMO,
    "qwen3_5_moe_text": _grouped(2),
    "qwen3_5_text": _grouped(4),
    "qwen3_next": _grouped(2),
    "qwen4_exp_text": _grouped(2),
}
"""Model type of the language model -> where its config says the sizes, and what holds where it does not: the defaults
of transformers. The keys by which layers of indexed attention choose tokens are left out."""
_OF_LARGER = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "qwen4_exp": "qwen4_exp_text"}
_OF_LARGER |= {"glm5_next": "glm5_next_text"}
_OF_LARGER |= dict.fromkeys(("jev", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), "qwen3_5_text")


def softmax_layers(family: Family, config: Mapping) -> dict[int, SoftmaxLayer]:
    """Return layer number -> what it keeps, of the layers that are not a mixer of the family.

    Raises KeyreduceError if the config does not say the sizes.
    """
    language = family.language(config)
    mixers = set(family.mixer_layers(config))
    others = [layer for layer in range(family.depth(config)) if layer not in mixers]
    named = str(language.get("model_type") or family.model_type)
    fields = _OF_TRANSFORMERS.get(_OF_LARGER.get(named, named))
    if fields is None:
        return {layer: _of_fla(family, config, layer) for layer in others}
    if fields.latent:
        found = SoftmaxLayer(1, sum(round(size.read(language)) for size in fields.latent), is_latent=True)
    else:
        found = SoftmaxLayer(round(fields.heads.read(language)), round(fields.head_dim.read(language)))
    kinds, window = language.get("layer_types") or (), language.get("sliding_window")
    sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention" and isinstance(window, int)}
    return {layer: found._replace(window=window) if layer in sliding else found for layer in others}


def attention_heads(family: Family, config: Mapping) -> int:
    """Return what a config gives as ``num_attention_heads``: by name the query heads of its softmax layers.

    Where it does not say that, these are as many as the key heads of its mixers.
    """
    return round(Field("num_attention_heads", family.key_heads).read(family.language(config)))


def _of_fla(family: Family, config: Mapping, layer: int) -> SoftmaxLayer:
    """What the object of a config's ``attn`` says that lists the layer."""
    found = family.language(config)["attn"]
    specs = [found] if isinstance(found, Mapping) else found
    spec = next(one for one in specs if layer in one["layers"])
    heads = _count(spec, "num_heads")
    kept = heads if spec.get("num_kv_heads") is None else _count(spec, "num_kv_heads")
    window = None if spec.get("window_size") is None else _count(spec, "window_size")
    return SoftmaxLayer(kept, family.width(config) // heads, window=window)


def _count(spec: Mapping, name: str) -> int:
    value = spec.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise KeyreduceError(f"config.json: attn has {name} {value!r}, where a positive whole number belongs")
    return value
