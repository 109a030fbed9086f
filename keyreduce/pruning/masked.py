"""Whether a pruned checkpoint computes what it should: the dense model, with what was dropped masked to zero.

The dense model gets zeros in place of dropped channels where its delta-rule operator takes them: after convolution
and activation. The value channels of dropped heads are zero. Where queries and keys were projected, the dense model
gets the projected weights in the first channels of each head, since nothing between projection and operator need
commute with the projection; the other channels are masked. Where value channels go, the norm's weight and
``sqrt(V / S)`` are folded into the dense output projection too, and rounded as the cut one's are; its norm's weight is
``sqrt(S / V)``. So the two models hold the same numbers, and differ by the order in which float32 adds them.

The operator scales q by ``K ** -0.5``, and the output norm divides by the root mean square over V channels. The cut
model has R key and S value channels, and is to have ``eps K V / (R S)`` for the norm's eps to weigh as in the dense
one: with that the two are equal, rounding aside.

Shapes: B rows, T tokens, G heads of C channels, H key heads, K key and V value channels of a head, R kept, N anything.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError, reason
from keyreduce.families import Family, Part, family_of
from keyreduce.families.axes import parts_of
from keyreduce.families.layout import places
from keyreduce.models.loading import prepare_backend
from keyreduce.models.meta import language_model
from keyreduce.models.operators import operands, replaced_by_layer
from keyreduce.pruning.edits import Narrow, layer_edits
from keyreduce.pruning.plan import LayerCut, Plan

# The second is longer than what fla leaves to its recurrent operator.
TOKENS = (32, 96)
_ROWS = 2
# In float32. Measured with shipped models: below 1e-5 where all is right, above 0.04 where two channels are swapped.
_TOLERANCE = 1e-3


def check_logits(
    source: Checkpoint, pruned: Path, plan: Plan, *, device: torch.device, seed: int = 0
) -> float:
    """Refuse a pruned checkpoint that does not compute what the masked dense model does.

    The tolerance is 1e-3 of the logits' standard deviation: both models hold the same numbers, whatever dtype they were
    rounded to, and run in float32.

    Args:
        source: the checkpoint that was pruned.
        pruned: the folder that was made of it.
        plan: what was to stay.
        device: what to run on.
        seed: of the tokens.

    Returns:
        The largest difference, as :func:`compare_logits`.

    Raises:
        KeyreduceError: they differ by more, or one of them does not load.
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
        source: the checkpoint that was pruned.
        pruned: the folder that was made of it.
        plan: what was to stay.
        device: what to run on.
        dtype: what to compute in.
        tokens: how many tokens a row has, of one batch after another.
        seed: of the tokens.

    Returns:
        The largest difference of logits, as a share of their standard deviation; NaN if any logit is.

    Raises:
        KeyreduceError: one of them does not load.
    """
    family, cut = family_of(source.config, source.tensors), open_folder(pruned)
    # PyTorch's operators take float32 on any device, where fla's kernels do not.
    prepare_backend(device, gradients=True)
    model = _load(cut.config, _read_all(cut), device, dtype, pruned)
    _match_eps(model, plan)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randint(model.config.vocab_size, (_ROWS, length), generator=generator).to(device) for length in tokens
    ]
    found = [model(batch, use_cache=False).logits.cpu() for batch in batches]
    del model
    weights = _read_all(source)
    _project(weights, family, plan)
    unit = _fold(weights, family, plan)
    _narrow(weights, source, family, plan)
    # What was cast on the way is compared with what was cast alike.
    weights = {
        name: tensor.to(cut.read(name).dtype) if name in cut.tensors and name not in unit else tensor
        for name, tensor in weights.items()
    }
    model = _load(source.config, weights, device, dtype, source.path)
    with _masking(model, plan):
        expected = [model(batch, use_cache=False).logits.cpu() for batch in batches]
    worst = [((one - other).abs().max() / other.std()) for one, other in zip(found, expected, strict=True)]
    return float(torch.stack(worst).max())  # of torch, which passes NaN on


def _read_all(source: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.tensors}


def _load(
    config: Mapping, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype, path: Path
) -> PreTrainedModel:
    """Build a model around weights; a tokenizer it does not need."""
    try:
        model_class, their_config = language_model(config)
        model, report = model_class.from_pretrained(
            None, config=their_config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
        # Some parameters of fla's mixers stay in float32 unless told.
        model = model.to(device=device, dtype=dtype).eval()
    except Exception as error:
        raise KeyreduceError(f"{path} does not load: {reason(error)}") from error
    if report["missing_keys"]:
        raise KeyreduceError(f"{path} has no tensor {min(report['missing_keys'])!r}, which its config.json asks for")
    return model


def _match_eps(model: PreTrainedModel, plan: Plan) -> None:
    family = family_of(model.config.to_dict())
    for layer, cut in plan.layers.items():
        mixer = model.get_submodule(family.mixer.format(layer=layer))
        for name, axes in family.tensors.items():
            norm = getattr(mixer, name.split(".")[0], None)
            if Part.SHARED_VALUE in axes and norm is not None:
                before, after = cut.before, cut.after
                field = "eps" if hasattr(norm, "eps") else "variance_epsilon"
                ratio = before.head_k_dim * before.head_v_dim / (after.head_k_dim * after.head_v_dim)
                setattr(norm, field, getattr(norm, field) * ratio)


def _project(weights: dict[str, torch.Tensor], family: Family, plan: Plan) -> None:
    """Put projected rows into the first channels of each head, in float32 or better, then rounded as the file's."""
    for layer, cut in plan.layers.items():
        if cut.projection_HKR is None:
            continue
        for short_name, axes in family.tensors.items():
            name = family.tensor_name(layer, short_name)
            if name not in weights or {Part.QUERY, Part.KEY}.isdisjoint(parts_of(axes[0])):
                continue
            old, new = weights[name], weights[name].clone()
            wide = torch.promote_types(old.dtype, torch.float32)
            for part, place_P in places(axes[0], cut.before.lengths, cut.before.key_heads):
                if part not in (Part.QUERY, Part.KEY):
                    continue
                rows_HKN = old[place_P].to(wide).reshape(cut.before.key_heads, cut.before.head_k_dim, -1)
                new_HKN = torch.zeros_like(rows_HKN)
                for place, head in enumerate(cut.heads_H.tolist()):
                    basis_KR = cut.projection_HKR[place].to(wide)
                    basis_KR = basis_KR.square() if Part.OTHER in axes else basis_KR
                    new_HKN[head, : basis_KR.shape[1]] = basis_KR.T @ rows_HKN[head]
                new[place_P] = new_HKN.reshape(len(place_P), *old.shape[1:]).to(old.dtype)
            weights[name] = new


