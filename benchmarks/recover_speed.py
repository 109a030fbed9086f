"""Where the time of layer-wise recovery goes: the parts of one layer, and gradient steps run in several ways.

    python benchmarks/recover_speed.py [--config configs/scale/delta-net-220m.json] [--steps 64] [--output FILE]
        [--only mixed-recorded ...] [--no-profile]

A model of the config gets random weights, of which the time does not depend, and random tokens. Key and value channels
are cut. One layer of it is then recovered as `keyreduce recover --mode reconstruct` does it: the hidden states are
gathered, which wait on the device or on the CPU; the output projection is refitted; gradient steps are taken. These
start from the same weights and see the same batches in each way, so that the errors that they end with can be
compared. The report has for each way

- the milliseconds of a step, and of these how many the device computes;
- the seconds that a layer takes besides, such as to record a CUDA graph;
- the seconds that only the first layer takes, in which libraries start and Triton compiles;
- what recovery of all layers takes with it, in which these parts are added up;
- the kernels that take most of the device's time.
"""

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from keyreduce.api.functions import prune
from keyreduce.devices import device_name, pick_device
from keyreduce.models.classes import family_in, vocabulary_of
from keyreduce.models.loading import prepare_backend
from keyreduce.models.meta import build_model
from keyreduce.outputs import read_json, write_json
from keyreduce.recovery.least_squares import refit_output
from keyreduce.recovery.modes import LEAST_STEPS, Steps
from keyreduce.recovery.pace import Pace
from keyreduce.recovery.reconstruct import reconstruct
from keyreduce.recovery.streams import Stream, open_stream

CONFIG = Path(__file__).parents[1] / "configs/scale/delta-net-220m.json"
CPU = torch.device("cpu")
WAYS = {
    "float32-from-cpu": Pace(),
    "float32": Pace(),
    "float32-recorded": Pace(is_recorded=True),
    "mixed": Pace(is_mixed=True),
    "mixed-recorded": Pace(is_mixed=True, is_recorded=True),
    "fla": Pace(is_mixed=True, kernels="fla"),
    "fla-recorded": Pace(is_mixed=True, is_recorded=True, kernels="fla"),
}
"""Name -> how steps run. With `from-cpu` hidden states and targets wait on the CPU, else on the device."""
FEW = 8  # steps of the runs that tell what a layer takes besides its steps
KERNELS = 12  # that are named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--ratio", type=float, nargs=2, default=(0.375, 0.2), help="of key and value channels")
    parser.add_argument("--num-batches", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64, help="that are timed")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report = measure(options, pick_device(options.device))
    print_report(report)
    if options.output is not None:
        write_json(options.output, report, overwrite=True)


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    """Return what was measured, as JSON."""
    began = time.perf_counter()
    # A CPU has one way: there is nothing to record, nor are there fla's kernels.
    ways = {name: WAYS[name] for name in options.only if device.type == "cuda" or name == "float32"}
    torch.manual_seed(0)
    before, after = streams(options, device)
    family, config = after.family, after.model.config.to_dict()
    sizes = family.layer_sizes(config)[options.layer]
    names = ("ratio", "num_batches", "batch_size", "seq_len", "steps", "layer")
    report = {
        "config": options.config.name,
        "settings": {name: getattr(options, name) for name in names},
        "sizes": sizes._asdict(),
        "layers": len(family.mixer_layers(config)),
        "device": device_name(device),
        "torch": torch.__version__,
        "gather": {},
        "ways": {},
    }
    targets: dict[str, list[torch.Tensor]] = {}
    homes = {"device": device, "cpu": CPU} if device.type == "cuda" else {"device": device}
    for name, home in homes.items():
        pair = [waiting(stream, home) for stream in (before, after)]
        report["gather"][name], targets[name] = gather(pair[0], pair[1], options.layer)
    mixer_targets = before.advance(options.layer, keep_mixer=True)
    report["least_squares"] = least_squares(after, options.layer, mixer_targets)
    del mixer_targets
    before.hidden.clear()
    kept = copy.deepcopy(after.block(options.layer).state_dict())
    for name, pace in ways.items():
        home = "cpu" if name.endswith("-cpu") and "cpu" in targets else "device"
        stream = waiting(after, homes[home])
        run = partial(fit, stream, options.layer, targets[home], pace, kept)
        report["ways"][name] = measure_way(run, pace, options.steps, not options.no_profile)
        print(f"{name}: measured", file=sys.stderr, flush=True)
    report["seconds"] = round(time.perf_counter() - began, 1)
    return add_up(report)


