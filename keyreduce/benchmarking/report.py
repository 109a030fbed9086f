"""All measurements that were asked for, in one JSON object."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

import keyreduce
from keyreduce.benchmarking.ceilings import measure_ceilings
from keyreduce.benchmarking.decode import SCOPES, time_decoding
from keyreduce.benchmarking.forward import time_passes
from keyreduce.benchmarking.largest_batch import time_largest_batch
from keyreduce.benchmarking.subjects import Subject, memory_errors_told
from keyreduce.models.miscompiled import refuse_wrong_gradients

KINDS = ("mixer", "forward", "decode", "train_step")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        kinds: of `KINDS`.
        batch_size: sequences in the input of all kinds but decode.
        seq_lens: tokens in a sequence, one measurement each.
        decode_batch_sizes: sequences that are written at once, one measurement each.
        max_batch_size: where the search for the largest batch of decode ends; 0: it is not made.
        scopes: what is timed in decode.
        rounds: timed calls of each model.
        seed: of inputs.
    """

    kinds: Sequence[str] = ("mixer",)
    batch_size: int = 4
    seq_lens: Sequence[int] = (1024,)
    decode_batch_sizes: Sequence[int] = (1, 8)
    max_batch_size: int = 0
    scopes: Sequence[str] = SCOPES
    rounds: int = 30
    seed: int = 0


def benchmark_report(
    subjects: Sequence[Subject], request: Request, progress: Callable[[int], None] | None = None
) -> dict:
    """Measure all that was asked for; steps of training come last, since they change the weights.

    Args:
        subjects: the models; the first is the one that the others are compared with.
        request: what to measure.
        progress: called with 1 after each round.

    Returns:
        A JSON object: ``settings``, what was run on what; ``ceilings``, what the device can do; ``models``, their
        sizes; for each kind of `KINDS` that was asked for a list of entries (:mod:`keyreduce.benchmarking.figures`),
        with ``largest_batch`` beside ``decode``; and ``warmup_seconds``, what all warming up took.

    Raises:
        KeyreduceError: something needs more memory than there is, or fla's kernels cannot train such a model here.
    """
    model = subjects[0].model
    if "train_step" in request.kinds:
        for subject in subjects:
            refuse_wrong_gradients(subject.family, subject.config, model.device, ", or leave `train_step` out")
    report: dict = {"settings": _settings(model, request)}
    models = [subject.describe() for subject in subjects]
    for entry in models[1:]:
        entry["state_ratio"] = models[0]["state_bytes_per_sequence"] / entry["state_bytes_per_sequence"]
    with memory_errors_told("measuring what the device can do"):
        ceilings = measure_ceilings(model.device, model.dtype)
    report |= {"ceilings": ceilings._asdict(), "models": models}
    common = {"rounds": request.rounds, "seed": request.seed, "progress": progress}
    for kind in (kind for kind in KINDS if kind in request.kinds):
        entries = report[kind] = []
        if kind == "decode":
            for batch_size in request.decode_batch_sizes:
                with memory_errors_told(f"decoding {batch_size} sequences"):
                    entries += time_decoding(subjects, ceilings, batch_size=batch_size, scopes=request.scopes, **common)
            if request.max_batch_size:
                start, at_most = max(request.decode_batch_sizes), request.max_batch_size
                few = min(request.rounds, 5)
                report["largest_batch"] = time_largest_batch(subjects, start=start, at_most=at_most, rounds=few)
            continue
        for seq_len in request.seq_lens:
            shape = {"batch_size": request.batch_size, "seq_len": seq_len}
            with memory_errors_told(f"a batch of {request.batch_size} x {seq_len} tokens"):
                entries += time_passes(subjects, ceilings, kind, **shape, **common)
    report["warmup_seconds"] = sum(_warmup_seconds(entry) for kind in request.kinds for entry in report[kind])
    return report


def _warmup_seconds(entry: dict) -> float:
    ways = [entry] if "warmup_seconds" in entry else [entry["eager"], entry["graph"]]
    return sum(way["warmup_seconds"] for way in ways if way)


def total_rounds(request: Request, device: torch.device) -> int:
    """Return how often ``progress`` of :func:`benchmark_report` is called, at most."""
    ways = 2 if device.type == "cuda" else 1
    decode = len(request.decode_batch_sizes) * len(request.scopes) * ways
    return request.rounds * sum(decode if kind == "decode" else len(request.seq_lens) for kind in request.kinds)


def _settings(model: torch.nn.Module, request: Request) -> dict:
    return {
        "device": _device_name(model.device),
        "device_type": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kinds": list(request.kinds),
        "batch_size": request.batch_size,
        "seq_len": list(request.seq_lens),
        "decode_batch_sizes": list(request.decode_batch_sizes),
        "rounds": request.rounds,
        "seed": request.seed,
        "versions": {
            "keyreduce": keyreduce.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "flash-linear-attention")},
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
