"""A sweep run: each model calibrated once, then pruned and measured in every way of a recipe."""

import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from keyreduce import __version__
from keyreduce.calibration.run import calibrate
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.find import find_model, model_name
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity, evaluate
from keyreduce.models.loading import load_model
from keyreduce.pruning.methods import method_named
from keyreduce.pruning.planning import check_method, make_plan
from keyreduce.pruning.prune import write_pruned
from keyreduce.sweep.recipe import Cell, Recipe


def run_sweep(
    recipe: Recipe,
    *,
    calibration: TextSource,
    heldout: TextSource,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Prune and measure.

    Args:
        recipe: what to compare.
        calibration, heldout: the texts.
        seed: of the calibration text's order, and of methods that draw.
        device, dtype: where and in what models run.
        progress: called with 1 after each model is calibrated and measured, and after each cell.

    Returns:
        A JSON object: ``settings``, and ``models``, for each its name, the cost of the dense one and ``cells``, each
        with what was done, ``seconds`` of choosing, perplexity per token and bits per byte.

    Raises:
        KeyreduceError: the texts are one and the same, or see the modules that do the work.
    """
    if calibration.identity == heldout.identity:
        raise KeyreduceError("calibration and held-out text are the same; give different ones")

    def measure(folder: Path) -> Perplexity:
        settings = recipe.heldout
        cost, _ = evaluate(
            load_model(folder, device, dtype),
            heldout,
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            num_rows=settings.num_batches * settings.batch_size,
        )
        return cost

    def tell() -> None:
        if progress is not None:
            progress(1)

    sources = [open_folder(find_model(name)) for name in recipe.models]
    for source in sources:
        for cell in recipe.cells:
            method, budget = method_named(cell.method), cell.budget
            check_method(source, method, budget.targets)
            budget.check(source.config, method)
    models = []
    for name, source in zip(recipe.models, sources, strict=True):
        statistics = calibrate(
            source,
            calibration,
            recipe.calibration._replace(seed=seed),
            device=device,
            dtype=dtype,
            gradients=recipe.needs_gradients,
        )
        entry = {"model": model_name(name), "identity": source.identity, **_cost(measure(source.path)), "cells": []}
        tell()
        for cell in recipe.cells:
            entry["cells"].append(_run_cell(source, statistics, cell, seed, measure))
            tell()
        models.append(entry)
    settings = {
        "versions": {"keyreduce": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "seed": seed,
        "calibration": {"text": calibration.describe(), **recipe.calibration._replace(seed=seed)._asdict()},
        "heldout": {"text": heldout.describe(), **recipe.heldout._asdict()},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {"settings": settings, "models": models}


def _run_cell(
    source: Checkpoint, statistics: Statistics, cell: Cell, seed: int, measure: Callable[[Path], Perplexity]
) -> dict:
    method = method_named(cell.method)
    numbers = cell.budget.numbers(source.config, statistics, method, cell.options)
    start = time.perf_counter()
    plan = make_plan(
        source, method, numbers, seed=seed, statistics=statistics, inputs={}, options=cell.options
    )
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as folder:
        write_pruned(source, plan, Path(folder) / "pruned", dense=str(source.path))
        cost = measure(Path(folder) / "pruned")
    return {**cell._asdict(), "label": cell.label, "seconds": seconds, **_cost(cost)}


def _cost(cost: Perplexity) -> dict:
    return {
        "perplexity_per_token": cost.perplexity,
        "bits_per_byte": cost.bits_per_byte,
        "predictions": cost.predictions,
    }
