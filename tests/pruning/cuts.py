"""Random models, random cuts, and the dense model that computes what a cut one should: channels masked to zero.

Shapes: H key heads, W value heads, K key channels and V value channels of a head, R kept; G groups of C channels.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from fla.modules import ShortConvolution
from hypothesis import strategies as st
from tiny_models import FAMILIES as MODELS
from tiny_models import tensors_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from keyreduce.api.prune import PruneRequest
from keyreduce.calibration.statistics import LayerStatistics, Statistics, TaylorStatistics
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import FAMILIES, MixerSizes, family_of
from keyreduce.pruning.budget import SIZE_OF, Budget
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.plan import LayerCut, Plan
from keyreduce.pruning.planning import make_plan
from keyreduce.pruning.prune import write_pruned

HIDDEN = 16
KEY_NORMS = st.sampled_from(["l2", "sum"])
ACTIVATIONS = st.sampled_from(["silu", "relu", "elu", "identity"])
FLAG = st.booleans()


@st.composite
def configs(draw, model_type: str, *, short_conv: st.SearchStrategy = FLAG, **fixed) -> dict:
    """Changes to a tiny config: sizes of any kind, and every option that reaches the mixers."""
    heads, key, value = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    layers = draw(st.integers(1, 3))
    config = dict(
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_heads=heads,
        num_hidden_layers=layers,
        use_gate=draw(FLAG),
        use_short_conv=draw(short_conv),
        allow_neg_eigval=draw(FLAG),
        tie_word_embeddings=draw(FLAG),
        norm_eps=1e-5,
    )
    if layers > 1 and draw(FLAG):
        softmax = draw(st.sets(st.integers(0, layers - 1), min_size=1, max_size=layers - 1))
        config["attn"] = {"layers": sorted(softmax), "num_heads": 2, "num_kv_heads": draw(st.sampled_from([1, 2]))}
    if model_type == "gated_deltanet":
        group = draw(st.integers(1, 3))
        config |= dict(head_dim=key, num_v_heads=draw(st.sampled_from([None, heads])) if group == 1 else group * heads)
        config["expand_v"] = FAMILIES[model_type].resized(
            config | {"expand_v": 1}, {0: MixerSizes(heads, group * heads, key, value)}
        )["expand_v"]
        return config | dict(output_gate_activation=draw(st.sampled_from(["swish", "sigmoid"]))) | fixed
    config |= dict(expand_k=heads * key / HIDDEN, expand_v=heads * value / HIDDEN)
    config |= dict(use_beta=draw(FLAG), qk_norm=draw(KEY_NORMS), qk_activation=draw(ACTIVATIONS))
    if model_type == "delta_net_2":
        shift = draw(FLAG)
        config |= dict(per_head_conv=draw(FLAG), share_kv_conv=draw(FLAG), shift_only_conv=shift)
        config["conv_scaled_shift"] = shift and draw(FLAG)
        if draw(FLAG):
            ranks = draw(st.lists(st.integers(1, 8), min_size=layers, max_size=layers))
            config["expand_k"] = [heads * rank / HIDDEN for rank in ranks]
    return config | fixed


def build(model_type: str, config: Mapping, *, seed: int = 0, conv_bias: bool = False) -> PreTrainedModel:
    """Return a random float64 model of which no parameter is trivial; fla's configs cannot say ``conv_bias``."""
    model_class, config_class, sizes = MODELS[model_type]
    torch.manual_seed(seed)
    model = model_class(config_class(**sizes | dict(config))).eval()
    if conv_bias:
        add_biases(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("scale"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.uniform_(-1, 1)
    # Numbers of float32, since as such fla's models load some of them, whatever their dtype.
    return model.double()


def add_biases(model: PreTrainedModel) -> None:
    """Put convolutions with a bias in the places of those without."""
    for layer in model.model.layers:
        for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
            old = getattr(layer.attn, name)
            new = ShortConvolution(old.hidden_size, old.kernel_size[0], bias=True, activation=old.activation)
            new.weight = old.weight
            setattr(layer.attn, name, new.to(old.weight))
        layer.attn.conv_bias = True


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder, for tests of which each runs many times."""
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


def store(model: PreTrainedModel, path: Path, **options) -> Checkpoint:
    """Save a model as it is and open its folder."""
    model.save_pretrained(path, **options)
    return open_folder(path)


def load(path: Path, dtype: torch.dtype = torch.float64, *, eps: float | None = None) -> PreTrainedModel:
    """Load a folder; ``eps`` takes the place of that of the mixers' output norms."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except ValueError:  # a larger model that is in no list of causal language models
        model = getattr(transformers, config_of(path)["architectures"][0]).from_pretrained(path, dtype=dtype)
    # Some parameters of fla's mixers stay in float32 unless told.
    model = model.to(dtype).eval()
    if eps is not None:
        set_eps(model, eps)
    return model


def load_with_biases(path: Path) -> PreTrainedModel:
    """Load a folder whose convolutions have biases."""
    model = load(path)
    add_biases(model)
    model.load_state_dict(tensors_of(path))
    return model


def set_eps(model: PreTrainedModel, eps: float) -> None:
    """Change the eps of the mixers' output norms."""
    family = family_of(model.config.to_dict(), dict(model.named_parameters()))
    for layer in family.mixer_layers(model.config.to_dict()):
        mixer = model.get_submodule(family.mixer.format(layer=layer))
        norm = getattr(mixer, "o_norm", getattr(mixer, "norm", None))
        if norm is not None:
            setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", eps)


def statistics_of(source: Checkpoint, *, seed: int = 0, tokens: int = 40) -> Statistics:
    """Return sums over random activations, which no model ever had."""
    family = family_of(source.config)
    width = family.width(source.config)
    layers = {
        layer: layer_statistics(sizes, width, seed=100 * seed + layer, tokens=tokens)
        for layer, sizes in family.layer_sizes(source.config).items()
    }
    return Statistics(source.identity, tokens, layers, {})


def layer_statistics(sizes: MixerSizes, hidden: int, *, seed: int = 0, tokens: int = 40) -> LayerStatistics:
    """The same for one layer: Gram matrices are those of random rows, the rest is random."""
    generator = torch.Generator().manual_seed(seed)
    size_of = dict(zip("HWKV", sizes, strict=True)) | {"D": hidden}

    def sums(name: str) -> torch.Tensor:
        *outer, last = (size_of[axis] for axis in name.rsplit("_", 1)[1])
        if "gram" in name:
            rows_GTC = torch.randn(outer[0], tokens, last, generator=generator, dtype=torch.float64)
            rows_GTC *= torch.rand(last, generator=generator, dtype=torch.float64) + 0.1
            return rows_GTC.mT @ rows_GTC
        drawn = torch.randn(*outer, last, generator=generator, dtype=torch.float64)
        return drawn if "signed" in name else drawn.abs()

    def all_sums(kind: type) -> dict[str, torch.Tensor]:
        return {field.name: sums(field.name) for field in dataclasses.fields(kind) if field.default is not None}

    return LayerStatistics(**all_sums(LayerStatistics), taylor=TaylorStatistics(**all_sums(TaylorStatistics)))


def plan_of(source: Checkpoint, numbers: Mapping[str, int | Mapping[int, int]], method="random", **options) -> Plan:
    """Let a method choose; a number is for all layers."""
    layers = family_of(source.config).layer_sizes(source.config)
    keep = {
        target: number if isinstance(number, Mapping) else dict.fromkeys(layers, number)
        for target, number in numbers.items()
    }
    statistics = statistics_of(source) if METHODS[method].needs_statistics else None
    inputs = {"source": source.identity, "method": method, "targets": list(keep)}
    return make_plan(source, METHODS[method], keep, seed=3, statistics=statistics, inputs=inputs, options=options)


def cut(source: Checkpoint, plan: Plan, target: Path) -> Path:
    """Write what a plan leaves, and return the folder."""
    write_pruned(source, plan, target, dense=str(source.path))
    return target


@st.composite
def numbers(draw, source: Checkpoint, targets: tuple[str, ...]) -> dict[str, dict[int, int]]:
    """How many stay: target -> layer -> number, the same for all layers where the config must say one."""
    family = family_of(source.config)
    layers = family.layer_sizes(source.config)
    chosen = {}
    for target in targets:
        name = SIZE_OF[target]
        if name in family.per_layer and draw(FLAG):
            chosen[target] = {layer: draw(st.integers(1, getattr(sizes, name))) for layer, sizes in layers.items()}
        else:
            least = min(getattr(sizes, name) for sizes in layers.values())
            chosen[target] = dict.fromkeys(layers, draw(st.integers(1, least)))
    return chosen


@contextlib.contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Let the dense model compute what the cut one should, by what it gives to its operators.

    Where channels are dropped they are zero, after activation and before any norm; the value channels of dropped heads
    are zero; q and k are projected by ``P P^T`` where the plan projects.
    """
    family = family_of(model.config.to_dict(), dict(model.named_parameters()))
    mixers = {layer: model.get_submodule(family.mixer.format(layer=layer)) for layer in plan.layers}
    module = sys.modules[type(next(iter(mixers.values()))).forward.__module__]
    running: list[int] = []
    places = [(module, name) for name in (*family.operators, "sum_norm") if hasattr(module, name)]
    # Mixers of transformers up to 5.14 hold their operators.
    held = {name.removeprefix("torch_") for name in family.operators}
    places += [(mixer, name) for mixer in mixers.values() for name in held & vars(mixer).keys()]
    before = [getattr(holder, name) for holder, name in places]

    def mask(operand: torch.Tensor, what: str) -> torch.Tensor:
        return on_operand(plan.layers[running[-1]], what, operand)

    def operator(original: Callable):
        def call(*args, **rest):
            # fla's layers name the operands, those of transformers do not.
            q, k, v = args or (rest.pop("q"), rest.pop("k"), rest.pop("v"))
            return original(mask(q, "key"), mask(k, "key"), mask(v, "value"), **rest)

        return call

    def norm(original: Callable):
        return lambda x: original(mask(x, "key"))

    hooks = [
        mixer.register_forward_pre_hook(lambda *_, layer=layer: running.append(layer))
        for layer, mixer in mixers.items()
    ]
    try:
        for (holder, name), function in zip(places, before, strict=True):
            setattr(holder, name, (norm if name == "sum_norm" else operator)(function))
        yield
    finally:
        for (holder, name), function in zip(places, before, strict=True):
            setattr(holder, name, function)
        for hook in hooks:
            hook.remove()


def on_operand(layer_cut: LayerCut, what: str, operand: torch.Tensor) -> torch.Tensor:
    """Return q, k or v, ``[B, T, G, C]``, with what is dropped at zero.

    q and k may also come once for each value head: transformers 5.21 gives them so, 5.23 does not.
    """
    mask_GC = torch.zeros(operand.shape[2:], dtype=operand.dtype)
    if what == "value":
        group = layer_cut.before.value_heads // layer_cut.before.key_heads
        for place, head in enumerate(layer_cut.heads_H.tolist()):
            for member in range(group):
                mask_GC[head * group + member, layer_cut.value_WR[place * group + member]] = 1
        return operand * mask_GC
    times = operand.shape[2] // layer_cut.before.key_heads
    if times > 1:
        one = on_operand(layer_cut, what, operand[:, :, ::times])
        return one.repeat_interleave(times, dim=2)
    if layer_cut.projection_HKR is not None:
        projected = torch.zeros_like(operand)
        for place, head in enumerate(layer_cut.heads_H.tolist()):
            basis_KR = layer_cut.projection_HKR[place].to(operand)
            projected[:, :, head] = operand[:, :, head] @ basis_KR @ basis_KR.T
        return projected
    for place, head in enumerate(layer_cut.heads_H.tolist()):
        mask_GC[head, layer_cut.key_HR[place]] = 1
    return operand * mask_GC


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare logits relative to their scale."""
    assert found.shape == expected.shape
    worst = (found - expected).abs().max() / expected.abs().max()
    assert worst <= tolerance, f"{worst:.2e} of the logits' scale"


def config_of(path: Path) -> dict:
    """Return what config.json says."""
    return json.loads((path / "config.json").read_text())


def budget_of(target: str = "key", **options) -> Budget:
    """The budget of what a user writes, read as the command line's request reads it."""
    request = PruneRequest(target=target, **options)
    amounts = {name: getattr(request, name) for name in ("ratio", "keep", "variance", "allocate", "multiple_of")}
    return Budget.of(request.target, **amounts)
