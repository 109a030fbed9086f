"""Time the chunked delta rule on this machine's CPU, against fla's naive functions and against the floor.

    python flash-linear-attention/benchmark.py

Ours, fla's and the floor run in turn, round after round, so that a disturbance hits all of them alike. A ratio is
taken within each round, and its median is printed. The floor is one large square matrix product with as many
floating-point operations as our algorithm: no arrangement of the same work can be faster.

Shapes: B batch (1), T tokens, H heads, K key channels, V value channels, C tokens of a chunk.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fla_torch.delta_rule import CHUNK_SIZE, chunked_delta_rule
from rich.console import Console
from rich.table import Table

# fla after the backend: the backend silences fla's warning that there is no GPU.
from fla.ops.delta_rule.naive import delta_rule_chunkwise, delta_rule_recurrence  # isort: skip
from fla.ops.gated_delta_rule.naive import (  # isort: skip
    naive_chunk_gated_delta_rule,
    naive_recurrent_gated_delta_rule,
)

NAIVE_CHUNK_SIZES = (16, 32, 64, 128)
OURS, FLOOR = "ours", "floor: one matrix product"
# What the ratio to ours has to be: at least this many times slower; ours at most this many times the floor.
FASTER_THAN_CHUNK, FASTER_THAN_RECURRENT, SLOWER_THAN_FLOOR = 1.5, 8.0, 2.5


def count_operations(T: int, H: int, K: int, V: int, C: int) -> int:
    """Return the multiplications and additions in the products and solves of the chunked algorithm.

    For each token and head::

        4 C K        the token's key and its query with each key of the chunk
        4 K V        key and query read the state
        (C - 1) V    unit lower triangular solve, C (C - 1) V a chunk
        2 C V        the output from the chunk's updates
        2 K V        the update is written to the state

    What is computed above a diagonal and not used counts, since it is computed; elementwise work does not.
    """
    return T * H * (4 * C * K + 6 * K * V + 2 * C * V + (C - 1) * V)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fastest(form: Callable[[int], Callable[[], object]]) -> tuple[int, Callable[[], object]]:
    """Return the chunk size with which a naive function is fastest here, and the function with it."""
    functions = {size: form(size) for size in NAIVE_CHUNK_SIZES}
    rounds = [{size: seconds(function) for size, function in functions.items()} for _ in range(6)]
    # The first round warms up.
    best = min(functions, key=lambda size: statistics.median(times[size] for times in rounds[1:]))
    return best, functions[best]


def contenders(T: int, H: int, K: int, V: int, gated: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """Return by name what is timed, and the bar of its ratio. That they compute the same is checked first."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, T, H, D, generator=generator) for D in (K, K, V))
    key = F.normalize(key, dim=-1)
    beta = torch.rand(1, T, H, generator=generator)
    log_decay = F.logsigmoid(torch.randn(1, T, H, generator=generator) + 3) if gated else None
    decay_or_zero = torch.zeros_like(beta) if log_decay is None else log_decay
    # fla's ungated functions take the heads first: given so, they need no transposition.
    heads_first = [tensor.transpose(1, 2).contiguous() for tensor in (query, key, value, beta)]

    def ours():
        return chunked_delta_rule(query, key, value, beta, log_decay, scale=K**-0.5)[0]

    size, naive_chunk = fastest(
        lambda size: lambda: naive_chunk_gated_delta_rule(query, key, value, decay_or_zero, beta, chunk_size=size)[0]
    )
    result = {
        OURS: (ours, 1.0),
        f"fla naive chunk ({size}), gated form": (naive_chunk, FASTER_THAN_CHUNK),
    }
    if gated:
        result["fla naive recurrent"] = (
            lambda: naive_recurrent_gated_delta_rule(query, key, value, beta, log_decay)[0],
            FASTER_THAN_RECURRENT,
        )
    else:
        size, naive_chunk = fastest(
            lambda size: lambda: delta_rule_chunkwise(*heads_first, chunk_size=size)[0].transpose(1, 2)
        )
        result[f"fla naive chunk ({size}), ungated form"] = (naive_chunk, FASTER_THAN_CHUNK)
        result["fla naive recurrent"] = (
            lambda: delta_rule_recurrence(*heads_first)[0].transpose(1, 2),
            FASTER_THAN_RECURRENT,
        )
    expected = ours()
    for function, _ in result.values():
        torch.testing.assert_close(function(), expected, rtol=1e-3, atol=1e-4)

    side = round((count_operations(T, H, K, V, CHUNK_SIZE) / 2) ** (1 / 3))
    left, right = torch.randn(2, side, side, generator=generator)
    result[FLOOR] = (lambda: left @ right, SLOWER_THAN_FLOOR)
    return result


