"""benchmarks/repair_diagnosis.py, with a tiny model on a CPU: its parts against the product's, and whole models."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build, save

from keyreduce.calibration.run import Settings
from keyreduce.data.text import FileText
from keyreduce.models.loading import load_model
from keyreduce.recovery.layers import recover_layers
from keyreduce.recovery.least_squares import NormalEquations

CPU = torch.device("cpu")


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("repair_diagnosis")


def test_the_diagnosis_is_of_the_repair_that_keyreduce_makes(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "HELDOUT_LENGTH", 72)
    folder = save(build("delta_net", initializer_range=0.1), tmp_path / "model")
    texts = {name: tmp_path / f"{name}.jsonl" for name in ("calibration", "heldout")}
    for name, path in texts.items():
        path.write_text("".join(f'{{"text": "{name} {n} is {n * n}, yes"}}\n' for n in range(400)))
    words = ["--model", folder, *(word for name, path in texts.items() for word in (f"--{name}", path))]
    words += ["--ratio", 0.5, 0.25, "--method", "l2", "--num-batches", 8, "--batch-size", 2, "--seq-len", 70]
    words += ["--heldout-rows", 4, "--device", "cpu", "--output", tmp_path / "report.json"]
    taken = ["weighted tokens", "own input, half", "down projection", "scales", "rank 1/4", "toward identity"]
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words), "--only", *taken, "toward zero"])
    kept = []
    measure = module.Diagnosis.measure
    monkeypatch.setattr(module.Diagnosis, "measure", lambda self: kept.append(self) or measure(self))
    module.main()
    (diagnosis,) = kept
    report = json.loads((tmp_path / "report.json").read_text())

    # Of a whole model, the loss on the held-out rows.
    loaded = load_model(folder, CPU, torch.float32)
    (tokens_BT,) = (diagnosis.batches[place] for place in diagnosis.heldout)
    with torch.no_grad():
        logits_BTV = loaded.model(tokens_BT).logits
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert report["dense"]["heldout"] == pytest.approx(float(loss), rel=1e-5)
    assert report["variants"].keys() == {"least squares", *taken, "toward zero"}
    for name, one in report["variants"].items():
        assert math.isfinite(one["heldout"]) and one["in_sample"] > 0, name
    losses = [one["heldout"] for one in report["variants"].values()]
    assert len(set(losses)) == len(losses)
    first, last = report["layers"].values()
    assert first["relative_error"] < 1e-12 < last["relative_error"]
    assert report["sums"]["0"]["all"] == report["sums"]["0"]["squares"] == report["sums"]["0"]["vectors"] > 0
    assert report["few_rows"]["dense"] == report["dense"]["heldout"] != report["few_rows"]["repaired"]
    # Cutting the last layer alone is sparing the first one, of two.
    assert (first["alone"], last["alone"]) == pytest.approx((last["spared"], first["spared"]), rel=1e-6)
    printed = capsys.readouterr().out
    rises = [100 * math.expm1(one["heldout"] - loss) for one in (report["pruned"], report["variants"]["least squares"])]
    for name, rise in zip(("none", "least squares"), rises, strict=True):
        assert f"| {name} | {rise:+.2f}% |" in printed
    undone = 100 * math.expm1(last["undone"] - report["few_rows"]["repaired"])
    (line,) = (line for line in printed.splitlines() if line.startswith("| 1 |") and line.count("|") == 10)
    assert line.split(" | ")[3] == f"{undone:+.2f}%"

    # The refit is the one of `keyreduce recover`.
    diagnosis.repair(module.Variant())
    repaired = {name: one.detach().clone() for name, one in diagnosis.pruned.named_parameters()}
    with torch.no_grad():
        for name, parameter in diagnosis.pruned.named_parameters():
            parameter.copy_(diagnosis.kept[name])
    pruned = loaded._replace(model=diagnosis.pruned)
    recover_layers(loaded, pruned, {}, FileText([texts["calibration"]]), Settings(8, 2, 70), steps=None, device=CPU)
    for name, parameter in diagnosis.pruned.named_parameters():
        torch.testing.assert_close(repaired[name], parameter, rtol=1e-4, atol=1e-5)


def test_other_penalties_solve_their_problems(module):
    """Each against the plain least squares of its own parameters, with next to no penalty; and with a large one."""
    torch.manual_seed(0)
    shapes = ((90, 6), (90, 8), (8, 6))
    inputs_NC, residual_ND, weight_DC = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    sums = NormalEquations(6, 8)
    sums.add(inputs_NC, residual_ND)

    def solved(**fields):
        (correction_DC,) = module.solve(module.Variant(**fields), weight_DC, sums, fields.pop("strengths", [1e-12]))
        return correction_DC

    plain_DC = torch.linalg.lstsq(inputs_NC, residual_ND).solution.T
    for toward in ("projection", "zero"):
        torch.testing.assert_close(solved(toward=toward), plain_DC, rtol=1e-6, atol=1e-6)
    given_ND = inputs_NC @ weight_DC.T
    left_ND = residual_ND - inputs_NC @ solved(toward="identity").T
    assert (given_ND.T @ left_ND).abs().max() < 1e-6  # what it gave explains nothing of what is left
    scale_C = solved(toward="scales") / weight_DC
    torch.testing.assert_close(scale_C, scale_C[:1].expand_as(scale_C))
    basis = torch.stack([(inputs_NC[:, [one]] * weight_DC[:, one]).flatten() for one in range(6)], dim=1)
    wanted = torch.linalg.lstsq(basis, residual_ND.flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(scale_C[0], wanted, rtol=1e-6, atol=1e-6)
    assert torch.linalg.matrix_rank(solved(rank=0.25)) == 2
    # With an endless penalty nothing changes, or all is taken away.
    assert solved(strengths=[1e12]).abs().max() < 1e-9
    torch.testing.assert_close(solved(strengths=[1e12], toward="zero"), -weight_DC, rtol=1e-6, atol=1e-6)
