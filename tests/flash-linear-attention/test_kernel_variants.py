"""The script that looks for wrong variants of fla's kernels: what is wrong to it, and how it goes on after a crash."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.autotuner import Autotuner

SCRIPT = Path(__file__).parents[2] / "flash-linear-attention/kernel_variants.py"
SPEC = importlib.util.spec_from_file_location("kernel_variants", SCRIPT)
kernel_variants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kernel_variants)


def test_what_neither_wrote_is_no_difference():
    nan = torch.nan
    assert kernel_variants.difference(torch.tensor([3.0, 4.0, nan]), torch.tensor([3.0, 4.0, nan])) == 0
    assert kernel_variants.difference(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert kernel_variants.difference(torch.tensor([3.0, nan]), torch.tensor([3.0, 4.0])) == torch.inf


def test_each_variant_gets_the_same_tensors_and_is_compared_with_the_first(monkeypatch):
    """A kernel that doubles its input in place, of which one variant adds something."""

    def launch(tuner, *args, config, **more):
        if config == "too large":
            return [float("inf")] * 3
        more["x"].mul_(2).add_(1 if config == "wrong" else 0)
        return [1.0] * 3

    monkeypatch.setattr(Autotuner, "_bench", launch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    do_bench, told = Autotuner.__dict__["do_bench"], []
    tuner, x = SimpleNamespace(base_fn=launch, nargs={"n": 1}), torch.ones(4)
    with kernel_variants.comparing([["launch", "left out"]], lambda **line: told.append(line)):
        variants = ("first", "left out", "too large", "wrong", "right")
        times = [Autotuner._bench(tuner, config=variant, x=x)[0] for variant in variants]
        assert Autotuner.do_bench.fget(None)(lambda: told.append("called"), quantiles=(0.5, 0.2, 0.8)) == [1.0] * 3
    assert times == [1, torch.inf, torch.inf, 1, 1]
    assert [line["trying"][1] for line in told if "trying" in line] == ["first", "too large", "wrong", "right"]
    assert [line for line in told if "wrong" in line] == [
        {"kernel": "launch", "variant": "wrong", "wrong": "x is 50% from the first variant's"}
    ]
    assert told[-1] == "called" and x.eq(2).all()
    assert Autotuner._bench is launch and Autotuner.__dict__["do_bench"] is do_bench


def test_after_a_crash_it_goes_on_without_the_variant(monkeypatch):
    asked = []

    def run(command, **more):
        without = json.loads(command[-1])
        asked.append(without)
        lines = [{"trying": ["bwd", "a"]}, {"kernel": "bwd", "variant": "a", "wrong": "dv is 90% from the first's"}]
        if without:
            return SimpleNamespace(returncode=0, stdout="".join(f"{json.dumps(line)}\n" for line in lines), stderr="")
        stdout = "a word of fla's\n" + json.dumps({"trying": ["bwd", "b"]})
        return SimpleNamespace(returncode=1, stdout=stdout, stderr="Trace\nCUDA error: illegal\nCompile with\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert kernel_variants.try_all("delta", "32x64", "cuda") == [
        ("bwd", "b", "CUDA error: illegal"),
        ("bwd", "a", "dv is 90% from the first's"),
    ]
    assert asked == [[], [["bwd", "b"]]]
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: SimpleNamespace(returncode=1, stdout="", stderr="ImportError: fla")
    )
    assert kernel_variants.try_all("delta", "32x64", "cuda") == [("", "", "ImportError: fla")]


@pytest.mark.parametrize("rule", kernel_variants.RULES)
def test_the_operators_are_those_of_the_backend_in_float64(rule, monkeypatch, capsys):
    for name, size in {"B": 1, "T": 70, "H": 2}.items():
        monkeypatch.setattr(kernel_variants, name, size)
    kernel_variants.run_one(rule, 16, 32, torch.device("cpu"), [])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(kernel_variants, "TOLERANCE", 1e-6)
    kernel_variants.run_one(rule, 16, 32, torch.device("cpu"), [])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["kernel"] for line in told} >= {"output", "dq", "dk", "dv", "dbeta"}


@pytest.mark.parametrize(("found", "code"), [([], 0), ([("bwd", "4 warps", "wrong")], 1)])
def test_the_table_says_what_is_wrong(found, code, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernel_variants.py", "--sizes", "32x64", "--device", "cpu"])
    monkeypatch.setattr(kernel_variants, "try_all", lambda *given: found)
    with pytest.raises(SystemExit) as ended:
        kernel_variants.main()
    assert ended.value.code == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("| delta | 32x64 | bwd | 4 warps | wrong |" if found else "| delta | 32x64 |  |  | nothing |")


@pytest.mark.gpu
def test_at_64_channels_no_variant_of_the_ungated_rule_is_wrong():
    assert kernel_variants.try_all("delta", "64x64", "cuda") == []
