"""How long the selection of channels takes, and how good it is, on a seeded synthetic model of 24 x 16 heads.

    python benchmarks/selection.py [--output figures.json]

One function a section; each prints its table and returns its figures for ``--output``. Times are medians over rounds,
and what is compared is timed in turns, in the same process, with the same BLAS threads.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import pandas
import torch
from checkpoint_inputs import describe_model, write_source, write_sums
from scipy.linalg import qr, solve_triangular

from keyreduce.api.prune import Cut, PruneRequest
from keyreduce.calibration.file import read_statistics
from keyreduce.checkpoint.folder import open_folder
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.strong_rrqr import strong_rrqr
from keyreduce.reporting import Reporter

# Channels of a graded head come in groups of this many.
GROUP = 16


def smooth_head(generator: np.random.Generator, channels: int) -> np.ndarray:
    """Return ``[K, K]``, the factor of a head whose spectrum decays evenly in a random basis: pivoting does well."""
    basis_KK = np.linalg.qr(generator.standard_normal((channels, channels)))[0]
    return 0.95 ** np.arange(channels)[:, None] * basis_KK


def graded_head(generator: np.random.Generator, channels: int) -> np.ndarray:
    """Return ``[K, K]``, the factor of a head of groups of correlated channels: pivoting misses volume.

    Each group is a Kahan matrix, in which every next column leans on all before it (Kahan, "Numerical linear algebra",
    Canadian Math. Bulletin 9, 1966), at a scale of its own; the channels are then shuffled and a smooth head is added.
    """
    factor_KK = np.zeros((channels, channels))
    for start in range(0, channels, GROUP):
        size = min(GROUP, channels - start)
        cosine = generator.uniform(0.3, 0.6)
        graded = (1 - cosine**2) ** (np.arange(size) / 2)
        kahan = graded[:, None] * (np.eye(size) - cosine * np.triu(np.ones((size, size)), 1))
        # Slightly shorter towards the end, so that pivoting takes them in their order, which is the trap.
        kahan *= generator.lognormal(0, 0.3) * 0.999 ** np.arange(size)
        factor_KK[start : start + size, start : start + size] = kahan
    return factor_KK[:, generator.permutation(channels)] + 0.02 * smooth_head(generator, channels)


@cache
def white_samples(seed: int, samples: int, channels: int) -> np.ndarray:
    """Return ``[samples, K]``, whose sample covariance is exactly the identity: what makes a head hard stays so."""
    drawn_NK = np.random.default_rng(seed).standard_normal((samples, channels))
    return np.linalg.qr(drawn_NK)[0] * samples**0.5


def sampled_head(seed: int, head: int, samples: int, channels: int) -> np.ndarray:
    """Return the activations of one head, ``[samples, K]``: even ones smooth, odd ones graded."""
    factor_KK = (smooth_head, graded_head)[head % 2](np.random.default_rng([seed, head]), channels)
    return white_samples(seed, samples, channels) @ factor_KK


def grams(options: argparse.Namespace) -> list[np.ndarray]:
    """Return the Gram matrices ``[K, K]`` of the heads of all layers."""
    heads = range(options.layers * options.heads)
    data = (sampled_head(options.seed, head, options.samples, options.channels) for head in heads)
    return [data_NK.T @ data_NK for data_NK in data]


def textbook_strong_rrqr(data_NK: np.ndarray, keep: int, f: float) -> tuple[np.ndarray, int]:
    """Return the kept channels and the number of swaps of Gu and Eisenstat's algorithm 4, as one would write it down:
    QR with column pivoting, then a swap and a new QR of the permuted matrix for as long as the largest rho is above f.
    """
    triangle_KK, order_K = qr(data_NK, mode="r", pivoting=True)
    swaps = 0
    while True:
        r11, r12, r22 = triangle_KK[:keep, :keep], triangle_KK[:keep, keep:], triangle_KK[keep:, keep:]
        inverse_r11 = solve_triangular(r11, np.eye(keep))
        lengths = np.outer(np.linalg.norm(inverse_r11, axis=1), np.linalg.norm(r22, axis=0))
        rho = np.hypot(inverse_r11 @ r12, lengths)
        if not rho.max(initial=0) > f:
            return np.sort(order_K[:keep]), swaps
        out, into = np.unravel_index(rho.argmax(), rho.shape)
        order_K[[out, keep + into]] = order_K[[keep + into, out]]
        triangle_KK = qr(data_NK[:, order_K], mode="r")[0]
        swaps += 1


def log_volume(data_NK: np.ndarray, kept_R: np.ndarray) -> float:
    """Return log |det R11| of the kept columns, from a QR of the data itself."""
    return float(np.log(np.abs(qr(data_NK[:, kept_R], mode="economic")[1].diagonal())).sum())


def timed(call: Callable, *arguments: object, **settings: object):
    """Return the result and the seconds it took."""
    start = time.perf_counter()
    result = call(*arguments, **settings)
    return result, time.perf_counter() - start


def strong_rrqr_section(options: argparse.Namespace) -> dict:
    """Strong RRQR from the Gram matrix, against the textbook way on the same heads."""
    print(f"Strong RRQR: keep {options.keep} of {options.channels} channels, f = {options.f}")
    print("From the Gram matrix, which calibration has summed already: its time is shown, and counted in 'with Gram'.")
    print("In each round every head goes through one way, then every head through the next.")
    heads = range(options.textbook_heads)
    data_HNK = [sampled_head(options.seed, head, options.samples, options.channels) for head in heads]
    gram_HKK = [data_NK.T @ data_NK for data_NK in data_HNK]
    ways = {
        "gram": lambda head: data_HNK[head].T @ data_HNK[head],
        "ours": lambda head: strong_rrqr(gram_HKK[head], options.keep, f=options.f),
        "textbook": lambda head: textbook_strong_rrqr(data_HNK[head], options.keep, options.f),
    }
    found, seconds = {}, {(way, head): [] for way in ways for head in heads}
    for _ in range(options.rounds):
        for way, head in seconds:
            found[way, head], took = timed(ways[way], head)
            seconds[way, head].append(took)

    rows = []
    for head in heads:
        ours, (textbook_R, textbook_swaps) = found["ours", head], found["textbook", head]
        row = {"head": head, "kind": ("smooth", "graded")[head % 2]}
        row |= {f"{way}_ms": 1000 * median(seconds[way, head]) for way in ways}
        row["ratio"] = row["textbook_ms"] / row["ours_ms"]
        row["ratio_with_gram"] = row["textbook_ms"] / (row["ours_ms"] + row["gram_ms"])
        row |= {"our_swaps": ours.swaps, "textbook_swaps": textbook_swaps, "rho": ours.rho}
        row["log_volume"] = log_volume(data_HNK[head], ours.kept_R)
        row["textbook_log_volume"] = log_volume(data_HNK[head], textbook_R)
        rows.append(row)
    table = pandas.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.6g}".format))

    ratios = table.groupby("kind", sort=False)[["ratio", "ratio_with_gram"]].median()
    for kind, (ratio, with_gram) in ratios.iterrows():
        print(
            f"{kind} heads: ours is {ratio:.1f} times as fast (median), {with_gram:.1f} times if it first builds the"
            " Gram matrix"
        )
    gram_HKK, times = grams(options), []
    for _ in range(options.rounds):
        all_ours, took = timed(lambda: [strong_rrqr(gram_KK, options.keep, f=options.f) for gram_KK in gram_HKK])
        times.append(took)
    figures = {f"{name}_median_{kind}": ratios[name][kind] for name in ratios for kind in ratios.index}
    figures |= {
        "ratio_of_totals": float(table["textbook_ms"].sum() / table["ours_ms"].sum()),
        "worst_log_volume_difference": float((table["log_volume"] - table["textbook_log_volume"]).min()),
        "all_heads": len(gram_HKK),
        "all_heads_seconds": median(times),
        "all_heads_swaps": sum(ours.swaps for ours in all_ours),
        "all_heads_worst_rho": max(ours.rho for ours in all_ours),
    }
    print(
        f"all of these heads: {figures['ratio_of_totals']:.1f} times as fast;"
        f" worst log-volume difference, ours - textbook: {figures['worst_log_volume_difference']:+.2e}"
    )
    print(
        f"all {len(gram_HKK)} heads, ours: {median(times):.2f} s, {figures['all_heads_swaps']} swaps,"
        f" worst rho {figures['all_heads_worst_rho']:.4f}"
    )
    return figures | {"heads": rows}


def methods_section(options: argparse.Namespace) -> dict:
    """Every method on every target it chooses, for the whole model: from the files on disk to the plan."""
    print(f"\nSelection for {options.layers} layers x {options.heads} heads x {options.channels} channels, half kept")
    print("From opening the checkpoint and the calibration file to the plan; seconds, median, least and most.")
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as name:
        folder, calibration = Path(name) / "model", Path(name) / "calibration.safetensors"
        sizes = {"hidden": options.heads * options.channels, "heads": options.heads, "layers": options.layers}
        config, tensors = describe_model(**sizes)
        write_source(folder, config, {name: tensor for name, tensor in tensors.items() if ".attn." in name})
        gram_LHKK = torch.from_numpy(np.stack(grams(options))).unflatten(0, (options.layers, options.heads))
        write_sums(folder, calibration, gram_LHKK)

        def select(method: str, target: str) -> None:
            cut = Cut.of(PruneRequest(method=method, target=target, ratio="0.5", seed=options.seed))
            source = open_folder(folder)
            cut.plan(source, read_statistics(calibration) if cut.needs_statistics else None, {}, Reporter())

        seconds = {(method.name, target): [] for method in METHODS.values() for target in method.select}
        for _ in range(options.rounds):
            for cell, times in seconds.items():
                times.append(timed(select, *cell)[1])
    for (method, target), times in seconds.items():
        print(f"{method:>10} {target:>6} {median(times):>7.2f} ({min(times):.2f} to {max(times):.2f})")
    slowest = max(seconds, key=lambda cell: median(seconds[cell]))
    print(f"slowest: {' '.join(slowest)}, {median(seconds[slowest]):.2f} s")
    return {f"{method} {target}": median(times) for (method, target), times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--heads", type=int, default=16, help="per layer")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--samples", type=int, default=5000, help="tokens of which a head's activations are drawn")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--f", type=float, default=1.5, help="at least 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--textbook-heads", type=int, default=8, help="how many heads the textbook way gets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    settings["cpus"] = os.cpu_count()
    settings["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS")
    print(", ".join(f"{name} {value}" for name, value in settings.items()), end="\n\n")
    figures = {"settings": settings, "strong_rrqr": strong_rrqr_section(options), "methods": methods_section(options)}
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
