"""Recall, which is what a smaller state loses first: by kind, by length and by number of pairs.

Everything is drawn from a seed, each cell of the grid from its own, so that a cell does not depend on the others.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from typing import NamedTuple

import torch

from keyreduce.data.batches import text_token_ids
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation import mqar, needle
from keyreduce.evaluation.probes import Probe, ask, average
from keyreduce.models.classes import vocabulary_of
from keyreduce.models.loading import LoadedModel
from keyreduce.processes import Processes

KINDS = {"mqar": "multi-query associative recall", "needle": "a needle in a haystack"}


class RecallCell(NamedTuple):
    """One cell of the grid: probes of ``length`` tokens with ``pairs`` keys and values."""

    kind: str
    length: int
    pairs: int


@dataclass(frozen=True)
class RecallSettings:
    """The grid of probes: each of ``kinds`` with each of ``lengths`` and of ``pairs``, ``probes`` sequences in a cell.

    Raises:
        KeyreduceError: one of the first three is empty, or names something twice.
    """

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    pairs: tuple[int, ...]
    probes: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("kinds", "lengths", "pairs"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                option = "`recall`" if name == "kinds" else f"`recall_{name}`"
                raise KeyreduceError(f"{option} names nothing, or one thing twice")


class RecallProbes:
    """The probes of one model's tokenizer; `cells` has those of the grid that have room for their pairs.

    What the model never sees in text, such as special tokens, is in no probe; ``text`` is for haystacks.

    Raises:
        KeyreduceError: no cell of the grid has room for its pairs, or see `needle.Wording.of`.
    """

    def __init__(self, loaded: LoadedModel, text: TextSource, settings: RecallSettings):
        self.loaded, self.text, self.settings = loaded, text, settings
        self.symbols_S = text_token_ids(loaded.tokenizer, vocabulary_of(loaded.model))
        grid = [RecallCell(*cell) for cell in product(settings.kinds, settings.lengths, settings.pairs)]
        self.cells = [cell for cell in grid if self._fits(cell)]
        self.left_out = [cell for cell in grid if cell not in self.cells]
        self.tokens = sum(cell.length for cell in self.cells) * settings.probes
        if not self.cells:
            raise KeyreduceError(
                "no `recall_lengths` has room for any `recall_pairs`; give longer ones, or fewer pairs"
            )

    @cached_property
    def wording(self) -> needle.Wording:
        """The sentence that is hidden in text."""
        return needle.Wording.of(self.loaded.tokenizer)

    def _fits(self, cell: RecallCell) -> bool:
        if cell.kind == "mqar":
            return mqar.fits(cell.length, cell.pairs, len(self.symbols_S))
        return self.wording.haystack(cell.length, cell.pairs) > 0

    def draw(self, cell: RecallCell) -> Iterator[Probe]:
        """Yield the probes of one cell, the same ones each time."""
        digest = hashlib.sha256(f"{self.settings.seed} {cell.kind} {cell.length} {cell.pairs}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        amounts = (cell.length, cell.pairs, self.settings.probes, generator)
        if cell.kind == "mqar":
            return mqar.draw(self.symbols_S, *amounts)
        return needle.draw(self.text, self.loaded.tokenizer, self.wording, *amounts)

    def ask(
        self, *, batch_size: int, processes: Processes = Processes(), progress: Callable[[int], None] | None = None
    ) -> list[dict]:
        """Return for each cell what this process's share of its probes gives, ``answered`` by `probes.ask`.

        Raises:
            KeyreduceError: a logit is NaN or inf, or the text is too short for a haystack.
        """
        found = []
        for cell in self.cells:
            probes = self.draw(cell)
            batches = iter(lambda: list(islice(probes, batch_size)), [])  # noqa: B023 (used up before the next one)
            answered = ask(self.loaded.model, processes.own(batches), name=str(self.loaded.folder), progress=progress)
            found.append({**cell._asdict(), "answered": answered})
        return found


def recall_metrics(shares: Iterable[list[dict]]) -> dict[str, list[dict]]:
    """Combine what all processes found: kind -> its cells, each with the averages of `probes.average`.

    Cells of needles have the averages by depth too (``depths``).
    """
    metrics: dict[str, list[dict]] = {}
    for parts in zip(*shares, strict=True):
        cell = {name: parts[0][name] for name in RecallCell._fields}
        answered = [probe for part in parts for probe in part["answered"]]
        averages = average(answers for _, answers in answered)
        depths = sorted({depth for depth, _ in answered if depth is not None})
        if depths:
            averages["depths"] = [
                {"depth": depth, **average(answers for at, answers in answered if at == depth)} for depth in depths
            ]
        metrics.setdefault(cell.pop("kind"), []).append({**cell, **averages})
    return metrics
