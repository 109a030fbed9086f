"""Operators that are replaced for a while, wherever a mixer calls them from."""

import pytest
import torch
from torch import nn

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES
from keyreduce.models.operators import replaced_operators

FAMILY = FAMILIES["qwen3_next"]


def torch_chunk_gated_delta_rule(x):
    return x + 1


class OfModule(nn.Module):
    """As transformers has its mixers since 5.15."""

    def forward(self, x):
        return torch_chunk_gated_delta_rule(x)


class OfAttribute(nn.Module):
    """As it had them before."""

    def __init__(self):
        super().__init__()
        self.chunk_gated_delta_rule = torch_chunk_gated_delta_rule
        self.other = torch_chunk_gated_delta_rule

    def forward(self, x):
        return self.chunk_gated_delta_rule(x)


@pytest.mark.parametrize("kind", [OfModule, OfAttribute])
def test_every_call_is_seen_once(kind):
    mixers, seen = [kind(), kind()], []

    def watched(operator):
        def call(x):
            seen.append(float(x))
            return operator(x) * 10

        return call

    with replaced_operators(FAMILY, mixers, watched):
        assert [float(mixer(torch.tensor(value))) for mixer, value in zip(mixers, (1.0, 2.0), strict=True)] == [20, 30]
    assert seen == [1.0, 2.0]
    assert [float(mixer(torch.tensor(1.0))) for mixer in mixers] == [2, 2]
    assert seen == [1.0, 2.0]
    assert torch_chunk_gated_delta_rule.__name__ == "torch_chunk_gated_delta_rule"


def test_all_is_put_back_after_an_error():
    mixer = OfAttribute()
    with pytest.raises(ZeroDivisionError), replaced_operators(FAMILY, [mixer], lambda operator: lambda x: 1 / 0):
        mixer(torch.tensor(1.0))
    assert mixer.chunk_gated_delta_rule is torch_chunk_gated_delta_rule
    assert mixer.other is torch_chunk_gated_delta_rule


def test_a_mixer_without_such_an_operator_is_refused():
    with (
        pytest.raises(KeyreduceError, match=r"^OfModule calls none of chunk_kda, .*transformers 5\.6\.2 to 5\.24"),
        replaced_operators(FAMILIES["kda"], [OfModule()], lambda operator: operator),
    ):
        pass
