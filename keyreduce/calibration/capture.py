"""Observe a model's mixers while it runs, and add their activations to the statistics.

The arguments of the delta-rule operator are taken, not the outputs of projections or convolutions: fla computes q and k
in different ways on different paths, but the operator gets the same on all of them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel

from keyreduce.calibration.partial import PartialSums
from keyreduce.calibration.projections import projection_name
from keyreduce.calibration.statistics import LayerStatistics, TaylorStatistics
from keyreduce.calibration.taylor import differentiating
from keyreduce.families import Family
from keyreduce.models.loading import LoadedModel
from keyreduce.models.offloading import device_of, read_parameter
from keyreduce.models.operators import operands, replaced_operators, writing_strength


@torch.no_grad()
def collect(
    loaded: LoadedModel,
    batches: Iterable[torch.Tensor],
    progress: Callable[[int], None] | None = None,
    *,
    gradients: bool = False,
    add: Callable[[torch.Tensor], object] = lambda tensor: None,
    partial_sums: PartialSums | None = None,
) -> tuple[dict[int, LayerStatistics], int]:
    """Run batches of tokens through a model and gather the statistics of its mixers.

    Args:
        batches: LongTensors ``[B, T]`` without padding.
        progress: called after each batch with its number of tokens.
        gradients: whether to gather ``TaylorStatistics`` too, from the same forward passes.
        add: sums a tensor over all processes, in place, if the batches are distributed. Gradients need it before the
            end, since not all of their statistics are sums over rows.
        partial_sums: keeps the sums every so often; batches that an earlier run has added already are passed over.

    Returns:
        Layer number -> statistics, on the CPU, and the number of tokens.

    Raises:
        KeyreduceError: with ``gradients``, a row has only one token, or its loss is NaN or inf.
    """
    model = loaded.model

    def forward(tokens_BT: torch.Tensor) -> None:
        # Without the language-model head, whose output no statistic needs.
        model.base_model(input_ids=tokens_BT, use_cache=False)

    with watching(model, loaded.family, loaded.folder) as layers, contextlib.ExitStack() as stack:
        run, gradient_sums = forward, {}
        if gradients:
            taylor = {}
            for layer, sizes in loaded.family.layer_sizes(model.config.to_dict()).items():
                taylor[layer] = TaylorStatistics.zeros(sizes, layers[layer].input_square_D.device)
                layers[layer].taylor = taylor[layer]
            taken = differentiating(model, loaded.family, taylor, loaded.folder, add)
            run, gradient_sums = stack.enter_context(taken)
        sums = {f"layers.{layer}.{name}": one for layer in layers for name, one in layers[layer].running().items()}
        sums |= {f"gradients.{name}": one for name, one in gradient_sums.items()}
        done, tokens = partial_sums.restore(sums) if partial_sums else (0, 0)
        if progress is not None and tokens:
            progress(tokens)
        for number, tokens_BT in enumerate(islice(batches, done, None), done + 1):
            run(tokens_BT.to(model.device))
            tokens += tokens_BT.numel()
            if progress is not None:
                progress(tokens_BT.numel())
            if partial_sums is not None:
                partial_sums.keep_if_due(sums, number, tokens)
    return {layer: statistics.on_cpu() for layer, statistics in layers.items()}, tokens


@contextlib.contextmanager
def watching(
    model: PreTrainedModel, family: Family, folder: Path | None = None
) -> Iterator[dict[int, LayerStatistics]]:
    """While the block runs, every forward pass of ``model`` adds to the yielded statistics: layer number -> statistics.

    Passes that build a graph for gradients add nothing, since they repeat a pass that did. ``output_energy_W`` is
    computed when the block ends; weights that are offloaded to the disk are then read from ``folder``, the checkpoint.
    """
    config = model.config.to_dict()
    hidden = family.width(config)
    mixers = {layer: model.get_submodule(family.mixer.format(layer=layer)) for layer in family.mixer_layers(config)}
    layers = {
        layer: LayerStatistics.zeros(hidden, sizes, device_of(mixers[layer]))
        for layer, sizes in family.layer_sizes(config).items()
    }
    output_names = {layer: projection_name(family, layer, "output") for layer in layers}
    running: list[LayerStatistics] = []

    def before_mixer(statistics: LayerStatistics, mixer, args, kwargs) -> None:
        running[:] = [] if torch.is_grad_enabled() else [statistics]
        if running:
            statistics.add_input(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def before_output(statistics: LayerStatistics, projection, args) -> None:
        if running:
            statistics.add_output(args[0])

    def watched(operator):
        def call(*args, **kwargs):
            if not running:
                return operator(*args, **kwargs)
            running[0].add_operands(*operands(args, kwargs)[:2])
            # Preconditioned operators return more than one state, of which the first is the associative memory.
            output_BTWV, *states = operator(*args, **kwargs | {"output_final_state": True})
            running[0].add_readout(output_BTWV, writing_strength(args, kwargs), states[0])
            return output_BTWV, *(states if kwargs.get("output_final_state") else [None] * len(states))

        return call

    with contextlib.ExitStack() as undo:
        for layer, statistics in layers.items():
            at_mixer, at_output = partial(before_mixer, statistics), partial(before_output, statistics)
            undo.enter_context(mixers[layer].register_forward_pre_hook(at_mixer, with_kwargs=True))
            projection = model.get_submodule(output_names[layer].rpartition(".")[0])
            undo.enter_context(projection.register_forward_pre_hook(at_output))
        undo.enter_context(replaced_operators(family, mixers.values(), watched))
        yield layers
        for layer, statistics in layers.items():
            weight = read_parameter(model, output_names[layer], folder)
            statistics.weigh_output(weight.to(statistics.output_gram_WVV.device))
