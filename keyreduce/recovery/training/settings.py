"""How a pruned model is trained on. Nothing heavy is imported here."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from keyreduce.errors import KeyreduceError

LORA = "lora"
FULL = "full"
TRAINING_MODES = {
    LORA: "train low-rank additions to the projections of q, k and v on the whole model's loss, and merge them",
    FULL: "train all weights on the whole model's loss",
}
KERNELS = ("torch", "fla")
_RATES = {LORA: 5e-4, FULL: 1e-4}
_OF_LORA = ("rank", "alpha", "targets")


class Training(NamedTuple):
    """What there is to choose.

    Attributes:
        lr: the highest learning rate: it rises over ``warmup``, and falls along a cosine to nothing.
        warmup: a share of the steps.
        distill_weight: the share of the loss that is the teacher's, with a teacher; the rest is the text's.
        temperature: what logits of teacher and student are divided by.
        rank, alpha: the size of the low-rank additions, and their scale times the rank (Hu et al., arXiv:2106.09685).
        targets: modules that get one, by the end of their names; none: the family's projections of q, k and v.
        micro_batch: rows that a device takes at a time; None takes its share of a batch at once.
        checkpointing: compute activations a second time in the backward pass, instead of keeping them.
        shard: FSDP: processes share out weights, gradients and optimizer state.
        save_every: steps from one checkpoint to the next; None makes ten in all.
        kernels: ``torch`` for the PyTorch backend, which any device runs, ``fla`` for its own Triton kernels.
    """

    lr: float
    warmup: float = 0.05
    distill_weight: float = 1.0
    temperature: float = 2.0
    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()
    micro_batch: int | None = None
    checkpointing: bool = False
    shard: bool = False
    save_every: int | None = None
    kernels: str = "torch"

    def describe(self, mode: str, *, is_distilled: bool) -> dict:
        """Return what the result depends on, for the record: not what merely fits it to a machine."""
        left_out = {"micro_batch", "checkpointing", "shard", "save_every"}
        left_out |= set() if mode == LORA else set(_OF_LORA)
        left_out |= set() if is_distilled else {"distill_weight", "temperature"}
        described = {name: value for name, value in self._asdict().items() if name not in left_out}
        return described | ({"targets": list(self.targets)} if mode == LORA else {})


def make_training(mode: str, options: Mapping[str, object]) -> Training:
    """Return the settings of a mode.

    Args:
        mode: ``lora`` or ``full``.
        options: fields of :class:`Training` that are not to be its defaults.

    Raises:
        KeyreduceError: there is no such mode, it takes no such option, or not this value.
    """
    if mode not in TRAINING_MODES:
        raise KeyreduceError(f"`mode` {mode} is no training; take one of {', '.join(TRAINING_MODES)}")
    for name in _OF_LORA:
        if name in options and mode != LORA:
            raise KeyreduceError(f"`mode` {mode} takes no `lora_{name}`; leave it out, or take `mode` {LORA}")
    unknown = sorted(options.keys() - set(Training._fields))
    if unknown:
        raise KeyreduceError(f"`mode` {mode} takes no `{unknown[0]}`; leave it out")
    made = Training(**{"lr": _RATES[mode], **options})
    allowed = {
        "`lr` is above 0": 0 < made.lr < math.inf,
        "`warmup` is a share of the steps, from 0 to 1": 0 <= made.warmup < 1,
        "`distill_weight` is from 0 to 1": 0 <= made.distill_weight <= 1,
        "`temperature` is above 0": 0 < made.temperature < math.inf,
        "`lora_rank` is at least 1": made.rank >= 1,
        "`lora_alpha` is above 0": 0 < made.alpha < math.inf,
        "`micro_batch` is at least 1": made.micro_batch is None or made.micro_batch >= 1,
        "`save_every` is at least 1": made.save_every is None or made.save_every >= 1,
        f"`kernels` is one of {', '.join(KERNELS)}": made.kernels in KERNELS,
    }
    for told, holds in allowed.items():
        if not holds:
            raise KeyreduceError(told)
    return made
