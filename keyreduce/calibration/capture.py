"""Watch a model's mixers while it runs, and add what they see to the running sums.

The operator's own arguments are taken, not the output of a projection or convolution: fla computes q, k and v in
different ways on different paths, but what reaches the delta-rule operator means the same on all of them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from keyreduce.calibration.projections import projection_name
from keyreduce.calibration.statistics import LayerStatistics, TaylorSums
from keyreduce.calibration.taylor import differentiating
from keyreduce.families import Family
from keyreduce.models.loading import LoadedModel
from keyreduce.models.offloading import device_of, read_parameter
from keyreduce.models.operators import operands, replaced_operators


@torch.no_grad()
def collect(
    loaded: LoadedModel,
    batches: Iterable[torch.Tensor],
    progress: Callable[[int], None] | None = None,
    *,
    gradients: bool = False,
    add: Callable[[torch.Tensor], object] = lambda sums: None,
) -> tuple[dict[int, LayerStatistics], int]:
    """Run batches of tokens through a model and sum what its mixers see.

    Args:
        loaded: the model.
        batches: LongTensors ``[B, T]`` without padding.
        progress: called after each batch with its number of tokens.
        gradients: also sum what the loss says (:class:`keyreduce.calibration.statistics.TaylorSums`), from the same
            forward passes.
        add: puts into a tensor what it comes to over all processes, where several share the batches out; used for what
            gradients give, which is no sum over rows.

    Returns:
        Layer number -> sums, on the CPU, and the number of tokens.

    Raises:
        KeyreduceError: with ``gradients``, a row has one token alone, or a loss that is NaN or inf.
    """
    model, tokens = loaded.model, 0

    def forward(tokens_BT: torch.Tensor) -> None:
        # The decoder alone: what the head makes of its output is of no interest here.
        model.base_model(input_ids=tokens_BT, use_cache=False)

    with watching(model, loaded.family, loaded.folder) as layers, contextlib.ExitStack() as stack:
        run = forward
        if gradients:
            for layer, sizes in loaded.family.layer_sizes(model.config.to_dict()).items():
                layers[layer].taylor = TaylorSums.zeros(sizes, layers[layer].input_square_D.device)
            taylor = {layer: statistics.taylor for layer, statistics in layers.items()}
            run = stack.enter_context(differentiating(model, loaded.family, taylor, loaded.folder, add))
        for tokens_BT in batches:
            run(tokens_BT.to(model.device))
            tokens += tokens_BT.numel()
            if progress is not None:
                progress(tokens_BT.numel())
    return {layer: LayerStatistics.of_tensors(sums.tensors()) for layer, sums in layers.items()}, tokens


@contextlib.contextmanager
def watching(
    model: torch.nn.Module, family: Family, folder: Path | None = None
) -> Iterator[dict[int, LayerStatistics]]:
    """While the block runs, every forward pass of ``model`` adds to the sums that are yielded, layer by layer.

    What builds a graph for gradients adds nothing: it repeats a pass that did. ``output_energy_W`` is there once the
    block has ended; for it weights that wait on the disk are read from ``folder``, the checkpoint.
    """
    config = model.config.to_dict()
    hidden = round(family.hidden.read(config))
    mixers = {layer: model.get_submodule(family.mixer.format(layer=layer)) for layer in family.mixer_layers(config)}
    layers = {
        layer: LayerStatistics.zeros(hidden, sizes, device_of(mixers[layer]))
        for layer, sizes in family.layer_sizes(config).items()
    }
    output_names = {layer: projection_name(family, layer, "output") for layer in layers}
    running: list[LayerStatistics] = []

    def before_mixer(statistics: LayerStatistics):
        def hook(mixer, args, kwargs):
            running[:] = [] if torch.is_grad_enabled() else [statistics]
            if running:
                statistics.add_input(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return hook

    def before_output(statistics: LayerStatistics):
        def hook(projection, args):
            if running:
                statistics.add_output(args[0])

        return hook

    def watched(operator):
        def call(*args, **kwargs):
            if running:
                running[0].add_operands(*operands(args, kwargs))
            return operator(*args, **kwargs)

        return call

    with contextlib.ExitStack() as undo:
        for layer, statistics in layers.items():
            hook = mixers[layer].register_forward_pre_hook(before_mixer(statistics), with_kwargs=True)
            undo.callback(hook.remove)
            projection = model.get_submodule(output_names[layer].rpartition(".")[0])
            undo.callback(projection.register_forward_pre_hook(before_output(statistics)).remove)
        undo.enter_context(replaced_operators(family, mixers.values(), watched))
        yield layers
        for layer, statistics in layers.items():
            weight = read_parameter(model, output_names[layer], folder)
            statistics.weigh_output(weight.to(statistics.output_gram_WVV.device))
