"""Time the backend's chunked delta rule on CUDA against fla's own kernels, and say where its time goes.

    python flash-linear-attention/cuda_benchmark.py --output benchmarks/backend/cuda.json [--rounds 15] [--variants 2]

Both run through the functions of fla, in bfloat16, with the L2 norm inside as fla's layers call them, forward and
forward with backward, in turn, round after round; a ratio is taken within each round, and its median is kept. Launches
count: times are those between two events around the call. fla's kernels are tuned among few variants. What fla refuses
to run on this machine has null for its time, and why.

Where the time goes: the parts of our forward pass, each alone; and for a whole call how long the GPU was at work, and
the kernels that took most of that.

Shapes: B batch, T tokens, H heads, K key channels, V value channels; B times H is 64.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import fla_torch
import torch
from fla_torch.segment import invert_unit_lower, prepare, run_segment, scan

from keyreduce.models.tuning import tune_few_variants

# fla after the backend: the backend silences fla's warning that there is no GPU.
from fla.ops.delta_rule import chunk_delta_rule  # isort: skip
from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # isort: skip

SIZES = ("128x128", "80x104")
TOLERANCE = 2e-2  # operands of matrix products have 8 bits
MOST_KERNELS = 8
Step = Callable[[], tuple[torch.Tensor, ...]]


def draw(B: int, T: int, H: int, K: int, V: int, gated: bool, device: torch.device) -> list[torch.Tensor]:
    """Return random query, key, value and beta in bfloat16, and the float32 log decay of the gated rule."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[3] = inputs[3].sigmoid()
    result = [tensor.to(device, torch.bfloat16) for tensor in inputs]
    decay = torch.nn.functional.logsigmoid(torch.randn(B, T, H, generator=generator) + 3)
    return [*result, decay.to(device)] if gated else result


def operate(inputs: list[torch.Tensor], chunk_size: int | None) -> torch.Tensor:
    """Call fla's function for the rule; the chunk size is given to our backend alone."""
    query, key, value, beta, *decay = inputs
    others = {} if chunk_size is None else {"chunk_size": chunk_size}
    if decay:
        return chunk_gated_delta_rule(query, key, value, decay[0], beta, use_qk_l2norm_in_kernel=True, **others)[0]
    return chunk_delta_rule(query, key, value, beta, use_qk_l2norm_in_kernel=True, **others)[0]


def forward(inputs: list[torch.Tensor], chunk_size: int | None, ours: bool) -> tuple[torch.Tensor, ...]:
    """Run the rule by our backend or by fla's kernels."""
    fla_torch.enable(cuda=ours)
    with torch.no_grad():
        return (operate(inputs, chunk_size),)


def forward_backward(inputs: list[torch.Tensor], chunk_size: int | None, ours: bool) -> tuple[torch.Tensor, ...]:
    """Likewise, and return the gradients of all inputs."""
    fla_torch.enable(cuda=ours)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = operate(leaves, chunk_size)
    return torch.autograd.grad(output, leaves, torch.ones_like(output))


def milliseconds(step: Callable[[], object]) -> float:
    """Return how long a call took, launches included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def compare(steps: dict[str, Step], rounds: int) -> list[dict]:
    """Return a row for each way: median milliseconds, and how many times as long as fla's kernels it takes."""
    results, refused = {}, {}
    for name, step in steps.items():
        try:
            results[name] = step()
        except (RuntimeError, ValueError) as error:  # fla refuses what Triton compiles wrong on this GPU
            if name != "fla":
                raise
            refused[name] = str(error).splitlines()[0]
    errors = {
        name: max(map(relative_error, result, results["fla"])) if "fla" in results else None
        for name, result in results.items()
    }
    times = {name: [] for name in results}
    for _ in range(rounds):
        for name in results:
            steps[name]()  # once untimed: what the one before it left in allocator and caches is not its own doing
            times[name].append(milliseconds(steps[name]))
    rows = []
    for name in steps:
        row = {"function": name, "milliseconds": None, "times_fla": None, "error_against_fla": errors.get(name)}
        if name in times:
            row["milliseconds"] = median(times[name])
            if "fla" in times:
                row["times_fla"] = median(one / fla for one, fla in zip(times[name], times["fla"], strict=True))
        else:
            row["why_not"] = refused[name]
        rows.append(row)
    return rows


