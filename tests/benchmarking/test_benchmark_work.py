"""The formulas of operations against PyTorch's counter, which sees matrix products; those of bytes by hand.

Shapes: C tokens of a chunk, K key channels, V value channels.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from keyreduce.benchmarking.timed_models import timed_models
from keyreduce.benchmarking.work import mixer_work, model_work, operator_work
from keyreduce.families.table import MixerSizes

SIZES = MixerSizes(2, 4, 16, 24)


def counted(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


def one_token(state_KV, query_K, key_K, value_V):
    """The delta rule as matrix products."""
    held_V = key_K[None] @ state_KV
    state_KV = state_KV + key_K[:, None] @ (value_V[None] - held_V)
    return query_K[None] @ state_KV


def one_chunk(state_KV, query_CK, key_CK, value_CV):
    """The products of the chunk of arXiv:2406.06484, equations 8 to 11; the inverse itself is left out."""
    inverse_CC = key_CK @ key_CK.T
    weight_CK, update_CV = inverse_CC @ key_CK, inverse_CC @ value_CV
    update_CV = update_CV - weight_CK @ state_KV
    output_CV = query_CK @ state_KV + (query_CK @ key_CK.T) @ update_CV
    return state_KV + key_CK.T @ update_CV, output_CV


def test_operator_counts_one_token():
    per_head = counted(one_token, torch.ones(16, 24), torch.ones(16), torch.ones(16), torch.ones(24))
    work = operator_work(SIZES, batch_size=3, item=2)
    assert work.flops == 3 * 4 * per_head
    # Each state read and written in float32; q and k, v and output.
    assert work.bytes == 3 * (2 * 4 * 4 * 16 * 24 + 2 * (2 * 2 * 16 + 2 * 4 * 24))


@pytest.mark.parametrize(("seq_len", "in_chunks"), [(64, False), (128, True)])
def test_mixer_counts_linear_layers_and_the_delta_rule(loaded, seq_len, in_chunks):
    (timed,) = timed_models({"gated": loaded("gated_deltanet")})
    sizes = timed.sizes
    shape = (sizes.head_k_dim, sizes.head_v_dim)
    if in_chunks:
        operands = [torch.ones(64, size) for size in (shape[0], *shape)]
        per_head = counted(one_chunk, torch.ones(shape), *operands) / 64
    else:
        per_head = counted(one_token, torch.ones(shape), *(torch.ones(size) for size in (shape[0], *shape)))
    linear = [part for part in timed.mixer.modules() if isinstance(part, torch.nn.Linear)]
    per_token = sum(counted(part, torch.ones(1, part.in_features)) for part in linear)
    work = mixer_work(timed, batch_size=2, seq_len=seq_len, cached=False)
    assert work.flops == 2 * seq_len * (per_token + sizes.value_heads * per_head)
    weights = sum(parameter.numel() for parameter in timed.mixer.parameters())
    assert work.bytes == 4 * (weights + 2 * 2 * seq_len * 32)
    cached = mixer_work(timed, batch_size=2, seq_len=seq_len, cached=True)
    assert cached.bytes - work.bytes == 2 * 2 * 4 * sizes.state_elements


@pytest.mark.parametrize("tied", [False, True])
def test_model_counts_the_head_once_a_sequence_and_the_table_only_where_it_is_the_head(loaded, tied):
    (timed,) = timed_models({"dense": loaded(tie_word_embeddings=tied)})
    model, seq_len = timed.model, 5
    head = model.lm_head.weight.numel()
    layers = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    rules = 2 * 2 * 6 * 16 * 16  # two layers of two heads
    work = model_work(timed, batch_size=3, seq_len=seq_len, cached=True)
    assert work.flops == 3 * seq_len * (2 * layers + rules) + 3 * 2 * head
    # The head is read either way; tied, it is the table of the embedding as well, which is counted no second time.
    weights = sum(parameter.numel() for parameter in model.model.parameters()) - (not tied) * head
    states = 2 * 3 * 2 * 4 * 2 * 16 * 16
    assert work.bytes == 4 * (weights + (not tied) * head) + states
