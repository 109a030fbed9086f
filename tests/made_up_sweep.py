"""A sweep's folder with figures that were made up, so that what shows them can be tested against arithmetic."""

import json
from collections.abc import Sequence
from pathlib import Path

from keyreduce.sweep.recipe import NO_REPAIR

DENSE = {"one-model": 8.0, "other_model": 4.0}


def factor(method: int, ratio: float, repaired: bool, seed: int) -> float:
    """What a way of pruning makes of the perplexity: the more, the later the method stands."""
    return 1 + ratio**2 * (1 + method) * (0.5 if repaired else 1.0) * (1 + 0.1 * seed)


def speedup(ratio: float) -> float:
    return 1 + ratio / 2


def make_up(
    root: Path,
    *,
    methods: Sequence[str] = ("rrqr", "wanda", "taylor (form squared)"),
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    repairs: Sequence[str] = (NO_REPAIR, "least-squares"),
    seeds: Sequence[int] = (0, 1, 2),
    targets: Sequence[str] = ("key",),
    models: Sequence[str] = tuple(DENSE),
    kinds: Sequence[str] = ("mixer", "decode"),
) -> Path:
    """Write the folder of a sweep, and return it."""
    runs = []
    for model in models:
        steps = {"eval": _evaluation(DENSE[model])}
        runs.append(_run(root, f"dense/{model}", steps, kind="dense", title=f"{model}, dense", model=model))
        for target in targets:
            for number, method in enumerate(methods):
                for ratio in ratios:
                    for repair in repairs:
                        for seed in seeds:
                            perplexity = DENSE[model] * factor(number, ratio, repair != NO_REPAIR, seed)
                            steps = {"prune": _pruning(ratio, seed), "eval": _evaluation(perplexity)}
                            if kinds:
                                steps["benchmark"] = {"result": _timings(kinds, ratio), "seconds": 3.0}
                            if repair != NO_REPAIR:
                                steps["recover"] = {"result": {}, "seconds": 10.0}
                            about = {
                                "model": model,
                                "target": target,
                                "method": method.split()[0],
                                "label": method,
                                "ratio": ratio,
                                "repair": repair,
                                "seed": seed,
                            }
                            name = f"runs/{model}-{target}-{number}-{ratio}-{repair}-{seed}"
                            title = f"{model} {target} {method} {ratio} {repair} {seed}"
                            runs.append(_run(root, name, steps, kind="pruned", title=title, **about))
    timing = {"kinds": list(kinds), "batch_size": 4, "seq_len": 1024, "rounds": 10, "decode_batch_sizes": [1, 8]}
    record = {"recipe": "made/up.toml", "device": "cpu", "jobs": 1, "timing": timing if kinds else None, "runs": runs}
    record["heldout"] = {"text": {"kind": "files", "paths": ["/home/notes.txt"], "files": 1}}
    (root / "sweep.json").write_text(json.dumps(record))
    return root


def _run(root: Path, folder: str, steps: dict, **about) -> dict:
    (root / folder).mkdir(parents=True)
    (root / folder / "result.json").write_text(json.dumps({"settings": {}, "steps": steps}))
    return {"folder": folder, "needs": [], **about}


def _evaluation(perplexity: float) -> dict:
    figures = {"perplexity_per_token": perplexity, "bits_per_byte": perplexity / 4, "predictions": 100}
    return {"result": {"models": [{"label": "dense", **figures}]}, "seconds": 2.0}


def _pruning(ratio: float, seed: int) -> dict:
    state = [1024, round(1024 * (1 - ratio))]
    return {"result": {"made": True, "state_bytes_per_sequence": state}, "seconds": 1.0 + seed}


def _timings(kinds: Sequence[str], ratio: float) -> dict:
    gain = {"speedup": {"median": speedup(ratio), "low": 1.0, "high": 2.0}}
    lesser = {"speedup": {"median": 1.0, "low": 1.0, "high": 1.0}}
    report: dict = {kind: [{"label": "dense"}, {"label": "pruned", **gain}] for kind in kinds if kind != "decode"}
    if "decode" in kinds:
        report["decode"] = [
            {"scope": scope, "label": label, "batch_size": size, "graph": None, "eager": dict(timed)}
            for size, ours in ((1, lesser), (8, gain))
            for scope, theirs in (("model", ours), ("operator", lesser))
            for label, timed in (("dense", {}), ("pruned", theirs))
        ]
    return report
