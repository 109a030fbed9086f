"""The plan of a cut: what stays, and where the decision came from. It is data, written beside the checkpoint."""

from dataclasses import asdict, dataclass
from fractions import Fraction

import torch

from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes


@dataclass(frozen=True)
class Plan:
    """One pruning step.

    Attributes:
        inputs: what decided it: source identity, calibration, method, ratio, seed. Equal inputs give an equal result.
        before, after: the mixer's sizes.
        kept: layer -> kept key channels of each key head, LongTensor ``[H, R]`` with ascending rows.
    """

    inputs: dict
    before: MixerSizes
    after: MixerSizes
    kept: dict[int, torch.Tensor]

    def to_json(self) -> dict:
        """Return the plan as a JSON object."""
        kept = {str(layer): kept_HR.tolist() for layer, kept_HR in self.kept.items()}
        return asdict(self) | {"before": self.before._asdict(), "after": self.after._asdict(), "kept": kept}


def channels_to_keep(head_k_dim: int, *, ratio: float | None, keep: int | None, multiple_of: int = 1) -> int:
    """Return how many key channels of a head stay.

    Args:
        head_k_dim: how many there are.
        ratio: the share to remove; ``floor(head_k_dim * (1 - ratio))`` stay, at least 1.
        keep: the number to keep, instead of a ratio.
        multiple_of: round that to the nearest multiple (up when two are equally near), at least one multiple.

    Raises:
        KeyreduceError: the ratio is outside [0, 1), the number is impossible, both or neither are given.
    """
    if (ratio is None) == (keep is None):
        raise KeyreduceError("say how much to prune with either --ratio (or PRUNING_RATIO) or --keep, not both")
    if ratio is not None:
        if not 0 <= ratio < 1:
            raise KeyreduceError(f"--ratio is {ratio:g}; it is the share to remove, at least 0 and below 1")
        # Exactly as the user wrote it: in binary, 10 * (1 - 0.9) is a little less than 1.
        keep = max(1, int(head_k_dim * (1 - Fraction(str(ratio)))))
    if not 1 <= keep <= head_k_dim:
        raise KeyreduceError(f"--keep is {keep}; a key head of this model has 1 to {head_k_dim} channels to keep")
    if not 1 <= multiple_of <= head_k_dim:
        raise KeyreduceError(f"--multiple-of is {multiple_of}; it is at least 1, and at most head_k_dim, {head_k_dim}")
    multiples = max(1, int(Fraction(keep, multiple_of) + Fraction(1, 2)))
    return min(multiples, head_k_dim // multiple_of) * multiple_of
