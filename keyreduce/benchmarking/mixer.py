"""How fast a delta-rule mixer layer is, and what it needs, in one model against others.

Shapes: B sequences, T tokens, D hidden.
"""

import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version

import torch

import keyreduce
from keyreduce.benchmarking.timing import interleave, peak_memory, ratio
from keyreduce.errors import KeyreduceError
from keyreduce.models.loading import LoadedModel


@torch.inference_mode()
def benchmark_mixers(
    models: Mapping[str, LoadedModel],
    *,
    batch_size: int,
    seq_len: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Time the first delta-rule mixer layer of each model on the same random hidden states, in turns.

    Args:
        models: label -> model; the first is the one that the others are compared with.
        batch_size: B.
        seq_len: T.
        rounds: timed calls of each mixer.
        seed: of the hidden states.
        progress: called with 1 after each round.

    Returns:
        A JSON object. ``settings`` says what was run on what. ``models`` has for each model its sizes, and:
        ``tokens_per_second``, of the median round; ``latency_seconds``, the median round and its 95% interval;
        ``peak_memory_bytes``, above weights and input; ``state_bytes_per_sequence``,
        of all layers of the model, in float32; ``mixer_parameters``, of the layer that was timed. For each model after
        the first also ``speedup``, its time into the first one's, round by round; ``memory_ratio`` and ``state_ratio``,
        its bytes into the first one's: 2 means half of it.

    Raises:
        KeyreduceError: models differ in hidden size, device or dtype, or one has no delta-rule layer.
    """
    first_label, first = next(iter(models.items()))
    for label, loaded in models.items():
        _check_alike(first_label, first, label, loaded)
    device, dtype = first.model.device, first.model.dtype
    layers = {label: _first_layer(loaded) for label, loaded in models.items()}
    mixers = {
        label: loaded.model.get_submodule(loaded.family.mixer.format(layer=layers[label]))
        for label, loaded in models.items()
    }
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(batch_size, seq_len, first.model.config.hidden_size, generator=generator)
    hidden_BTD = hidden_BTD.to(device, dtype)
    calls = {label: partial(mixer, hidden_states=hidden_BTD) for label, mixer in mixers.items()}
    timings = interleave(calls, device, rounds=rounds, progress=progress)
    entries = []
    for label, loaded in models.items():
        config, timing = loaded.model.config.to_dict(), timings[label]
        entry = {
            "label": label,
            "folder": str(loaded.folder),
            "layer": layers[label],
            **loaded.family.sizes(config, layers[label])._asdict(),
            "tokens_per_second": batch_size * seq_len / timing.median,
            "latency_seconds": _summary(timing.median, timing.interval),
            "peak_memory_bytes": peak_memory(calls[label], device),
            "state_bytes_per_sequence": loaded.family.state_bytes(config),
            "mixer_parameters": sum(parameter.numel() for parameter in mixers[label].parameters()),
        }
        if entries:
            dense = entries[0]
            entry["speedup"] = _summary(*ratio(timings[first_label], timing))
            entry["memory_ratio"] = dense["peak_memory_bytes"] / entry["peak_memory_bytes"]
            entry["state_ratio"] = dense["state_bytes_per_sequence"] / entry["state_bytes_per_sequence"]
        entries.append(entry)
    settings = {
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "seq_len": seq_len,
        "rounds": rounds,
        "seed": seed,
        "versions": {
            "keyreduce": keyreduce.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "flash-linear-attention")},
        },
    }
    return {"settings": settings, "models": entries}


def _check_alike(first_label: str, first: LoadedModel, label: str, loaded: LoadedModel) -> None:
    properties = {
        "hidden size": lambda model: model.config.hidden_size,
        "device": lambda model: model.device,
        "dtype": lambda model: model.dtype,
    }
    for name, read in properties.items():
        ours, theirs = read(first.model), read(loaded.model)
        if ours != theirs:
            raise KeyreduceError(
                f"{first_label} and {label} differ in {name} ({ours} and {theirs}), so their mixers cannot be compared "
                f"on the same input; give models of one {name}"
            )


def _first_layer(loaded: LoadedModel) -> int:
    layers = loaded.family.mixer_layers(loaded.model.config.to_dict())
    if not layers:
        raise KeyreduceError(f"{loaded.folder} has no delta-rule layer to time; give a model that has one")
    return layers[0]


def _summary(median: float, interval: tuple[float, float]) -> dict[str, float]:
    low, high = interval
    return {"median": median, "low": low, "high": high}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
