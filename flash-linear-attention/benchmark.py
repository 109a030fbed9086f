"""Time the chunked delta rule on this machine's CPU, against fla's naive functions and against the floor.

    python flash-linear-attention/benchmark.py --output benchmarks/backend/cpu.json
    python flash-linear-attention/benchmark.py --table benchmarks/backend/cpu.json   # the README's table

Ours, fla's and the floor run in turn, round after round, so that a disturbance hits all of them alike. A ratio is
taken within each round, and its median is printed. The floor is one large square matrix product with as many
floating-point operations as the chunked algorithm needs: no arrangement of the same work can be faster.

Shapes: B batch (1), T tokens, H heads, K key channels, V value channels, C tokens of a chunk.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from fla_torch.delta_rule import CPU_CHUNK_SIZE, chunked_delta_rule

# fla after the backend: the backend silences fla's warning that there is no GPU.
from fla.ops.delta_rule.naive import delta_rule_chunkwise, delta_rule_recurrence  # isort: skip
from fla.ops.gated_delta_rule.naive import (  # isort: skip
    naive_chunk_gated_delta_rule,
    naive_recurrent_gated_delta_rule,
)

NAIVE_CHUNK_SIZES = (16, 32, 64, 128)
OURS, FLOOR = "ours", "floor: one matrix product"
Functions = dict[str, Callable[[], torch.Tensor]]


def count_operations(T: int, H: int, K: int, V: int, C: int) -> int:
    """Return the multiplications and additions in the products and solves that the chunked algorithm needs.

    Ours takes some more: it makes the inverse of each triangle and multiplies by it, which many threads can share.

    For each token and head::

        4 C K        the token's key and its query with each key of the chunk
        4 K V        key and query read the state
        (C - 1) V    unit lower triangular solve, C (C - 1) V a chunk
        2 C V        the output from the chunk's updates
        2 K V        the update is written to the state

    What is computed above a diagonal and not used counts, since it is computed; elementwise work does not.
    """
    return T * H * (4 * C * K + 6 * K * V + 2 * C * V + (C - 1) * V)


def time_in_turns(functions: Functions, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each function in each round."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            # Once untimed: what the function before it left in caches and allocator is not its own doing.
            function()
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def fastest(name: str, form: Callable[[int], torch.Tensor]) -> Functions:
    """Return a naive function with the chunk size at which it is fastest here."""
    functions = {name.format(size): lambda size=size: form(size) for size in NAIVE_CHUNK_SIZES}
    times = time_in_turns(functions, 5)
    best = min(functions, key=lambda name: median(times[name]))
    return {best: functions[best]}


def draw(T: int, H: int, K: int, V: int, gated: bool) -> list[torch.Tensor]:
    """Return random query, key, value and beta, and the log decay of the gated rule."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, T, H, D) for D in (K, K, V))
    inputs = [query, F.normalize(key, dim=-1), value, torch.rand(1, T, H)]
    return [*inputs, F.logsigmoid(torch.randn(1, T, H) + 3)] if gated else inputs


def contenders(T: int, H: int, K: int, V: int, gated: bool) -> Functions:
    """Return by name what is timed. That they compute the same is checked first."""
    query, key, value, beta, *log_decay = inputs = draw(T, H, K, V, gated)
    decay = log_decay[0] if gated else torch.zeros_like(beta)
    # fla's ungated functions take the heads first: given so, they need no transposition.
    heads_first = [tensor.transpose(1, 2).contiguous() for tensor in inputs[:4]]

    result = {OURS: lambda: chunked_delta_rule(*inputs, scale=K**-0.5)[0]}
    result |= fastest(
        "fla naive chunk ({}), gated form",
        lambda size: naive_chunk_gated_delta_rule(query, key, value, decay, beta, chunk_size=size)[0],
    )
    if gated:
        result["fla naive recurrent"] = lambda: naive_recurrent_gated_delta_rule(query, key, value, beta, decay)[0]
    else:
        result |= fastest(
            "fla naive chunk ({}), ungated form",
            lambda size: delta_rule_chunkwise(*heads_first, chunk_size=size)[0].transpose(1, 2),
        )
        result["fla naive recurrent"] = lambda: delta_rule_recurrence(*heads_first)[0].transpose(1, 2)
    for function in result.values():
        torch.testing.assert_close(function(), result[OURS](), rtol=1e-3, atol=1e-4)

    side = round((count_operations(T, H, K, V, CPU_CHUNK_SIZE) / 2) ** (1 / 3))
    left, right = torch.randn(2, side, side)
    return result | {FLOOR: lambda: left @ right}


def compare(functions: Functions, rounds: int) -> list[dict]:
    """Return a row for each function: median milliseconds, and how many times slower than ours it is.

    For the floor it is how many times slower ours is.
    """
    times, rows = time_in_turns(functions, rounds), []
    for name, theirs in times.items():
        pairs = zip(times[OURS], theirs, strict=True)
        ratio = median(ours / other if name == FLOOR else other / ours for ours, other in pairs)
        rows.append({"function": name, "milliseconds": median(theirs), "ratio": ratio})
    return rows


def time_training_step(T: int, H: int, K: int, V: int, gated: bool, rounds: int) -> float:
    """Return the median milliseconds of ours, forward and backward."""
    leaves = [tensor.requires_grad_() for tensor in draw(T, H, K, V, gated)]

    def step():
        return torch.autograd.grad(chunked_delta_rule(*leaves, scale=K**-0.5)[0].sum(), leaves)

    return median(time_in_turns({OURS: step}, rounds)[OURS])


def print_table(result: dict) -> None:
    """Print what :func:`main` wrote, as Markdown."""
    print(", ".join(f"{name} {value}" for name, value in result["setting"].items()))
    print("\n| rule | function | ms | ratio |\n|---|---|---|---|")
    for row in result["rows"]:
        print(f"| {row['rule']} | {row['function']} | {row['milliseconds']:.1f} | {row['ratio']:.2f} |")
    for rule, milliseconds in result["forward_backward_milliseconds"].items():
        print(f"| {rule} | ours, forward and backward | {milliseconds:.1f} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 2048), ("heads", 8), ("key", 128), ("value", 128), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--output", type=Path, help="also write what was measured there, as JSON")
    parser.add_argument("--table", type=Path, help="print the table of such a file; nothing is measured")
    options = parser.parse_args()
    if options.table:
        print_table(json.loads(options.table.read_text()))
        return
    if options.tokens < 1 or options.tokens % max(NAIVE_CHUNK_SIZES):
        parser.error(f"--tokens must be a multiple of {max(NAIVE_CHUNK_SIZES)}: fla's naive functions need it")

    sizes = (options.tokens, options.heads, options.key, options.value)
    rows, training = [], {}
    for rule, gated in {"ungated": False, "gated": True}.items():
        with torch.no_grad():
            rows += [{"rule": rule, **row} for row in compare(contenders(*sizes, gated), options.rounds)]
        training[rule] = time_training_step(*sizes, gated, options.rounds)
    setting = {name: value for name, value in vars(options).items() if name not in ("output", "table")}
    setting |= {"dtype": "float32", "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"setting": setting, "rows": rows, "forward_backward_milliseconds": training}
    print_table(result)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
