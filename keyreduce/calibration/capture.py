"""Watch a model's mixers while it runs, and add what they see to the running sums.

The operator's own arguments are taken, not the output of a projection or convolution: fla computes q, k and v in
different ways on different paths, but what reaches the delta-rule operator means the same on all of them.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

import torch

from keyreduce.calibration.statistics import LayerStatistics
from keyreduce.families import Family
from keyreduce.models.loading import LoadedModel


@torch.no_grad()
def collect(
    loaded: LoadedModel,
    batches: Iterable[torch.Tensor],
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[int, LayerStatistics], int]:
    """Run batches of tokens through a model and sum what its mixers see.

    Args:
        loaded: the model.
        batches: LongTensors ``[B, T]`` without padding.
        progress: called after each batch with its number of tokens.

    Returns:
        Layer number -> sums, and the number of tokens.
    """
    model, tokens = loaded.model, 0
    with watching(model, loaded.family) as layers:
        for tokens_BT in batches:
            # The decoder alone: what the head makes of its output is of no interest here.
            model.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)
            tokens += tokens_BT.numel()
            if progress is not None:
                progress(tokens_BT.numel())
    return layers, tokens


@contextlib.contextmanager
def watching(model: torch.nn.Module, family: Family) -> Iterator[dict[int, LayerStatistics]]:
    """While the block runs, every forward pass of ``model`` adds to the sums that are yielded, layer by layer."""
    config = model.config.to_dict()
    sizes, device = family.sizes(config), next(model.parameters()).device
    layers = {
        layer: LayerStatistics.zeros(config["hidden_size"], sizes.key_heads, sizes.head_k_dim, device)
        for layer in family.mixer_layers(config)
    }
    running: list[LayerStatistics] = []

    def before_mixer(statistics: LayerStatistics):
        def hook(mixer, args, kwargs):
            running[:] = [statistics]
            statistics.add_input(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return hook

    def watched(operator):
        def call(*args, **kwargs):
            running[0].add_operands(kwargs["q"], kwargs["k"])
            return operator(*args, **kwargs)

        return call

    with contextlib.ExitStack() as undo:
        modules = set()
        for layer, statistics in layers.items():
            mixer = model.get_submodule(family.mixer.format(layer=layer))
            undo.callback(mixer.register_forward_pre_hook(before_mixer(statistics), with_kwargs=True).remove)
            modules.add(sys.modules[type(mixer).__module__])
        for module in modules:
            for name in family.operators:
                original = getattr(module, name)
                undo.callback(setattr, module, name, original)
                setattr(module, name, watched(original))
        yield layers
