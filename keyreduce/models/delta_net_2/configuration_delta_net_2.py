"""The config of DeltaNet2: fla's DeltaNet config, shared convolution kernels, and a key size for each layer."""

import math

from fla.models.delta_net import DeltaNetConfig

_CHOICES = {
    "attn_mode": ("chunk", "fused_recurrent"),
    "qk_activation": ("silu", "relu", "elu", "identity"),
    "qk_norm": ("l2", "sum"),
}
_FLAGS = ("per_head_conv", "share_kv_conv", "shift_only_conv", "conv_scaled_shift")


class DeltaNet2Config(DeltaNetConfig):
    """Configuration of :class:`DeltaNet2Model`.

    All fields of fla's ``DeltaNetConfig`` mean what they mean there, and these come on top. The options of the
    convolution hold where ``use_short_conv`` is true. Their formulas are those of ``SharedShortConvolution``.

    Args:
        expand_k: ``num_heads * head_k_dim / hidden_size``, as one number for all layers or as a list with one for
            each. In a list a layer of softmax attention (``attn``) has an entry too, as valid as the others, which no
            mixer uses.
        per_head_conv: each head has a convolution kernel of its own; otherwise all heads share one. Either way q, k
            and v have one each.
        share_kv_conv: k and v have the same convolution, stored once as ``kv_conv1d``.
        shift_only_conv: in place of a learned kernel, ``y_t = x_{t-1}``; ``conv_size`` is not read.
        conv_scaled_shift: with ``shift_only_conv``, ``y_t = x_t + s x_{t-1}``, where s is learned, one for each
            kernel there would be.

    Raises ValueError if a value is none of those allowed, or the sizes are no whole numbers or do not divide by heads.
    """

    model_type = "delta_net_2"

    def __init__(
        self,
        expand_k: float | list[float] = 1.0,
        per_head_conv: bool = False,
        share_kv_conv: bool = False,
        shift_only_conv: bool = False,
        conv_scaled_shift: bool = False,
        **kwargs,
    ) -> None:
        self.per_head_conv = per_head_conv
        self.share_kv_conv = share_kv_conv
        self.shift_only_conv = shift_only_conv
        self.conv_scaled_shift = conv_scaled_shift
        super().__init__(expand_k=expand_k, **kwargs)  # pyright: ignore[reportArgumentType]  (a list is new)
        self.check()

    def expand_k_of(self, layer_idx: int) -> float:
        """Return what ``expand_k`` says of one layer."""
        return self.expand_k[layer_idx] if isinstance(self.expand_k, list | tuple) else self.expand_k

    def check(self) -> None:
        """Look at all values that the mixers rest on; fields may have changed since the config was made.

        Raises ValueError if one of them cannot be.
        """
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, where one of {', '.join(choices)} belongs")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, where true or false belongs")
        if self.conv_scaled_shift and not self.shift_only_conv:
            raise ValueError("conv_scaled_shift is the scale of a shift: set shift_only_conv too")
        for name in ("hidden_size", "num_heads", "num_hidden_layers", "conv_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, where a positive whole number belongs")
        ratios_k = self.expand_k if isinstance(self.expand_k, list | tuple) else [self.expand_k]
        if ratios_k is self.expand_k and len(ratios_k) != self.num_hidden_layers:
            raise ValueError(
                f"expand_k lists {len(ratios_k)} layers and num_hidden_layers is {self.num_hidden_layers}: "
                "give one number, or one for each layer"
            )
        for name, ratio in [("expand_k", ratio) for ratio in ratios_k] + [("expand_v", self.expand_v)]:
            self._check_ratio(name, ratio)

    def _check_ratio(self, name: str, ratio: float) -> None:
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not math.isfinite(ratio) or ratio <= 0:
            raise ValueError(f"{name} is {ratio!r}, where a positive number belongs")
        channels = self.hidden_size * ratio
        if not math.isclose(channels, round(channels)) or round(channels) % self.num_heads:
            raise ValueError(
                f"{name} {ratio!r} makes {channels:g} channels of hidden_size {self.hidden_size}, "
                f"which num_heads {self.num_heads} does not divide into whole channels"
            )
