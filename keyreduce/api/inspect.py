"""A model's config and headers to what its state costs, what each cut would save, and how engines would serve it."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keyreduce.api import options
from keyreduce.api.request import Request, Result, option
from keyreduce.errors import UnknownArchitecture
from keyreduce.reporting import Reporter
from keyreduce.serving.capacity import CacheDtype, CacheLayout, PoolEngine
from keyreduce.versions import generation_note

if TYPE_CHECKING:
    from keyreduce.checkpoint.headers import Headers
    from keyreduce.families import Family, MixerSizes

_SERVING = {"panel": "Serving"}
_POOLS: tuple[PoolEngine, ...] = ("vllm", "sglang")
# Beyond this many times the length at which keys and values take as much as the state, half a state admits less than a
# tenth more sequences: (S + kT) / (S / 2 + kT) < 1.1 where kT > 4.5 S.
_LITTLE_GAIN = 4.5


@dataclass(frozen=True, kw_only=True)
class InspectRequest(Request):
    """Say what a model's recurrent state costs, what each cut would save, and which engines run it.

    Only config.json and the headers of the weights are read, in under a second; of a model on the hub they are fetched
    and no weights are.
    """

    model: str | None = options.model(is_argument=True)
    config: Path | None = options.config()
    tokens: int = option(4096, "The length of a sequence, prompt and answer.", **options.COUNT)
    state_dtype: CacheDtype | None = option(
        None, "What the recurrent state is kept in.", shown_default="float32, and for engines what each takes itself"
    )
    gpu_memory: str | None = option(
        None,
        "Memory of one GPU: 80GB or 79.6GiB. With it, the sequences that fit are counted.",
        metavar="SIZE",
        shown_default="not counted",
        **_SERVING,
    )
    gpus: int = option(1, "GPUs that share each layer.", minimum=1, maximum=1024, **_SERVING)
    reserve: str = option("4GB", "What activations and CUDA graphs take of each GPU.", metavar="SIZE", **_SERVING)
    prefix_caching: bool = option(
        False, "Write the commands for prefix caching, with which a sequence holds several states.", **_SERVING
    )


@dataclass(frozen=True, kw_only=True)
class InspectResult(Result):
    """What is known of a model without its weights. Bytes of a sequence are those of all layers and GPUs together."""

    model: str  # by the name it was given.
    model_type: str
    pruned_from: str | None  # the dense model, where keyreduce pruned it.
    # how many layers there are of each kind.
    mixer_layers: int
    softmax_layers: int
    # sizes of the mixers; where layers differ, a list with an entry for each.
    key_heads: Any
    value_heads: Any
    head_k_dim: Any
    head_v_dim: Any
    convolution_taps: int  # 1 where there is no short convolution.
    softmax_numbers_per_token: int  # the numbers that all softmax layers together keep of a token.
    # the model's size: numbers in all tensors and in those of mixers, and bytes in the files.
    parameters: int
    mixer_parameters: int
    file_bytes: int
    # a sequence of so many tokens, with the recurrent state in this dtype and all else in 16 bits.
    tokens: int
    state_dtype: str
    state_bytes: int
    convolution_bytes: int
    softmax_bytes: int
    # from how many tokens on the keys and values take more than the state, and from how many on half a state admits
    # less than a tenth more sequences; None where no softmax layer grows.
    equal_from_tokens: int | None
    little_gain_from_tokens: int | None
    # for each engine: ``name``, whether it ``runs`` these sizes, its ``demand``, since which version it ``knows`` the
    # architecture (null: not looked up; empty: it does not), and the ``evidence``.
    engines: list[dict]
    # for each engine that divides memory among sequences, where ``gpu_memory`` was given: see ``_capacity``.
    capacity: list[dict]
    # for each candidate cut: sizes, what it saves, which engines run it, and its ``capacity``.
    cuts: list[dict]
    notes: list[str]  # what should be known before one of the figures is taken at its word.


def inspect(model: str | Path | None = None, **settings: Any) -> InspectResult:
    """Return what a model's config and headers say, as :func:`run` does; the settings are the request's fields."""
    return run(InspectRequest(model=None if model is None else str(model), **settings))


def run(request: InspectRequest, reporter: Reporter = Reporter()) -> InspectResult:
    """Return what a model's config and headers say.

    Raises:
        KeyreduceError: there is no such model, it is damaged or of no known architecture, its mixers have not the
            tensors that its config asks for, the memory is no amount of memory, or the engines cannot divide its heads
            among so many GPUs or keep states in the dtype.
    """
    from keyreduce.checkpoint.find import DEFAULT_MODEL
    from keyreduce.checkpoint.headers import read_headers
    from keyreduce.checkpoint.record import Record
    from keyreduce.families import MixerSizes, family_of
    from keyreduce.families.mixer_tensors import check_mixers
    from keyreduce.serving.candidates import candidates

    headers = read_headers(request.model, config=request.config)
    config, name = headers.config, request.model or DEFAULT_MODEL
    family = family_of(config, headers.tensors)
    with contextlib.suppress(UnknownArchitecture):  # of mixers that are quantised nothing can be said
        check_mixers(config, headers.shapes, headers.folder or Path(name))
    sizes, layout = family.layer_sizes(config), CacheLayout.of(config)
    counted = _Capacity.of(request, headers, family)
    dtype = request.state_dtype or "float32"
    equal = layout.tokens_of_equal_bytes(dtype)
    columns = {field: [getattr(one, field) for one in sizes.values()] for field in MixerSizes._fields}
    cuts = [_cut(request, counted, config, family, sizes, after) for after in candidates(family, sizes)]
    capacity = counted.of_sizes(config, None, name, 0)
    too_small = [
        f"{one['engine']}: not one sequence of {request.tokens:,} tokens fits beside the weights; take more memory"
        for one in capacity
        if not one["sequences"]
    ]
    return InspectResult(
        model=name,
        model_type=family.model_type,
        pruned_from=Record.read(headers.folder).dense if headers.folder else None,
        mixer_layers=len(layout.mixers),
        softmax_layers=len(layout.softmax),
        **{field: values[0] if len(set(values)) == 1 else values for field, values in columns.items()},
        convolution_taps=layout.taps,
        softmax_numbers_per_token=sum(layer.numbers_per_token for layer in layout.softmax),
        parameters=sum(math.prod(shape) for shape in headers.shapes.values()),
        mixer_parameters=_mixer_parameters(headers, family),
        file_bytes=sum(spec.nbytes for spec in headers.tensors.values()),
        tokens=request.tokens,
        state_dtype=dtype,
        state_bytes=layout.state_bytes(dtype),
        convolution_bytes=layout.convolution_bytes,
        softmax_bytes=layout.softmax_bytes(request.tokens),
        equal_from_tokens=equal,
        little_gain_from_tokens=None if equal is None else round(_LITTLE_GAIN * equal),
        engines=_engines(family, sizes, config),
        capacity=capacity,
        cuts=cuts,
        notes=too_small + _notes(request, family, layout, equal, bool(cuts)) + _plugin_notes(family, layout, cuts),
    )


@dataclass(frozen=True)
class _Capacity:
    """What is needed to count the sequences that fit; ``gpu_bytes`` is None where that was not asked for."""

    gpu_bytes: int | None
    reserve_bytes: int
    weight_bytes: int
    engines: tuple[PoolEngine, ...]
    request: InspectRequest

    @classmethod
    def of(cls, request: InspectRequest, headers: "Headers", family: "Family") -> "_Capacity":
        from keyreduce.serving.capacity import FURTHER_CACHES, parse_memory
        from keyreduce.serving.engines import NAMED

        gpu_bytes = None if request.gpu_memory is None else parse_memory(request.gpu_memory, "gpu_memory")
        # Engines serve in 16 bits what is stored in more; what is quantised stays.
        weights = sum(min(spec.bits, 16) * math.prod(spec.shape) // 8 for spec in headers.tensors.values())
        known: list[PoolEngine] = [name for name in _POOLS if family.model_type in (NAMED[name].knows or {})]
        if family.model_type in FURTHER_CACHES:
            known = []
        return cls(gpu_bytes, parse_memory(request.reserve, "reserve"), weights, tuple(known), request)

    def of_sizes(
        self, config: Mapping, after: "Mapping[int, MixerSizes] | None", model: str, fewer_parameters: int
    ) -> list[dict]:
        """Return for each engine what it makes of a model of these sizes; nothing where that was not asked for.

        That is: ``engine``, whether it ``runs`` the sizes, or does with the plugin alone (``needs_plugin``), the
        ``state_dtype``, the ``cache_bytes`` of one GPU, the ``sequences`` with the settings of the ``command``, those
        ``by_default`` and ``with_prefix_caching``.
        """
        from keyreduce.serving.capacity import cache_memory, state_dtype
        from keyreduce.serving.engines import runs
        from keyreduce.serving.launch import launch

        if self.gpu_bytes is None:
            return []
        layout, rows = CacheLayout.of(config, after), []
        for engine in self.engines:
            weights, gpus = self.weight_bytes - 2 * fewer_parameters, self.request.gpus
            memory = cache_memory(self.gpu_bytes, weights, engine, gpus=gpus, reserve_bytes=self.reserve_bytes)
            given = {"dtype": self.request.state_dtype, "gpus": gpus, "prefix_caching": self.request.prefix_caching}
            found = launch(engine, model, layout, memory, self.request.tokens, **given)
            is_run, with_plugin = (
                all(runs(name, layout.family, one, config) for one in layout.mixers) for name in (engine, "vllm-plugin")
            )
            row = {
                "engine": engine,
                "runs": is_run,
                "needs_plugin": engine == "vllm" and with_plugin and not is_run,
                "state_dtype": state_dtype(layout, engine, self.request.state_dtype),
                "cache_bytes": memory,
            }
            figures = found._asdict()
            del figures["engine"]
            rows.append(row | figures)
        return rows


def _cut(
    request: InspectRequest,
    counted: _Capacity,
    config: Mapping,
    family: "Family",
    before: "Mapping[int, MixerSizes]",
    after: "Mapping[int, MixerSizes]",
) -> dict:
    """Return a candidate: its sizes, its share of the state, bytes and parameters saved, engines, command, capacity."""
    from keyreduce.families.mixer_tensors import expected_tensors
    from keyreduce.serving.engines import NAMED, runs

    dtype, layouts = request.state_dtype or "float32", [CacheLayout.of(config, sizes) for sizes in (before, after)]
    dense, cut = (layout.state_bytes(dtype) + layout.convolution_bytes for layout in layouts)
    one, smaller = next(iter(after.values())), family.resized(config, after)
    numbers = [sum(math.prod(tensor.shape) for tensor in expected_tensors(each).values()) for each in (config, smaller)]
    keeps = {"key": one.head_k_dim, "value": one.head_v_dim}
    first = next(iter(before.values()))
    changed = {target: number for target, number in keeps.items() if number != getattr(first, f"head_{target[0]}_dim")}
    return {
        "head_k_dim": one.head_k_dim,
        "head_v_dim": one.head_v_dim,
        "state_share": layouts[1].state_bytes(dtype) / layouts[0].state_bytes(dtype),
        "state_bytes": layouts[1].state_bytes(dtype),
        "saved_bytes": dense - cut,
        "saved_parameters": numbers[0] - numbers[1],
        "engines": [name for name in NAMED if _can_be_asked(name, family) and runs(name, family, one, config)],
        "prune": f"--target {','.join(changed)} --keep {','.join(map(str, changed.values()))}",
        "capacity": counted.of_sizes(config, after, "PRUNED", numbers[0] - numbers[1]),
    }


def _mixer_parameters(headers: "Headers", family: "Family") -> int:
    mixers = tuple(family.tensor_name(layer, "") for layer in family.mixer_layers(headers.config))
    return sum(math.prod(shape) for name, shape in headers.shapes.items() if name.startswith(mixers))


def _can_be_asked(engine: str, family: "Family") -> bool:
    """Return whether an engine could have the architecture: transformers has its own alone."""
    return engine != "transformers" or family.shipped_by == "transformers"


def _engines(family: "Family", sizes: "Mapping[int, MixerSizes]", config: Mapping) -> list[dict]:
    from keyreduce.serving.engines import NAMED, runs

    rows = []
    for name, engine in NAMED.items():
        if not _can_be_asked(name, family):
            continue
        row = engine.row(family.model_type)
        rows.append(
            {
                "name": name,
                "runs": all(runs(name, family, one, config) for one in sizes.values()),
                "demand": row.demand,
                "knows": None if engine.knows is None else engine.knows.get(family.model_type, ""),
                "evidence": [one._asdict() for one in row.evidence],
            }
        )
    return rows


def _plugin_notes(family: "Family", layout: CacheLayout, cuts: list[dict]) -> list[str]:
    """Say what the plugin is, where it makes a difference."""
    from keyreduce.serving.engines import NAMED, needs_plugin

    is_needed = any(needs_plugin(family, one) for one in layout.mixers)
    if not is_needed and not any("vllm-plugin" in cut["engines"] and "vllm" not in cut["engines"] for cut in cuts):
        return []
    known = NAMED["vllm-plugin"].row(family.model_type).evidence[0]
    return [
        "vllm-plugin is vLLM with the plugin that it loads where keyreduce is installed beside it; that it runs these "
        f"sizes is known by: {known.how}, with {known.version}{f', {known.on}' if known.on else ''}"
    ]


def _notes(
    request: InspectRequest, family: "Family", layout: CacheLayout, equal: int | None, has_cuts: bool
) -> list[str]:
    from keyreduce.serving.capacity import FURTHER_CACHES
    from keyreduce.serving.engines import NAMED

    notes = []
    if equal is not None:
        much = round(_LITTLE_GAIN * equal)
        notes.append(
            f"from {equal:,} tokens on the keys and values of the {len(layout.softmax)} softmax layers take more than "
            f"the state; from {much:,} on half a state admits less than 10% more sequences"
        )
        if request.tokens >= much:
            notes.append(
                f"at {request.tokens:,} tokens the softmax layers dominate: pruning the state will not help here, "
                "smaller keys and values would (as with a cache in 8 bits)"
            )
    if not has_cuts:
        notes.append("its layers have different sizes, so that no candidate cuts are shown")
    further = FURTHER_CACHES.get(family.model_type)
    if request.gpu_memory is not None and further:
        notes.append(f"engines also keep {further}, whose arithmetic is not known here: no sequences are counted")
    elif request.gpu_memory is not None:
        for name in _POOLS:
            if family.model_type not in (NAMED[name].knows or {}):
                notes.append(f"{name} has no class for {family.model_type}: its sequences are not counted")
        notes.append(
            f"activations and CUDA graphs are taken to need {request.reserve} of each GPU (`reserve`); an engine "
            "measures them when it starts"
        )
        notes.append("SGLang's arithmetic was read in its 0.5.23 and not run; vLLM's is that of its 0.26.0")
    if note := generation_note(family.shipped_by):
        notes.append(note)
    return notes
