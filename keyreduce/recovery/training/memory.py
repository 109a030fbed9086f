"""The least memory that a training takes, so that one that cannot fit is refused before the work.

Weights, gradients, Adam's two moments, the teacher, and the logits of a micro-batch with their gradients are counted:
all kernels need them. Activations are not counted.
"""

from collections.abc import Mapping
from typing import NamedTuple

from keyreduce.errors import KeyreduceError

_FLOAT = 4
_MOMENTS = 2
_LOGIT_COPIES = 3  # the logits, their logarithms in float32, and the gradient


class Needs(NamedTuple):
    """What one process has to hold in memory.

    Attributes:
        weights: the number of the student's parameters.
        trained: the number of parameters that are trained, low-rank additions included.
        teacher: the number of the teacher's parameters, 0 without one.
        logits: rows x tokens x vocabulary of a micro-batch.
        weight_bytes: bytes of a weight that is not trained.
        shards: the number of processes that weights, gradients and moments are distributed among.
    """

    weights: int
    trained: int
    teacher: int
    logits: int
    weight_bytes: int = _FLOAT
    shards: int = 1

    @property
    def nbytes(self) -> int:
        """The least number of bytes."""
        frozen = max(self.weights - self.trained, 0) * self.weight_bytes
        student = frozen + self.trained * _FLOAT * (2 + _MOMENTS)
        logits = self.logits * _FLOAT * (_LOGIT_COPIES + (1 if self.teacher else 0))
        return student // self.shards + self.teacher * self.weight_bytes + logits


def refuse_without_room(needs: Needs, room: int, options: Mapping[str, Needs]) -> None:
    """Refuse a training that cannot fit.

    Args:
        needs: what the training takes.
        room: the number of free bytes.
        options: the settings that a user might choose instead -> what the training takes with them.

    Raises:
        KeyreduceError: says how much is needed, and which of the options fit.
    """
    if needs.nbytes <= room:
        return
    fitting = [f"{name} ({_gib(other.nbytes)})" for name, other in options.items() if other.nbytes <= room]
    instead = f"these fit: {'; '.join(fitting)}" if fitting else "take a larger device, or more of them with `shard`"
    raise KeyreduceError(
        f"training takes at least {_gib(needs.nbytes)} without activations, and {_gib(room)} are free; {instead}"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB"