def _narrow(weights: dict[str, torch.Tensor], source: Checkpoint, family: Family, plan: Plan) -> None:
    """Give bottlenecks the rank of the cut one's, with zeros in the place of the rest."""
    shapes = {name: spec.shape for name, spec in source.tensors.items()}
    for layer, cut in plan.layers.items():
        for name, edits in layer_edits(family, layer, cut, shapes, source.read).items():
            for edit in edits:
                if isinstance(edit, Narrow):
                    rows = edit.rows_N if edit.is_outer else slice(None)
                    narrowed = edit.apply(weights[name][rows])
                    weights[name] = torch.zeros_like(weights[name])
                    places = (rows, slice(edit.rank)) if edit.is_outer else (slice(edit.rank), slice(None))
                    weights[name][places] = narrowed


def _fold(weights: dict[str, torch.Tensor], family: Family, plan: Plan) -> set[str]:
    """Move the output norms' weights into the columns after them, with the rounding of the cut model's.

    Returns:
        The names of those norms' weights, which are not to be rounded.
    """
    unit = set()
    for layer, cut in plan.layers.items():
        V, S = cut.before.head_v_dim, cut.after.head_v_dim
        tensors = {family.tensor_name(layer, name): parts for name, parts in family.tensors.items()}
        norms = [name for name, parts in tensors.items() if Part.SHARED_VALUE in parts and name in weights]
        if V == S:
            continue
        for norm in norms:
            factor_N = (weights[norm].double() * (V / S) ** 0.5).repeat(cut.before.value_heads)
            for name, parts in tensors.items():
                if name in weights and parts[-1] is Part.VALUE and len(parts) == 2:
                    old = weights[name]
                    wide = torch.promote_types(old.dtype, torch.float32)
                    weights[name] = (old.to(wide) * factor_N.to(wide)).to(old.dtype)
            weights[norm] = torch.full((V,), (S / V) ** 0.5, dtype=torch.float64)
            unit.add(norm)
    return unit


@contextlib.contextmanager
def _masking(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Let the operators of a dense model see zeros where the cut one has nothing."""
    family = family_of(model.config.to_dict())
    masks = {
        layer: tuple(mask.to(_weight(model, family, layer)) for mask in _masks(cut))
        for layer, cut in plan.layers.items()
    }
    sums_keys = model.config.to_dict().get("qk_norm") == "sum"

    def normed(operand_BTGC: torch.Tensor) -> torch.Tensor:
        # This norm comes before the operator, and of the channels that stay alone it is another one.
        return torch.nn.functional.normalize(operand_BTGC, p=1, dim=-1, eps=1e-6) if sums_keys else operand_BTGC

    def masked(operator, layer):
        def call(*args, **kwargs):
            key_GC, value_GC = masks[layer()]
            q, k, v = operands(args, kwargs)
            # transformers 5.21 gives queries and keys once for each value head, 5.23 does not.
            key_GC = key_GC.repeat_interleave(q.shape[2] // len(key_GC), dim=0)
            q, k, v = normed(q * key_GC), normed(k * key_GC), v * value_GC
            return operator(q, k, v, *args[3:], **{name: kwargs[name] for name in kwargs if name not in "qkv"})

        return call

    with replaced_by_layer(model, family, plan.layers, masked):
        yield


def _weight(model: PreTrainedModel, family: Family, layer: int) -> torch.Tensor:
    """A weight of a layer's mixer, of its dtype and on its device."""
    return next(model.get_submodule(family.mixer.format(layer=layer)).parameters())


def _masks(cut: LayerCut) -> tuple[torch.Tensor, torch.Tensor]:
    """Ones where key channels ``[H, K]`` and value channels ``[W, V]`` stay, zeros elsewhere."""
    sizes = cut.before
    key_HK, value_WV = (
        torch.zeros(sizes.key_heads, sizes.head_k_dim),
        torch.zeros(sizes.value_heads, sizes.head_v_dim),
    )
    if cut.projection_HKR is None:
        key_HK[cut.heads_H[:, None], cut.key_HR] = 1
    else:
        key_HK[cut.heads_H, : cut.after.head_k_dim] = 1
    value_WV[cut.value_heads_W[:, None], cut.value_WR] = 1
    return key_HK, value_WV
