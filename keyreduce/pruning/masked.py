"""Check that a pruned checkpoint computes what it should: what the dense model with masked channels computes.

The weights of the masked dense model are those of each edit's :meth:`keyreduce.pruning.edits.MixerEdit.masked`,
so that both models hold the same numbers, rounding included, and their logits differ only by the order in which float32
adds. Its delta-rule operators get zeros in place of dropped channels: after convolution and activation, with which a
projection need not commute. The value channels of dropped heads are zero too.

The operator scales q by ``K ** -0.5``, and the output norm divides by the root mean square over V channels. In the
pruned model, with R key and S value channels, the norm's eps is multiplied by ``K V / (R S)``, for it to weigh as much
as in the dense one.

Shapes: B rows, T tokens, G heads of C channels, H key heads, W value heads, K key and V value channels of a head.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.shards import torch_dtypes
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError, reason
from keyreduce.families import Part
from keyreduce.models.classes import family_in, from_pretrained, outputs_of, vocabulary_of
from keyreduce.models.loading import prepare_backend
from keyreduce.models.meta import language_model
from keyreduce.models.operators import operands, replaced_by_layer
from keyreduce.pruning.edits import Fill
from keyreduce.pruning.plan import LayerCut, Plan
from keyreduce.pruning.prune import plan_edits

# fla gives sequences of up to 64 tokens to its recurrent operators, and longer ones to its chunked ones.
TOKENS = (32, 96)
_ROWS = 2
# In float32. Measured with the shipped models: below 1e-5 if all is right, above 0.04 if two channels are swapped.
_TOLERANCE = 1e-3


def check_logits(source: Checkpoint, pruned: Path, plan: Plan, *, device: torch.device, seed: int = 0) -> float:
    """Refuse a pruned checkpoint that does not compute what the masked dense model does.

    Both models run in float32 and hold the same numbers, whatever dtype these were rounded to, so that the tolerance
    is 1e-3 of the logits' standard deviation. Returns the largest difference, as :func:`compare_logits` does.

    Raises:
        KeyreduceError: the logits differ by more, or a model does not load.
    """
    worst = compare_logits(source, pruned, plan, device=device, dtype=torch.float32, tokens=TOKENS, seed=seed)
    if not worst <= _TOLERANCE:
        raise KeyreduceError(
            f"the logits of {pruned} differ from those of the dense model with masked channels by {worst:.2g} of "
            f"their standard deviation, more than {_TOLERANCE:g}: do not use it, and report this"
        )
    return worst


@torch.no_grad()
def compare_logits(
    source: Checkpoint,
    pruned: Path,
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tokens: Sequence[int] = TOKENS,
    seed: int = 0,
) -> float:
    """Run the masked dense model and the pruned one, one after the other, on random tokens.

    Args:
        source, pruned, plan: the dense checkpoint, the folder of the pruned one, and the plan that leads to it.
        device, dtype: where, and in what, both models compute.
        tokens: for each batch, the number of tokens in a row.
        seed: the seed of the random tokens.

    Returns:
        The largest difference between logits, as a share of their standard deviation; NaN if any logit is NaN.

    Raises:
        KeyreduceError: a model does not load.
    """
    cut = open_folder(pruned)
    # PyTorch's operators take float32 on any device, where fla's kernels do not.
    prepare_backend(device, gradients=True)
    model = _load(cut.config, {name: cut.read(name) for name in cut.tensors}, device, dtype, pruned)
    _match_eps(model, plan)
    generator = torch.Generator().manual_seed(seed)
    shapes, vocabulary = [(_ROWS, length) for length in tokens], vocabulary_of(model)
    batches = [torch.randint(vocabulary, shape, generator=generator).to(device) for shape in shapes]
    found = [outputs_of(model, batch).cpu() for batch in batches]
    del model
    model = _load(source.config, _masked_weights(source, plan, cut), device, dtype, source.path)
    with _masking(model, plan):
        expected = [outputs_of(model, batch).cpu() for batch in batches]
    worst = [((one - other).abs().max() / other.std()) for one, other in zip(found, expected, strict=True)]
    return float(torch.stack(worst).max())  # torch's maximum, unlike Python's, is NaN where any entry is


def _load(
    config: Mapping, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype, path: Path
) -> PreTrainedModel:
    try:
        model_class, their_config = language_model(config)
        model, report = from_pretrained(model_class, None, config=their_config, state_dict=weights, dtype=dtype)
        # fla's mixers load some parameters in float32, whatever dtype is asked for.
        model = model.to(device=device, dtype=dtype).eval()
    except Exception as error:
        raise KeyreduceError(f"{path} does not load: {reason(error)}") from error
    if report["missing_keys"]:
        raise KeyreduceError(f"{path} has no tensor {min(report['missing_keys'])!r}, which its config.json asks for")
    return model


def _match_eps(model: PreTrainedModel, plan: Plan) -> None:
    family = family_in(model)
    for layer, cut in plan.layers.items():
        mixer = model.get_submodule(family.mixer.format(layer=layer))
        for name, axes in family.tensors.items():
            norm = getattr(mixer, name.split(".")[0], None)
            if Part.SHARED_VALUE in axes and norm is not None:
                field = "eps" if hasattr(norm, "eps") else "variance_epsilon"
                before, after = (sizes.head_k_dim * sizes.head_v_dim for sizes in (cut.before, cut.after))
                setattr(norm, field, getattr(norm, field) * (before / after))


def _masked_weights(source: Checkpoint, plan: Plan, cut: Checkpoint) -> dict[str, torch.Tensor]:
    edits, weights = plan_edits(source, plan), {}
    for name in source.tensors:
        tensor, changes = source.read(name), edits.get(name, ())
        for edit in changes:
            tensor = edit.masked(tensor)
        # Weights that were cast to another dtype in the pruned checkpoint are rounded alike.
        rounded = name in cut.tensors and not any(isinstance(edit, Fill) for edit in changes)
        weights[name] = tensor.to(torch_dtypes()[cut.tensors[name].dtype]) if rounded else tensor
    return weights


@contextlib.contextmanager
def _masking(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """While the block runs, the operators of a dense model get zeros in place of dropped channels."""
    family, masks = family_in(model), {}
    for layer, cut in plan.layers.items():
        weight = next(model.get_submodule(family.mixer.format(layer=layer)).parameters())
        masks[layer] = [mask.to(weight) for mask in _masks(cut)]
    sums_keys = family.language(model.config.to_dict()).get("qk_norm") == "sum"

    def normed(operand_BTGC: torch.Tensor) -> torch.Tensor:
        # This norm is applied before the operator, and has to be taken over the channels that stay alone.
        return torch.nn.functional.normalize(operand_BTGC, p=1, dim=-1, eps=1e-6) if sums_keys else operand_BTGC

    def masked(operator, layer):
        def call(*args, **kwargs):
            key_GC, value_GC = masks[layer()]
            q, k, v = operands(args, kwargs)
            # transformers 5.21 repeats queries and keys for each value head, 5.23 does not.
            key_GC = key_GC.repeat_interleave(q.shape[2] // len(key_GC), dim=0)
            q, k, v = normed(q * key_GC), normed(k * key_GC), v * value_GC
            return operator(q, k, v, *args[3:], **{name: kwargs[name] for name in kwargs if name not in "qkv"})

        return call

    with replaced_by_layer(model, family, plan.layers, masked):
        yield


def _masks(cut: LayerCut) -> tuple[torch.Tensor, torch.Tensor]:
    """Ones where key channels ``[H, K]`` and value channels ``[W, V]`` stay, zeros elsewhere."""
    sizes = cut.before
    key_HK = torch.zeros(sizes.key_heads, sizes.head_k_dim)
    value_WV = torch.zeros(sizes.value_heads, sizes.head_v_dim)
    if cut.projection_HKR is None:
        key_HK[cut.heads_H[:, None], cut.key_HR] = 1
    else:
        key_HK[cut.heads_H, : cut.after.head_k_dim] = 1
    value_WV[cut.value_heads_W[:, None], cut.value_WR] = 1
    return key_HK, value_WV
