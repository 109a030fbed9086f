"""Models that recall by rule: what the probes must be fair to."""

from types import SimpleNamespace

import torch
from transformers import PretrainedConfig

VOCABULARY = 264


class Recaller(torch.nn.Module):
    """Predicts what followed the longest earlier stretch of tokens that ends like the sequence so far.

    Args:
        reach: how many tokens back it remembers; beyond that it knows nothing.
    """

    def __init__(self, reach: int = 10**9):
        super().__init__()
        self.reach = reach
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = PretrainedConfig(vocab_size=VOCABULARY)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits_BTV = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, tokens in enumerate(input_ids.tolist()):
            for place in range(1, len(tokens)):
                matches = [
                    (self.matched(tokens, earlier, place), earlier)
                    for earlier in range(max(0, place - self.reach), place)
                    if tokens[earlier] == tokens[place]
                ]
                if matches:
                    logits_BTV[row, place, tokens[max(matches)[1] + 1]] = 9.0
        return SimpleNamespace(logits=logits_BTV)

    @staticmethod
    def matched(tokens: list[int], earlier: int, place: int) -> int:
        length = 0
        while length <= earlier and tokens[earlier - length] == tokens[place - length]:
            length += 1
        return length
