"""How much memory training takes at the least, so that what has no room is refused before the work.

What is counted is what there must be whatever the kernels: weights, gradients, the two moments of Adam, the teacher,
and the logits of a micro-batch with their gradients. Activations come on top.
"""

from collections.abc import Mapping
from typing import NamedTuple

from keyreduce.errors import KeyreduceError

_FLOAT = 4
_MOMENTS = 2
_LOGIT_COPIES = 3  # the logits, their logarithms in float32, and the gradient


class Needs(NamedTuple):
    """What one process has to hold.

    Attributes:
        weights: parameters of the student.
        trained: those of them, or beside them, that are trained.
        teacher: parameters of the teacher, 0 without one.
        logits: rows x tokens x vocabulary of a micro-batch.
        weight_bytes: bytes of a weight that is not trained.
        shards: among how many processes weights, gradients and moments are shared out.
    """

    weights: int
    trained: int
    teacher: int
    logits: int
    weight_bytes: int = _FLOAT
    shards: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes, at the least."""
        frozen = max(self.weights - self.trained, 0) * self.weight_bytes
        student = frozen + self.trained * _FLOAT * (2 + _MOMENTS)
        logits = self.logits * _FLOAT * (_LOGIT_COPIES + (1 if self.teacher else 0))
        return student // self.shards + self.teacher * self.weight_bytes + logits


def refuse_without_room(needs: Needs, room: int, options: Mapping[str, Needs]) -> None:
    """Refuse a training that cannot fit.

    Args:
        needs: what it takes.
        room: the bytes that there are.
        options: what a user might ask for instead -> what that takes.

    Raises:
        KeyreduceError: says how much is needed, and which of the options fit.
    """
    if needs.nbytes <= room:
        return
    fitting = [f"{name} ({_gib(other.nbytes)})" for name, other in options.items() if other.nbytes <= room]
    instead = f"these fit: {'; '.join(fitting)}" if fitting else "take a larger device, or more of them with `shard`"
    raise KeyreduceError(
        f"training takes at least {_gib(needs.nbytes)}, activations not counted, and there are {_gib(room)}; {instead}"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB"
