"""Statistics and weights to a plan: a method chooses layer by layer. Memory stays at one layer's projections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from keyreduce.calibration.projections import projection_name, projection_weight
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, MixerSizes, family_of
from keyreduce.families.mixer_tensors import check_mixers
from keyreduce.models.quantized import refuse_quantized
from keyreduce.pruning.budget import SIZE_OF, sizes_after
from keyreduce.pruning.corrections import correction_of
from keyreduce.pruning.methods import LayerView, Method, Selection
from keyreduce.pruning.plan import LayerCut, Plan, value_heads_of


def check_method(source: Checkpoint, method: Method, targets: list[str]) -> None:
    """Check that a method can prune these targets of a model, before any work.

    Raises:
        KeyreduceError: it does not choose one of the targets, it or nothing can prune this model, that is quantised, or
            its mixers have not the tensors that the config asks for.
    """
    if not family_of(source.config).mixer_layers(source.config):
        raise KeyreduceError(f"{source.path} has no layer with a recurrent state, so there is nothing to prune")
    refuse_quantized(source)
    for target in targets:
        if target not in method.select:
            known = " and ".join(f"`target` {name}" for name in method.select)
            raise KeyreduceError(f"`method` {method.name} is for {known} alone; for {target} take another method")
    if unfit := method.unfit(source.config):
        raise KeyreduceError(unfit)
    check_mixers(source.config, source.shapes, source.path)


def check_options(method: Method, given: Mapping[str, object]) -> dict[str, object]:
    """Return the given options and the defaults of the others; KeyreduceError if one or its value is not taken."""
    if unknown := [name for name in given if name not in method.options]:
        raise KeyreduceError(f"`method` {method.name} takes no `{unknown[0]}`; leave it out, or take another method")
    chosen = {**method.options, **given}
    method.check(chosen)
    return chosen


def read_options(method: Method, settings: Sequence[str]) -> dict[str, object]:
    """Return the options that ``NAME=VALUE`` texts give, each of its default's type; KeyreduceError if one is not."""
    options = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in method.options:
            known = ", ".join(f"{name}={default}" for name, default in method.options.items()) or "none"
            raise KeyreduceError(f"`set` {setting}: give NAME=VALUE; options of {method.name}: {known}")
        kind: Any = type(method.options[name])
        try:
            options[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise KeyreduceError(f"`set` {setting}: the value must be a {kind.__name__}") from None
    return options


def make_plan(
    source: Checkpoint,
    method: Method,
    keep: Mapping[str, Mapping[int, int]],
    *,
    seed: int,
    statistics: Statistics | None,
    inputs: Mapping,
    options: Mapping[str, object] | None = None,
    correct: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Choose what stays.

    Args:
        keep: target -> layer -> how many of each group stay. Where all do, there is nothing to choose.
        seed: for methods that draw; each layer and target draws from its own stream.
        statistics: the calibration statistics, if the method needs them.
        inputs: what the plan is recorded to be made from.
        options: of the method, where they are not its defaults.
        correct: whether what stays is changed to make good what the cut does to it, where there are statistics.
        progress: called with 1 after each layer.

    Raises:
        KeyreduceError: the method cannot do that, the statistics are of another model or lack what it needs, weights
            are not of the config's shapes, one that the method reads is NaN or inf, or it chooses another number.
    """
    check_method(source, method, list(keep))
    family = family_of(source.config, source.tensors)
    layers = family.layer_sizes(source.config)
    if statistics is not None:
        _check_statistics(source, method, statistics, list(layers))
    options = {**method.options, **(options or {})}
    largest = family.largest_beta(source.config)
    cuts = {}
    for layer, sizes in layers.items():
        view = layer_view(source, family, layer, sizes, statistics)
        numbers = {target: number_of[layer] for target, number_of in keep.items()}
        chosen = {}
        for target, number in numbers.items():
            if number < getattr(sizes, SIZE_OF[target]):
                generator = torch.Generator().manual_seed(_stream(seed, layer, target))
                selection = method.select[target](view, number, generator, **options)
                _check_selection(method, target, selection, sizes, number)
                chosen[target] = selection
        cuts[layer] = _cut(sizes, sizes_after(sizes, numbers), chosen)
        if correct and statistics is not None and chosen:
            found = correction_of(cuts[layer], statistics.layers[layer], statistics.tokens, largest)
            cuts[layer] = replace(cuts[layer], correction=found)
        if progress is not None:
            progress(1)
    ran = {target: method.parts.get(target, method) for target in keep}
    methods = {}
    for one in ran.values():
        chosen_options = options if one is method else dict(one.options)
        methods[one.name] = {"summary": one.summary, "citation": one.citation, "options": chosen_options}
    return Plan(inputs, cuts, {target: one.name for target, one in ran.items()}, methods)


def layer_view(
    source: Checkpoint, family: Family, layer: int, sizes: MixerSizes, statistics: Statistics | None
) -> LayerView:
    """Return one layer as methods see it; ``family`` is located in the checkpoint, and ``sizes`` are the layer's."""
    projection = partial(_projection, source, family, layer, sizes)
    return LayerView(sizes, None if statistics is None else statistics.layers[layer], projection)


def check_calibration(source: Checkpoint, calibrated: str) -> None:
    """Raise KeyreduceError if ``calibrated`` is not the identity of this checkpoint."""
    if calibrated != source.identity:
        raise KeyreduceError(
            f"the calibration file was made from another model ({calibrated[:12]}) than {source.path} "
            f"({source.identity[:12]}); run keyreduce calibrate for this one, or give another `calibration` or `work`"
        )


def _check_selection(method: Method, target: str, selection: Selection, sizes: MixerSizes, keep: int) -> None:
    """Check what a method chose, since methods come from anywhere."""
    groups = {"key": sizes.key_heads, "value": sizes.value_heads, "head": 1}[target]
    channels, kept_GR, projection_HKR = getattr(sizes, SIZE_OF[target]), selection.kept_GR, selection.projection_HKR
    if kept_GR is None:
        fits = (
            target == "key"
            and projection_HKR is not None
            and projection_HKR.shape == (groups, channels, keep)
            and bool(projection_HKR.isfinite().all())
        )
    else:
        fits = projection_HKR is None and kept_GR.dtype == torch.int64 and kept_GR.shape == (groups, keep)
        fits = fits and bool((kept_GR.diff(dim=1) > 0).all()) and bool(((kept_GR >= 0) & (kept_GR < channels)).all())
    if not fits:
        raise KeyreduceError(
            f"method {method.name} is wrong: for {target} it must return {groups} ascending rows of {keep} of "
            f"{channels} channels, or for key a projection [{groups}, {channels}, {keep}]"
        )


def _stream(seed: int, layer: int, target: str) -> int:
    """A seed for each layer and target; the factor is above three times any number of layers."""
    return seed * 3_000_017 + layer * 3 + list(SIZE_OF).index(target)


def _cut(before: MixerSizes, after: MixerSizes, chosen: Mapping) -> LayerCut:
    # Channels were chosen in every head, also in those that go.
    whole = LayerCut.of_nothing(before)
    heads_H = chosen["head"].kept_GR[0] if "head" in chosen else whole.heads_H
    value_heads_W = value_heads_of(before, heads_H)
    key = chosen.get("key")
    key_HR = whole.key_HR if key is None else key.kept_GR
    value_WR = chosen["value"].kept_GR if "value" in chosen else whole.value_WR
    return LayerCut(
        before,
        after,
        heads_H,
        None if key_HR is None else key_HR[heads_H],
        value_WR[value_heads_W],
        None if key is None or key.projection_HKR is None else key.projection_HKR[heads_H],
        {target: selection.report for target, selection in chosen.items() if selection.report},
    )


def _projection(source: Checkpoint, family: Family, layer: int, sizes: MixerSizes, word: str) -> torch.Tensor:
    name = projection_name(family, layer, word)
    # Of a weight that holds several projections, the others are not looked at.
    weight = projection_weight(family, sizes, word, source.read(name)).float()
    if not is_finite(weight):
        raise KeyreduceError(f"tensor {name!r} of {source.path} holds NaN or inf: the checkpoint is damaged")
    return weight.contiguous()


def _check_statistics(source: Checkpoint, method: Method, statistics: Statistics, layers: list[int]) -> None:
    check_calibration(source, statistics.model)
    if sorted(statistics.layers) != layers:
        raise KeyreduceError("the calibration file lacks layers of this model; calibrate again with `overwrite`")
    if method.needs_gradients and any(sums.taylor is None for sums in statistics.layers.values()):
        raise KeyreduceError(
            f"{method.name} needs gradients, which the calibration file does not hold: "
            "run keyreduce calibrate `gradients` `overwrite`"
        )