def time_parts(inputs: list[torch.Tensor], chunk_size: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of the parts of our forward pass after the L2 norm, each alone."""
    query, key, value, beta, *decay = inputs
    K, V = key.shape[-1], value.shape[-1]
    state = torch.zeros(len(key) * key.shape[2], K, V, device=key.device)
    operands = (query, key, value, beta, decay[0] if decay else None)
    laid = prepare(*operands, chunk_size, torch.float32)
    solving = invert_unit_lower(laid.key_gram_ZNCC * laid.beta_ZNC1)
    output = torch.empty_like(value)
    parts = {
        "layout and products within chunks": lambda: prepare(*operands, chunk_size, torch.float32),
        "inverse": lambda: invert_unit_lower(laid.key_gram_ZNCC),
        "scan over chunks": lambda: scan(
            laid.key_ZNCK, solving, laid.key_ZNCK, laid.value_ZNCV.clone(), laid.kept_ZN11, state
        ),
        "all": lambda: run_segment(*operands, state, K**-0.5, chunk_size, True, output),
    }

    def once(part: Callable[[], object]) -> float:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            return milliseconds(part)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    with torch.no_grad():
        return {name: median(once(part) for _ in range(rounds)) for name, part in parts.items()}


def profile(step: Step) -> dict:
    """Return how long the GPU is at work in a call, in how many kernels, and those that take most of it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return {
        "gpu_milliseconds": sum(event.self_device_time_total for event in kernels) / 1e3,
        "kernels": sum(event.count for event in kernels),
        "most": [
            {"kernel": event.key[:100], "calls": event.count, "milliseconds": event.self_device_time_total / 1e3}
            for event in kernels[:MOST_KERNELS]
        ],
    }


def measure(gated: bool, size: str, options: argparse.Namespace, device: torch.device) -> dict:
    """Return all of a rule at a size."""
    K, V = map(int, size.split("x"))
    inputs = draw(options.batch, options.tokens, options.heads, K, V, gated, device)
    result: dict = {"rule": "gated" if gated else "ungated", "size": size}
    for name, run in {"forward": forward, "forward and backward": forward_backward}.items():
        ours = {f"ours, chunks of {size}": partial(run, inputs, size, True) for size in options.chunk_sizes}
        rows = compare({"fla": partial(run, inputs, None, False)} | ours, options.rounds)
        result[name] = {"rows": rows, "ours": profile(next(iter(ours.values())))}
        if rows[0]["milliseconds"] is not None:
            result[name]["fla"] = profile(partial(run, inputs, None, False))
    result["parts"] = {str(size): time_parts(inputs, size, options.rounds) for size in options.chunk_sizes}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 2048), ("heads", 8), ("batch", 8), ("rounds", 15), ("variants", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="KxV")
    parser.add_argument("--chunk-sizes", nargs="+", type=int, default=[64], help="of ours; powers of two")
    parser.add_argument("--output", type=Path, help="JSON; else only the table is printed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    device = torch.device("cuda")
    tune_few_variants(options.variants)
    setting = {name: value for name, value in vars(options).items() if name != "output"}
    setting |= {"dtype": "bfloat16", "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    results: list[dict] = []
    print("| rule | K x V | pass | function | ms | times fla | GPU at work, ms |\n|---|---|---|---|---|---|---|")
    for size in options.sizes:
        for gated in (False, True):
            result = measure(gated, size, options, device)
            results.append(result)
            for name in ("forward", "forward and backward"):
                for row in result[name]["rows"]:
                    busy = result[name].get(row["function"].split(",")[0], {}).get("gpu_milliseconds")
                    cells = [row["milliseconds"], row["times_fla"], busy]
                    line = " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells)
                    print(f"| {result['rule']} | {size} | {name} | {row['function']} | {line} |", flush=True)
            print(f"parts: {json.dumps(result['parts'])}", file=sys.stderr)
            if options.output:  # after each: an interrupted run keeps what it has
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")
    wrong = [
        row
        for result in results
        for name in ("forward", "forward and backward")
        for row in result[name]["rows"]
        if (row["error_against_fla"] or 0) > TOLERANCE
    ]
    sys.exit(f"further from fla than {TOLERANCE}: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
