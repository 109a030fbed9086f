"""How much a call has to do, by formula: custom kernels are invisible to PyTorch's own counter.

Operations count a multiplication and an addition as two. Per token, a linear layer does 2 for each of its weights.
The delta rule does, per token and value head, with a state of K x V:
one token at a time 6KV: what the state holds for the key, the update, what it holds for the query;
in chunks of C = 64 tokens 6KV + 6CK + 4CV: the same against the chunk's state, and the products within the chunk
(k k^T, its inverse applied to k and to v, q k^T, and that applied to the values), triangles counted as squares.
Short convolutions, norms, activations, the scores of softmax layers, and what experts of a mixture compute are left
out.

Bytes are the least that must move: weights once (all experts), input and output once, and where there is a cache each
state read and written once. Activations between the kernels come on top, so a prefill never comes near the ceiling of
bytes.
"""

from typing import NamedTuple

import torch

from keyreduce.families import Family
from keyreduce.families.table import MixerSizes

_CHUNK = 64


class Work(NamedTuple):
    """Floating-point operations and bytes of one call."""

    flops: float
    bytes: float


def mixer_work(
    mixer: torch.nn.Module, hidden: int, sizes: MixerSizes, *, batch_size: int, seq_len: int, cached: bool
) -> Work:
    """Return what one mixer layer does with ``[batch_size, seq_len]`` tokens.

    Args:
        mixer: the layer.
        hidden: the model's width.
        sizes: its sizes.
        batch_size, seq_len: of the input.
        cached: whether a state is read before and written after.
    """
    tokens, item = batch_size * seq_len, next(mixer.parameters()).element_size()
    states = 2 * batch_size * 4 * sizes.state_elements if cached else 0
    flops = tokens * (2 * _linear_weights(mixer) + _delta_rule_flops(sizes, seq_len))
    return Work(flops, _parameter_bytes(mixer) + 2 * tokens * hidden * item + states)


def operator_work(sizes: MixerSizes, *, batch_size: int, item: int) -> Work:
    """Return what one step of the delta-rule operator alone does; q, k, v and output are of ``item`` bytes a number."""
    operands = 2 * sizes.key_heads * sizes.head_k_dim + 2 * sizes.value_heads * sizes.head_v_dim
    moved = batch_size * (2 * 4 * sizes.state_elements + item * operands)
    return Work(batch_size * _delta_rule_flops(sizes, 1), moved)


def model_work(model: torch.nn.Module, family: Family, *, batch_size: int, seq_len: int, cached: bool) -> Work:
    """Return what a whole model does with ``[batch_size, seq_len]`` tokens, the head on one token a sequence.

    The table of the embedding counts with its looked-up rows alone, unless the head shares it.
    """
    config = model.config.to_dict()
    head, tokens = model.get_output_embeddings(), batch_size * seq_len
    rules = sum(_delta_rule_flops(sizes, seq_len) for sizes in family.layer_sizes(config).values())
    weights = _linear_weights(model) - head.weight.numel()
    flops = tokens * (2 * weights + rules) + batch_size * 2 * head.weight.numel()
    table = model.get_input_embeddings().weight
    unread = 0 if table is head.weight else table.numel() * table.element_size()
    states = 2 * batch_size * family.state_bytes(config) if cached else 0
    return Work(flops, _parameter_bytes(model) - unread + states)


def _delta_rule_flops(sizes: MixerSizes, seq_len: int) -> float:
    keys, values = sizes.head_k_dim, sizes.head_v_dim
    # Of up to 64 tokens fla's layers take them one at a time.
    within = 0 if seq_len <= _CHUNK else _CHUNK * (6 * keys + 4 * values)
    return sizes.value_heads * (6 * keys * values + within)


def _linear_weights(module: torch.nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))


def _parameter_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