def streams(options: argparse.Namespace, device: torch.device) -> tuple[Stream, Stream]:
    """Return the streams of a random model and of a pruned one, before the layer that is recovered."""
    prepare_backend(device, gradients=True)
    dense = build_model(read_json(options.config), device, torch.float32)
    if device.type == "cuda":
        prepare_backend(device, gradients=True)
    pruned = prune(dense, method="l2", target=("key", "value"), ratio=tuple(options.ratio), uncorrected=True)
    shape = (options.num_batches, options.batch_size, options.seq_len)
    batches = list(torch.randint(vocabulary_of(dense), shape))
    prepare_backend(device, gradients=True)
    before, after = (open_stream(model, family_in(model), batches, device, device) for model in (dense, pruned))
    for layer in range(options.layer):
        before.advance(layer)
        after.advance(layer)
    return before, after


def waiting(stream: Stream, home: torch.device) -> Stream:
    """Return a stream whose hidden states wait on a device; the model stays where it is."""
    hidden, batches = ([one.to(home) for one in some] for some in (stream.hidden, stream.batches))
    return dataclasses.replace(stream, home=home, hidden=hidden, batches=batches)


def gather(before: Stream, after: Stream, layer: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Return the seconds in which hidden states pass a layer, and what its dense block gives."""
    seconds = {}
    for name, stream, keep in (("dense", before, True), ("pruned", after, False)):
        hidden = list(stream.hidden)

        def advance(stream: Stream = stream, keep: bool = keep, hidden: list = hidden) -> None:
            stream.hidden[:] = hidden
            stream.advance(layer, keep_mixer=keep)

        seconds[name] = timed(advance, stream.device)
        given, stream.hidden[:] = list(stream.hidden), hidden
        if stream is before:
            targets = given
    return seconds, targets


def least_squares(after: Stream, layer: int, targets: list[torch.Tensor]) -> dict[str, float]:
    """Return the seconds of the closed form: in all, and of that the mixer's passes and the two decompositions."""
    weight_DC = after.projection(layer).weight
    kept = weight_DC.detach().clone()

    def see() -> None:
        with torch.no_grad():
            for place in range(len(targets)):
                after.see_mixer(layer, place)

    rows_NC = torch.randn(2 * weight_DC.shape[1], weight_DC.shape[1], dtype=torch.float64, device=after.device)
    gram_CC = rows_NC.T @ rows_NC
    seconds = {
        "all": timed(lambda: refit_output(after, layer, targets), after.device),
        "mixer": timed(see, after.device),
        "decompositions": 2 * timed(lambda: torch.linalg.eigh(gram_CC), after.device),
    }
    with torch.no_grad():
        weight_DC.copy_(kept)
    return seconds


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the second call."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


def fit(
    stream: Stream, layer: int, targets: list[torch.Tensor], pace: Pace, weights: dict, steps: int
) -> tuple[float, dict[str, float]]:
    """Take steps from the same weights, and return the seconds and the figures of it."""
    stream.block(layer).load_state_dict(weights)
    began = time.perf_counter()
    figures = reconstruct(stream, layer, targets, Steps(steps=steps), seed=0, pace=pace)  # it ends with a number
    return time.perf_counter() - began, figures


def measure_way(run: Callable, pace: Pace, steps: int, is_profiled: bool) -> dict:
    """Return the figures of a way: of a step, of a layer besides, and of the first layer besides."""
    wanted = pace.is_recorded
    try:
        first, again, (long, figures) = run(FEW)[0], run(FEW)[0], run(FEW + steps)
    except RuntimeError as error:  # such as a kernel that Triton does not compile
        return {"failed": str(error).strip().partition("\n")[0][:200]}
    step = (long - again) / steps
    found = {
        "step": step,
        "layer": max(0.0, again - FEW * step),
        "first": max(0.0, first - again),
        "error_last": figures["error_last"],
    }
    if wanted and not pace.is_recorded:
        found["failed"] = "it could not be recorded"
    return found | (profiled(run) if is_profiled else {})


def profiled(run: Callable) -> dict:
    """Return the seconds that the device computes in a step, and the kernels that take most of them."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        run(2 * FEW)
    totals: dict[str, list[float]] = {}
    for event in seen.key_averages():
        if on_gpu and event.device_type.name != "CUDA":
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total = totals.setdefault(event.key[:80], [0.0, 0])
        total[0] += 1e-6 * microseconds / (2 * FEW)
        total[1] += event.count / (2 * FEW)
    ranked = sorted(totals.items(), key=lambda one: -one[1][0])
    return {
        "computing": sum(seconds for seconds, _ in totals.values()),
        "kernels_of_a_step": sum(count for _, count in totals.values()),
        "kernels": [{"name": name, "seconds": value, "calls": count} for name, (value, count) in ranked[:KERNELS]],
    }


def add_up(report: dict) -> dict:
    """Return a report with the seconds of a recovery of all layers, by its parts, for each way."""
    layers, steps = report["layers"], LEAST_STEPS
    for name, way in report["ways"].items():
        if "step" in way:
            home = "cpu" if name.endswith("-cpu") and "cpu" in report["gather"] else "device"
            parts = {
                "gather": layers * sum(report["gather"][home].values()),
                "least_squares": layers * report["least_squares"]["all"],
                "steps": layers * steps * way["step"],
                "besides": layers * way["layer"] + way["first"],
            }
            way["recovery"] = parts | {"all": sum(parts.values())}
    return report


def print_report(report: dict) -> None:
    """Print the parts as tables in Markdown."""
    settings, sizes = report["settings"], report["sizes"]
    rows = f"{settings['num_batches']} batches of {settings['batch_size']} x {settings['seq_len']} tokens"
    print(f"{report['config']}, {report['layers']} layers, {sizes['head_k_dim']} x {sizes['head_v_dim']} kept, {rows}")
    print(f"{report['device']}, torch {report['torch']}; seconds, unless it says ms\n")
    for home, seconds in report["gather"].items():
        words = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        print(f"- a layer's hidden states, which wait on the {home}: {words}")
    words = ", ".join(f"{name} {value:.3f}" for name, value in report["least_squares"].items())
    print(f"- a layer's least squares: {words}\n")
    print(f"| steps | ms | computing, ms | kernels | layer besides | first | error | {LEAST_STEPS} steps in all |")
    print(f"|{'---|' * 8}")
    for name, way in report["ways"].items():
        if "step" not in way:
            print(f"| {name} | {way['failed']} |")
            continue
        computing = f"{1e3 * way['computing']:.2f} | {way['kernels_of_a_step']:.0f}" if "computing" in way else "|"
        times = f"{1e3 * way['step']:.2f} | {computing} | {way['layer']:.2f} | {way['first']:.1f}"
        failed = f" ({way['failed']})" if "failed" in way else ""
        print(f"| {name}{failed} | {times} | {way['error_last']:.4g} | {way['recovery']['all']:.0f} |")
    for name, way in report["ways"].items():
        if "recovery" in way:
            parts = ", ".join(f"{part} {value:.0f}" for part, value in way["recovery"].items())
            print(f"\n{name}: {parts}")
        for kernel in way.get("kernels", ()):
            print(f"    {1e3 * kernel['seconds']:8.3f} ms {kernel['calls']:7.1f} calls  {kernel['name']}")


if __name__ == "__main__":
    main()
