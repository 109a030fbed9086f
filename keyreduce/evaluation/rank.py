"""How much of its rank a model's recurrent state uses, along the sequence.

The measure is rank utilisation, ``sr(S) / min(K, V)`` with the stable rank ``sr(S) = ||S||_F^2 / ||S||_2^2`` (Nazari &
Rusch, "The Key to State Reduction in Linear Attention", arXiv:2602.04852). A state of one direction has 1 / min(K, V),
one that holds all directions alike has 1.

Shapes: B rows, T tokens, P positions, W value heads, K key channels, V value channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from keyreduce.calibration.statistics import stable_rank
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import refuse_not_finite
from keyreduce.families import MixerSizes
from keyreduce.models.loading import LoadedModel
from keyreduce.models.operators import replaced_by_layer

_BY_TOKEN = ("q", "k", "v", "beta", "g")  # the operators' arguments that have an entry for each token, on axis 1


@dataclass(frozen=True)
class StateRank:
    """Rank utilisation of a model's states, averaged over sequences.

    States were measured after so many tokens as ``positions`` says. For each layer, ``sizes`` has those of its mixer,
    and ``utilisation`` a float64 ``[P, W]``: the rank utilisation of each value head, from 0 to 1.
    """

    positions: tuple[int, ...]
    sequences: int
    sizes: Mapping[int, MixerSizes]
    utilisation: Mapping[int, torch.Tensor]

    def to_json(self, heads: Mapping[int, Sequence[int]]) -> list[dict]:
        """Return the layers as JSON objects: sizes, numbers of the heads, and each head's utilisation by position.

        ``heads`` gives the numbers of a layer's value heads; those of other layers are numbered from 0.
        """
        return [
            {
                "layer": layer,
                "head_k_dim": self.sizes[layer].head_k_dim,
                "head_v_dim": self.sizes[layer].head_v_dim,
                "heads": list(heads.get(layer, range(self.sizes[layer].value_heads))),
                "utilisation": [[round(share, 6) for share in shares_P] for shares_P in mean_PW.T.tolist()],
            }
            for layer, mean_PW in self.utilisation.items()
        ]


def rank_utilisation(state_BWKV: torch.Tensor) -> torch.Tensor:
    """Return ``sr(S) / min(K, V)`` of each state, in float64 ``[B, W]``; 0 of a state that is all zeros.

    A transposed state gives the same.
    """
    return stable_rank(state_BWKV) / min(state_BWKV.shape[-2:])


def positions_of(num_tokens: int, every: int) -> tuple[int, ...]:
    """Return where in a row states are measured: after each ``every`` tokens, and at the end."""
    return (*range(every, num_tokens, every), num_tokens)


@torch.no_grad()
def measure_rank(
    loaded: LoadedModel, batches: Iterable[torch.Tensor], every: int, progress: Callable[[int], None] | None = None
) -> StateRank:
    """Run batches of tokens through a model, and measure its states on the way.

    Only the states of one layer at one position are in memory: the layer's own operator runs from one position to the
    next and returns its state, which fla keeps in float32 or better in a model of any dtype. Batches are LongTensors
    ``[B, T]`` without padding, all of the same T; `positions_of` says what ``every`` is, and ``progress`` is called
    after each batch with its number of tokens.

    Raises:
        KeyreduceError: there is no batch, or a state holds NaN or inf.
    """
    model, family = loaded.model, loaded.family
    sizes = family.layer_sizes(model.config.to_dict())
    sums: dict[int, torch.Tensor] = {}
    sequences, positions = 0, ()

    def look(layer: int, place: int, state_BWKV: torch.Tensor) -> None:
        refuse_not_finite(state_BWKV, f"the states of layer {layer} of {loaded.folder}")
        sums[layer][place] += rank_utilisation(state_BWKV).sum(dim=0)

    with replaced_by_layer(model, family, sizes, _in_parts(every, look)):
        for tokens_BT in batches:
            found = positions_of(tokens_BT.shape[1], every)
            if not sums:
                positions = found
                sums = {
                    layer: torch.zeros(len(found), size.value_heads, dtype=torch.float64, device=model.device)
                    for layer, size in sizes.items()
                }
            if found != positions:
                raise ValueError("rows are to be of one length")
            model.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)
            sequences += len(tokens_BT)
            if progress is not None:
                progress(tokens_BT.numel())
    if not sequences:
        raise KeyreduceError("the text is empty; give other text")
    means = {layer: (sum_PW / sequences).cpu() for layer, sum_PW in sums.items()}
    return StateRank(positions, sequences, sizes, means)


def _in_parts(every: int, look: Callable[[int, int, torch.Tensor], None]) -> Callable:
    """Return what makes operators go from position to position, and call ``look(layer, place, state)`` at each."""

    def in_parts(operator, layer):
        def call(*operands, **arguments):
            # fla's layers pass them by name, those of transformers by position.
            arguments |= zip("qkv", operands, strict=False)
            length = arguments["q"].shape[1]
            outputs, state, start = [], arguments.pop("initial_state", None), 0
            wants_state = arguments.pop("output_final_state", False)
            for place, end in enumerate(positions_of(length, every)):
                part = {
                    name: argument[:, start:end].contiguous()
                    if name in _BY_TOKEN and argument is not None
                    else argument
                    for name, argument in arguments.items()
                }
                first = [part.pop(name) for name in "qkv"[: len(operands)]]
                output_BTWV, state = operator(*first, **part, initial_state=state, output_final_state=True)
                look(layer(), place, state)
                outputs.append(output_BTWV)
                start = end
            return torch.cat(outputs, dim=1), state if wants_state else None

        return call

    return in_parts
