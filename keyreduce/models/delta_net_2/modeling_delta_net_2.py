"""DeltaNet2 as a model of transformers: fla's DeltaNet model with the mixer of ``mixer_delta_net_2.py`` in it."""

from collections.abc import Callable
from copy import copy
from functools import wraps
from inspect import signature
from typing import ClassVar

from fla.layers.delta_net import DeltaNet
from fla.models.delta_net.modeling_delta_net import DeltaNetBlock
from fla.models.generation_utils import FLAUnsupportedCacheGenerationMixin
from fla.models.modeling_utils import FLAForCausalLM, FLAModel, FLAPreTrainedModel
from fla.modules import RMSNorm
from torch import nn
from transformers import GenerationMixin

from .configuration_delta_net_2 import DeltaNet2Config
from .mixer_delta_net_2 import DeltaNet2

# Fields of the config that are arguments of the mixer.
_OPTIONS = (
    "hidden_size",
    "expand_k",
    "expand_v",
    "num_heads",
    "norm_eps",
    "qk_norm",
    "qk_activation",
    "allow_neg_eigval",
)
_OPTIONS += ("use_gate", "use_beta", "use_short_conv", "conv_size")
_OPTIONS += ("per_head_conv", "share_kv_conv", "shift_only_conv", "conv_scaled_shift")
# Since transformers 5.24, which gives a model its state under this name.
_HAS_CACHE = "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters  # pyright: ignore


def _taking_cache(forward: Callable) -> Callable:
    """Return fla's ``forward``, which knows the state as ``past_key_values`` alone, so that it knows ``cache`` too."""

    @wraps(forward)  # transformers reads the signature
    def call(self, *args, cache=None, **kwargs):
        if cache is not None:
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    return call


class DeltaNet2Block(DeltaNetBlock):
    """fla's block of mixer and MLP; where it would hold a DeltaNet it holds a DeltaNet2 of the layer's own size."""

    def __init__(self, config: DeltaNet2Config, layer_idx: int) -> None:
        # fla's constructor reads one number for all layers.
        config_of_layer = copy(config)
        config_of_layer.expand_k = config.expand_k_of(layer_idx)
        super().__init__(config_of_layer, layer_idx)
        self.config = config
        if isinstance(self.attn, DeltaNet):
            options = {name: getattr(config_of_layer, name) for name in _OPTIONS}
            self.attn = DeltaNet2(mode=config.attn_mode, layer_idx=layer_idx, **options)


class DeltaNet2PreTrainedModel(FLAPreTrainedModel):
    """What transformers wants to know of the classes below."""

    config_class = DeltaNet2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DeltaNet2Block"]
    _supports_cache_class = True


class DeltaNet2Model(DeltaNet2PreTrainedModel, FLAModel):
    """Embeddings, blocks and the last norm.

    Raises ValueError if the config asks for what cannot be, see :class:`DeltaNet2Config`.
    """

    forward = _taking_cache(FLAModel.forward)

    def __init__(self, config: DeltaNet2Config) -> None:
        super().__init__(config)
        config.check()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeltaNet2Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        norm = RMSNorm if config.fuse_norm else nn.RMSNorm
        self.norm = norm(config.hidden_size, eps=config.norm_eps)
        self.use_attnres = config.attnres_block_size is not None
        if self.use_attnres:
            self.res_proj = nn.Linear(config.hidden_size, 1, bias=False)
            self.res_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            setattr(self.res_proj, "_is_attnres_proj", True)  # noqa: B010  (a Module's types know only tensors)
        self.gradient_checkpointing = False
        self.post_init()


class DeltaNet2ForCausalLM(DeltaNet2PreTrainedModel, FLAForCausalLM, FLAUnsupportedCacheGenerationMixin):
    """:class:`DeltaNet2Model` and the projection to logits, tied to the embeddings where the config says so."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.weight"}

    forward = _taking_cache(FLAForCausalLM.forward)
    if _HAS_CACHE:
        prepare_inputs_for_generation = GenerationMixin.prepare_inputs_for_generation  # pyright: ignore

    def __init__(self, config: DeltaNet2Config) -> None:
        super().__init__(config)
        self.model = DeltaNet2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.criterion = None
        self.post_init()
