"""The operations and bytes of a call, by formula: PyTorch's own counter does not see custom kernels.

A multiplication and an addition count as two operations. Per token, a linear layer takes 2 for each of its weights.
The delta rule takes, per token and value head, with a state of K x V:
one token at a time 6KV: reading the state with the key, updating it, reading it with the query;
in chunks of C = 64 tokens 6KV + 6CK + 4CV: the same with the chunk's state, and the products within the chunk
(k k^T, its inverse applied to k and to v, q k^T, and that applied to the values), triangles counted as squares.
Short convolutions, norms, activations, the scores of softmax layers, and the experts of a mixture are left out.

Bytes are the least that must be moved: weights once (all experts), input and output once, and each state of a cache
read and written once. Activations between kernels are not counted, so a prefill stays far below the roofline of bytes.

Shapes: V vocabulary, D hidden.
"""

from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from keyreduce.benchmarking.timed_models import TimedModel
from keyreduce.families.table import MixerSizes

_CHUNK = 64


class Work(NamedTuple):
    """Floating-point operations and bytes of one call."""

    flops: float
    bytes: float


def mixer_work(timed: TimedModel, *, batch_size: int, seq_len: int, cached: bool = False) -> Work:
    """Return the work of the mixer layer on ``[batch_size, seq_len]`` tokens.

    Where it is ``cached``, its state is read before and written after.
    """
    tokens, item = batch_size * seq_len, next(timed.mixer.parameters()).element_size()
    states = 2 * batch_size * timed.family.layer_state_bytes(timed.sizes) if cached else 0
    flops = tokens * (2 * _linear_weights(timed.mixer) + _delta_rule_flops(timed.sizes, seq_len))
    return Work(flops, _parameter_bytes(timed.mixer) + 2 * tokens * timed.hidden * item + states)


def operator_work(sizes: MixerSizes, *, batch_size: int, item: int) -> Work:
    """Return the work of one step of the delta-rule operator; q, k, v and output take ``item`` bytes a number."""
    operands = 2 * sizes.key_heads * sizes.head_k_dim + 2 * sizes.value_heads * sizes.head_v_dim
    moved = batch_size * (2 * 4 * sizes.state_elements + item * operands)
    return Work(batch_size * _delta_rule_flops(sizes, 1), moved)


def model_work(timed: TimedModel, *, batch_size: int, seq_len: int, cached: bool = False) -> Work:
    """Return the work of a whole model on ``[batch_size, seq_len]`` tokens, with logits of one token per sequence.

    The embedding is not counted in the bytes, unless the head shares it.
    """
    model, family = timed.model, timed.family
    config = model.config.to_dict()
    head_VD, tokens = _head_weight(model), batch_size * seq_len
    rules = sum(_delta_rule_flops(sizes, seq_len) for sizes in family.layer_sizes(config).values())
    weights = _linear_weights(model) - head_VD.numel()
    flops = tokens * (2 * weights + rules) + batch_size * 2 * head_VD.numel()
    embedding_VD = cast(torch.nn.Embedding, model.get_input_embeddings()).weight
    unread = 0 if embedding_VD is head_VD else embedding_VD.numel() * embedding_VD.element_size()
    states = 2 * batch_size * family.state_bytes(config) if cached else 0
    return Work(flops, _parameter_bytes(model) - unread + states)


def training_work(timed: TimedModel, *, batch_size: int, seq_len: int) -> Work:
    """Return the work of a training step: three times that of a forward pass with all logits."""
    forward = model_work(timed, batch_size=batch_size, seq_len=seq_len)
    other_logits = 2 * (batch_size * seq_len - batch_size) * _head_weight(timed.model).numel()
    return Work(3 * (forward.flops + other_logits), 3 * forward.bytes)


def _head_weight(model: PreTrainedModel) -> torch.Tensor:
    return cast(torch.nn.Linear, model.get_output_embeddings()).weight


def _delta_rule_flops(sizes: MixerSizes, seq_len: int) -> float:
    keys, values = sizes.head_k_dim, sizes.head_v_dim
    # fla's layers process up to 64 tokens one at a time.
    within = 0 if seq_len <= _CHUNK else _CHUNK * (6 * keys + 4 * values)
    return sizes.value_heads * (6 * keys * values + within)


def _linear_weights(module: torch.nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))


def _parameter_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