def compare(rule: str, functions: dict[str, tuple[Callable[[], object], float]], rounds: int) -> list[dict]:
    """Time each function once a round; return a row for each: median milliseconds, ratio, bar, and whether it is met.

    The ratio is how many times slower than ours a function is; for the floor, how many times slower ours is.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, (function, _) in functions.items():
            # Once untimed: what the function before it left in caches and allocator is not its own doing.
            function()
            times[name].append(seconds(function))
    rows = []
    for name, (_, bar) in functions.items():
        pairs = zip(times[OURS], times[name], strict=True)
        is_floor = name == FLOOR
        ratio = statistics.median(ours / other if is_floor else other / ours for ours, other in pairs)
        rows.append(
            {
                "rule": rule,
                "function": name,
                "milliseconds": 1e3 * statistics.median(times[name]),
                "ratio": ratio,
                "bar": None if name == OURS else bar,
                "is_met": ratio <= bar if is_floor else ratio >= bar,
            }
        )
    return rows


def time_training_step(T: int, H: int, K: int, V: int, gated: bool, rounds: int) -> float:
    """Return the median milliseconds of ours, forward and backward."""
    inputs = [torch.randn(1, T, H, K), F.normalize(torch.randn(1, T, H, K), dim=-1), torch.randn(1, T, H, V)]
    inputs.append(torch.rand(1, T, H))
    if gated:
        inputs.append(F.logsigmoid(torch.randn(1, T, H) + 3))
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def step():
        return torch.autograd.grad(chunked_delta_rule(*leaves, scale=K**-0.5)[0].sum(), leaves)

    step()
    return 1e3 * statistics.median(seconds(step) for _ in range(rounds))


def print_table(rows: list[dict], training: dict[str, float]) -> None:
    table = Table()
    for column in ("rule", "function", "ms", "ratio", "bar"):
        table.add_column(column, justify="left" if column in ("rule", "function") else "right", no_wrap=True)
    for row in rows:
        bar = ""
        if row["bar"] is not None:
            bar = f"{'<=' if row['function'] == FLOOR else '>='} {row['bar']:g} {'yes' if row['is_met'] else 'NO'}"
        table.add_row(
            row["rule"], row["function"], f"{row['milliseconds']:.1f}", f"{row['ratio']:.2f}", bar,
            end_section=row["function"] == FLOOR,
        )  # fmt: skip
    for rule, milliseconds in training.items():
        table.add_row(rule, "ours, forward and backward", f"{milliseconds:.1f}", "", "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 2048), ("heads", 8), ("key", 128), ("value", 128), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    if options.tokens < 1 or options.tokens % max(NAIVE_CHUNK_SIZES):
        parser.error(f"--tokens must be a multiple of {max(NAIVE_CHUNK_SIZES)}: fla's naive functions need it")

    sizes = (options.tokens, options.heads, options.key, options.value)
    rows, training = [], {}
    for rule in ("ungated", "gated"):
        gated = rule == "gated"
        with torch.no_grad():
            rows += compare(rule, contenders(*sizes, gated), options.rounds)
        training[rule] = time_training_step(*sizes, gated, options.rounds)
    setting = {
        "tokens": options.tokens, "heads": options.heads, "key": options.key, "value": options.value,
        "dtype": "float32", "rounds": options.rounds, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if options.json:
        print(json.dumps({"setting": setting, "rows": rows, "forward_backward_milliseconds": training}, indent=2))
    else:
        print(", ".join(f"{name} {value}" for name, value in setting.items()))
        print_table(rows, training)


if __name__ == "__main__":
    main()
