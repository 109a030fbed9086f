"""The modes of recovery: what each one does, its settings and their defaults. Nothing heavy is imported here."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

from keyreduce.errors import KeyreduceError

LayerMode = Literal["auto", "least-squares", "reconstruct"]
Mode = Literal["auto", "least-squares", "reconstruct", "lora", "full"]
Scope = Literal["mixer-in-block", "mixer", "block"]
Kernels = Literal["torch", "fla"]

AUTO: Final = "auto"
LEAST_SQUARES: Final = "least-squares"
RECONSTRUCT: Final = "reconstruct"
LORA: Final = "lora"
FULL: Final = "full"
MODES = {
    LEAST_SQUARES: "refit each layer's output projection, in closed form",
    RECONSTRUCT: "then fit each layer by gradient steps",
}
"""The modes that go layer by layer, and what they do."""
TRAINING_MODES = {LORA: "train low-rank additions, and merge them", FULL: "train all weights"}
"""The modes that train the whole model, and what they do."""
AUTO_SUMMARY = f"{RECONSTRUCT} on a GPU, {LEAST_SQUARES} on a CPU"
"""What ``auto`` stands for; see :func:`resolve_mode`."""
_WHY = {
    LEAST_SQUARES: f"on a CPU the gradient steps of {RECONSTRUCT} take long",
    RECONSTRUCT: f"it leaves less loss than {LEAST_SQUARES}, and a GPU takes its gradient steps fast",
}
ALGORITHMS = {LEAST_SQUARES: 2, RECONSTRUCT: 2, LORA: 1, FULL: 1}
"""A number for each mode, to be raised when its results change."""
RATES = {RECONSTRUCT: 5e-4, LORA: 5e-4, FULL: 2e-5}
"""The learning rate of a mode, unless another one is asked for."""
REPEATS = 0.125
"""The share of the rows of a layer-wise recovery that :mod:`keyreduce.recovery.repeats` replaces."""
BATCHES = 32
"""Batches of text that a recovery takes by default; on a GPU see :func:`default_batches`."""
GPU_TOKENS = 2**20
"""Tokens that ``reconstruct`` takes on a GPU by default, of models of up to :data:`GPU_WIDTH` hidden channels."""
GPU_WIDTH = 1024
"""Of wider models it takes fewer: the hidden states of all tokens, of which there are four copies, stay at 4 GiB."""
PASSES, LEAST_STEPS, MOST_STEPS = 8, 512, 2048
"""Passes that gradient steps take over the text by default, and the least and most steps that this may be."""


class Steps(NamedTuple):
    """How gradient steps fit a layer.

    Attributes:
        steps: Adam steps, one batch each; for None see :meth:`number`.
        lr: the highest learning rate; it rises during a twentieth of the steps and then falls to 0 along a cosine.
        scope: ``mixer`` fits the mixer to what the dense mixer gives. ``mixer-in-block`` fits the mixer so that the
            block, whose MLP stays as it is, gives what the dense block gives. ``block`` fits the mixer, the MLP and
            their norms to what the dense block gives.
    """

    steps: int | None = None
    lr: float = RATES[RECONSTRUCT]
    scope: Scope = "mixer-in-block"

    def number(self, batches: int) -> int:
        """Return how many steps are taken on so many batches: by default :data:`PASSES` over them, within bounds."""
        return min(MOST_STEPS, max(LEAST_STEPS, PASSES * batches)) if self.steps is None else self.steps


class Training(NamedTuple):
    """How the whole model is trained.

    Attributes:
        lr, warmup: the highest learning rate; it rises in that share of the steps and then falls to 0 along a cosine.
        distill_weight: the share of the loss that compares the model with its teacher, if there is one; the rest is the
            loss on the text.
        temperature: what the logits of teacher and student are divided by.
        lora_rank, lora_alpha: the rank of the low-rank additions, and their scale times the rank.
        lora_targets: the ends of the names of layers that get one; if empty, those that project to q, k and v.
        micro_batch: rows that a device takes at a time; None takes its whole share of a batch.
        gradient_checkpointing: whether activations are computed a second time in the backward pass instead of kept.
        shard: whether processes share weights, gradients and optimizer state among them (FSDP).
        save_every: steps from one checkpoint to the next; None saves ten times in all.
        kernels: ``torch`` is the PyTorch backend, which any device runs, ``fla`` fla's own Triton kernels.
    """

    lr: float
    warmup: float = 0.05
    distill_weight: float = 1.0
    temperature: float = 2.0
    lora_rank: int = 32
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = ()
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    shard: bool = False
    save_every: int | None = None
    kernels: Kernels = "torch"

    def describe(self, mode: str, *, is_distilled: bool) -> dict:
        """Return the settings that the result depends on, for the record; others only fit it to a machine."""
        left_out = {"micro_batch", "gradient_checkpointing", "shard", "save_every"}
        left_out |= set() if is_distilled else {"distill_weight", "temperature"}
        described = self._asdict() | {"lora_targets": list(self.lora_targets)}
        names = [name for name in self._fields if name in _TAKEN[mode] - left_out]
        return {name.removeprefix("lora_"): described[name] for name in names}


_TAKEN: dict[str, set[str]] = {LEAST_SQUARES: {"repeats"}, RECONSTRUCT: {"repeats", *Steps._fields}}
_TAKEN |= {LORA: {*Training._fields}, FULL: {name for name in Training._fields if not name.startswith("lora_")}}
"""Mode -> the names of its settings."""
SETTINGS = tuple(dict.fromkeys(("repeats", *Steps._fields, *Training._fields)))
"""The names of the settings that not all modes have."""


def resolve_mode(mode: str, device_type: str, given: Iterable[str] = ()) -> str:
    """Return the mode that ``auto`` is on a type of device, such as ``cuda``; any other mode is itself.

    Raises KeyreduceError if ``auto`` was asked for, and the mode that it is lacks one of the settings ``given``.
    """
    if mode != AUTO:
        return mode
    taken, place = (LEAST_SQUARES, "CPU") if device_type == "cpu" else (RECONSTRUCT, "GPU")
    _check_names(taken, given, f"on a {place} `mode` auto is {taken}, which")
    return taken


def auto_note(taken: str) -> str:
    """Return a sentence that says which mode ``auto`` was resolved to, and why."""
    return f"auto takes {taken}: {_WHY[taken]}"


def default_batches(mode: str, device_type: str, batch_tokens: int, width: int) -> int:
    """Return how many batches of text a recovery takes, unless a number is asked for.

    On a CUDA GPU, where ``reconstruct`` is fast, it takes :data:`GPU_TOKENS`, fewer of wider models, but no fewer
    batches than elsewhere.

    Args:
        batch_tokens: the tokens of a batch.
        width: the model's hidden channels.
    """
    if mode != RECONSTRUCT or device_type != "cuda":
        return BATCHES
    return max(BATCHES, GPU_TOKENS * GPU_WIDTH // max(GPU_WIDTH, width) // max(1, batch_tokens))


def make_steps(mode: str, given: Mapping[str, Any]) -> Steps | None:
    """Return the gradient steps of a mode, from fields of :class:`Steps`; None where it takes none.

    Raises KeyreduceError if the mode has no such setting, or the learning rate is not above 0.
    """
    _check(mode, given)
    return Steps(**given) if mode == RECONSTRUCT else None


def make_training(mode: str, given: Mapping[str, Any]) -> Training:
    """Return the settings of a mode that trains, from fields of :class:`Training`.

    Raises KeyreduceError if the mode has no such setting, or a number is out of its bounds.
    """
    _check(mode, given)
    return Training(**{"lr": RATES[mode], **given})


def _check(mode: str, given: Mapping[str, Any]) -> None:
    _check_names(mode, given, f"`mode` {mode}")
    for name, value in given.items():
        if name in ("lr", "temperature", "lora_alpha") and not 0 < value < math.inf:
            raise KeyreduceError(f"`{name}` is {value:g}; it is above 0")
        if name == "warmup" and not 0 <= value < 1:
            raise KeyreduceError(f"`warmup` is {value:g}; it is a share of the steps, at least 0 and below 1")


def _check_names(mode: str, names: Iterable[str], subject: str) -> None:
    for name in names:
        if name not in _TAKEN[mode]:
            others = " or ".join(other for other, taken in _TAKEN.items() if name in taken)
            raise KeyreduceError(f"{subject} takes no `{name}`; leave it out, or take `mode` {others}")
