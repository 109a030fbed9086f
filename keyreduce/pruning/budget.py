"""How much stays: from ratios and numbers as they are written to a number for each target and layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes, family_of
from keyreduce.pruning.methods import Method

if TYPE_CHECKING:
    # Only for the types: the command line reads the default from here, and must not wait for torch.
    from keyreduce.calibration.statistics import Statistics

DEFAULT_RATIO = "0.25"
"""The share that goes where no amount is given."""
SIZE_OF = {"key": "head_k_dim", "value": "head_v_dim", "head": "key_heads"}
"""Target -> the size that it reduces."""

# Numbers that Fraction accepts, without exponents so large that it would take long to write them out.
_AMOUNT = re.compile(r"[+-]?[\d.]{1,30}(/\d{1,30}|e\+?\d{1,2}|e-\d{1,3})?", re.IGNORECASE)
_HOLDER = {"key": "a key head", "value": "a value head", "head": "a layer"}
_THINGS = {"key": "channels", "value": "channels", "head": "key heads"}


@dataclass(frozen=True)
class Budget:
    """How much is to stay of each target.

    Attributes:
        ratio, keep: target -> the share to remove, and the number to keep. Exactly one of them is not None, unless
            ``variance`` is given.
        variance: for a projection, the share of the variance to keep.
        allocate: how key channels are distributed over the layers, ``uniform`` or ``energy``.
        multiple_of: the number of kept channels is rounded to a multiple of it.
    """

    ratio: Mapping[str, Fraction | None]
    keep: Mapping[str, Fraction | None]
    variance: float | None
    allocate: str
    multiple_of: int

    @classmethod
    def of(
        cls,
        targets: Sequence[str],
        *,
        ratio: Sequence[str] = (),
        keep: Sequence[str] = (),
        variance: float | None = None,
        allocate: str = "uniform",
        multiple_of: int = 1,
    ) -> Budget:
        """Return the budget for ``key``, ``value``, ``head`` or several; without any amount a quarter goes.

        ``ratio`` and ``keep`` are one number for all targets or one for each, as they are written.

        Raises:
            KeyreduceError: they say something impossible, or two different things.
        """
        if len(set(targets)) < len(targets) or not targets:
            raise KeyreduceError(f"`target` {','.join(targets)} names a target twice, or none")
        if variance is not None and (ratio or keep):
            raise KeyreduceError("`variance` says how much to keep; leave `ratio` (or PRUNING_RATIO) and `keep` out")
        if variance is not None and not 0 < variance <= 1:
            raise KeyreduceError(f"`variance` is {variance:g}; it is the share to keep, above 0 and at most 1")
        if variance is None and not ratio and not keep:
            ratio = (DEFAULT_RATIO,)
        if ratio and keep:
            raise KeyreduceError("say how much to prune with either `ratio` (or PRUNING_RATIO) or `keep`, not both")
        if allocate == "energy" and ("key" not in targets or variance is not None):
            raise KeyreduceError("`allocate` energy distributes key channels: take `target` key and `ratio` or `keep`")
        amounts = (parse_amounts("ratio", ratio, targets), parse_amounts("keep", keep, targets))
        return cls(*amounts, variance, allocate, multiple_of)

    @property
    def targets(self) -> list[str]:
        """The targets, in the order in which they were named."""
        return list(self.ratio)

    @property
    def needs_statistics(self) -> bool:
        """Whether the numbers depend on calibration statistics."""
        return self.variance is not None or self.allocate == "energy"

    def describe(self, config: Mapping) -> dict:
        """Return what determines the numbers, for the record: the numbers themselves, if no statistics are needed."""
        if self.variance is not None:
            keep: dict = {"variance": self.variance, "multiple_of": self.multiple_of}
        else:
            numbers = {target: list(number_of.values()) for target, number_of in self._uniform(config).items()}
            keep = {target: each if len(set(each)) > 1 else each[0] for target, each in numbers.items() if each}
            if self.allocate == "energy":
                keep |= {"allocate": "energy", "multiple_of": self.multiple_of}
        return {"target": ",".join(self.targets), "keep": keep}

    def check(self, config: Mapping, method: Method) -> None:
        """Check, before any work, that the model and the method allow this budget.

        Raises:
            KeyreduceError: see :func:`keep_count`; or the layers would differ in a size for which the config has one
                value, a variance is given and the method does not project, or the family does not allow the sizes.
        """
        if self.variance is not None and (method.moments is None or self.targets != ["key"]):
            raise KeyreduceError("`variance` goes with `method` pca `target` key; give `ratio` or `keep`")
        family = family_of(config)
        if self.allocate == "energy" and "head_k_dim" not in family.per_layer:
            raise KeyreduceError(
                f"a {family.model_type} config says one head_k_dim for all layers, so a model pruned with "
                "`allocate` energy could not be loaded; of the known architectures only delta_net_2 has one for each"
            )
        if self.variance is None:
            numbers = self._uniform(config)
            for layer, sizes in family.layer_sizes(config).items():
                keep = {target: number_of[layer] for target, number_of in numbers.items()}
                family.check_cut(sizes_after(sizes, keep))
            return
        if family.tied:
            raise KeyreduceError(f"`variance` chooses key sizes alone, and {family.tied}")
        for sizes in family.layer_sizes(config).values():
            keep_count("key", sizes.head_k_dim, ratio=Fraction(0), keep=None, multiple_of=self.multiple_of)

    def numbers(
        self, config: Mapping, statistics: Statistics | None, method: Method, options: Mapping[str, object]
    ) -> dict[str, dict[int, int]]:
        """Return target -> layer -> how many stay, from statistics only if :attr:`needs_statistics`."""
        from keyreduce.pruning.allocation import by_energy, by_variance

        if not self.needs_statistics:
            return self._uniform(config)
        assert statistics is not None
        layers, multiple = statistics.layers, self.multiple_of
        if self.variance is not None:
            return {"key": by_variance(family_of(config), layers, self.variance, method, options, multiple_of=multiple)}
        numbers = self._uniform(config)
        return numbers | {"key": by_energy(layers, numbers["key"], multiple)}

    def _uniform(self, config: Mapping) -> dict[str, dict[int, int]]:
        numbers: dict[str, dict[int, int]] = {target: {} for target in self.targets}
        for layer, sizes in family_of(config).layer_sizes(config).items():
            for target, number_of in numbers.items():
                ratio, keep, available = self.ratio[target], self.keep[target], getattr(sizes, SIZE_OF[target])
                number_of[layer] = keep_count(target, available, ratio=ratio, keep=keep, multiple_of=self.multiple_of)
        return numbers


def parse_amount(amount: str) -> Fraction | None:
    """Return a number as it is written, or None if it is none.

    Fractions are exact: in binary, 10 * (1 - 0.9) is less than 1.
    """
    if not _AMOUNT.fullmatch(amount):
        return None
    try:
        return Fraction(amount)
    except (ValueError, ZeroDivisionError):
        return None


def parse_amounts(field: str, amounts: Sequence[str], targets: Sequence[str]) -> dict[str, Fraction | None]:
    """Return what ``ratio`` or ``keep`` says for each target; KeyreduceError unless one number for all or each."""
    if not amounts:
        return dict.fromkeys(targets)
    written = ",".join(amounts)
    numbers = [number for number in map(parse_amount, amounts) if number is not None]
    if len(numbers) < len(amounts):
        raise KeyreduceError(f"`{field}` is {written!r}; give a number, or one for each target with commas")
    if len(numbers) not in (1, len(targets)):
        raise KeyreduceError(
            f"`{field}` {written} gives {len(numbers)} numbers for {len(targets)} targets ({','.join(targets)})"
        )
    return dict(zip(targets, numbers * (len(targets) // len(numbers)), strict=True))


def keep_count(
    target: str, available: int, *, ratio: Fraction | None, keep: Fraction | None, multiple_of: int = 1
) -> int:
    """Return how many channels of a head, or key heads of a layer, stay.

    Args:
        ratio: the share to remove; ``floor(available * (1 - ratio))`` stay, at least 1.
        keep: the number to keep, instead of a ratio.
        multiple_of: round channels to the nearest multiple (up when two are equally near), at least one multiple.

    Raises:
        KeyreduceError: the ratio is outside [0, 1), or there are not so many to keep.
    """
    if ratio is not None:
        if not 0 <= ratio < 1:
            raise KeyreduceError(f"`ratio` is {float(ratio):g}; it is the share to remove, at least 0 and below 1")
        keep = Fraction(max(1, int(available * (1 - ratio))))
    assert keep is not None  # one of the two is given
    if not 1 <= keep <= available or int(keep) != keep:
        raise KeyreduceError(
            f"`keep` is {float(keep):g}; {_HOLDER[target]} of this model has 1 to {available} {_THINGS[target]} to keep"
        )
    if target == "head":
        return int(keep)
    if not 1 <= multiple_of <= available:
        raise KeyreduceError(
            f"`multiple_of` is {multiple_of}; it is at least 1, and at most {SIZE_OF[target]}, {available}"
        )
    multiples = max(1, int(Fraction(keep, multiple_of) + Fraction(1, 2)))
    return min(multiples, available // multiple_of) * multiple_of


def sizes_after(sizes: MixerSizes, keep: Mapping[str, int]) -> MixerSizes:
    """Return the sizes of a layer after a cut; ``keep`` is target -> how many stay."""
    after = sizes._replace(**{SIZE_OF[target]: number for target, number in keep.items()})
    return after._replace(value_heads=sizes.value_heads // sizes.key_heads * after.key_heads)
