"""How the backend takes its place in fla: where, when, how often, and what it says where it cannot."""

import inspect
import os
import subprocess
import sys

import fla.ops
import fla_torch
import pytest
import torch
from fla.layers import delta_net, gated_deltanet
from fla.modules.fused_cross_entropy import FusedCrossEntropyLoss
from fla.ops.gated_delta_rule import fused_recurrent
from fla_torch import registry
from torch._subclasses import FakeTensorMode


def run_python(program, **environment):
    """Run a program in a fresh interpreter and return the finished process."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def on_cuda_too():
    fla_torch.enable(cuda=True)
    yield
    fla_torch.enable()


def dispatched_names():
    return [
        delta_net.chunk_delta_rule,
        delta_net.fused_recurrent_delta_rule,
        gated_deltanet.chunk_gated_delta_rule,
        fused_recurrent.fused_recurrent_gated_delta_rule_fwd,
        FusedCrossEntropyLoss.forward,
    ]


def test_enabling_twice_changes_nothing():
    before = dispatched_names()
    fla_torch.enable()
    for name, again in zip(before, dispatched_names(), strict=True):
        assert again is name


def test_every_name_of_an_operator_holds_the_same_function():
    for name in ("chunk_delta_rule", "fused_recurrent_delta_rule"):
        held = getattr(delta_net, name)
        assert getattr(fla.ops, name) is getattr(fla.ops.delta_rule, name) is held
        assert getattr(sys.modules[inspect.unwrap(held).__module__], name) is held


def fake_tensor(device):
    with FakeTensorMode():
        return torch.empty(2, device=device)


def test_tensors_on_cuda_are_left_to_fla():
    assert registry.is_taken(torch.empty(2)) == (True, "tensors are on cpu")
    assert registry.is_taken(x=torch.empty(2), weight=None)[0]
    assert registry.is_taken(None, fake_tensor("cuda")) == (False, "tensors are on cuda")
    assert not registry.is_taken(x=fake_tensor("cuda"))[0]
    assert not registry.is_taken(torch.empty(2, device="meta"))[0]
    assert not registry.is_taken(None, 1.0)[0]


def test_tensors_on_cuda_are_taken_where_asked_for(on_cuda_too):
    assert registry.is_taken(fake_tensor("cuda"))[0]
    assert registry.is_taken(torch.empty(2))[0]


def test_single_operations_on_cuda():
    try:
        registry.enable(cuda=("gated_delta_rule",))
        assert registry.is_taken(fake_tensor("cuda"), operation="gated_delta_rule")[0]
        assert not registry.is_taken(fake_tensor("cuda"), operation="kda")[0]
        assert not registry.is_taken(fake_tensor("cuda"))[0]
        with pytest.raises(ValueError, match="no operation delta_rule; there are gated_delta_rule, kda"):
            registry.enable(cuda=("delta_rule",))
    finally:
        registry.enable()
    assert not registry.is_taken(fake_tensor("cuda"), operation="gated_delta_rule")[0]


def test_fla_kernel_runs_where_ours_does_not(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    taken = []
    monkeypatch.setattr(registry.operators, "_delta_rule", lambda *_, **__: taken.append(True))
    query = torch.zeros(1, 2, 1, 4)
    # fla's own function is reached: it is the one that refuses float32.
    with pytest.raises(AssertionError, match="does not support float32"):
        delta_net.chunk_delta_rule(query, query, query, query[..., 0])
    assert not taken


@pytest.mark.parametrize(
    "module, name",
    [
        ("fla.modules.norm.l2norm", "l2norm_fwd"),
        ("fla.ops.delta_rule.chunk", "chunk_delta_rule"),
        ("fla.ops.gated_delta_rule.chunk", "chunk_gated_delta_rule"),
        ("fla.backends", "register"),
    ],
)
def test_a_version_that_works_is_named_where_a_function_is_missing(monkeypatch, module, name):
    monkeypatch.setattr(registry, "_is_enabled", False)
    monkeypatch.delattr(sys.modules[module], name)
    with pytest.raises(fla_torch.UnsupportedVersionError, match=f"{name}.*flash-linear-attention==0.6.0"):
        fla_torch.enable()


def test_a_version_that_works_is_named_where_a_module_is_missing(monkeypatch):
    monkeypatch.setattr(registry, "_is_enabled", False)
    monkeypatch.setitem(sys.modules, "fla.modules.norm.l2norm", None)
    with pytest.raises(ImportError, match=r"fla.modules.norm.l2norm.*flash-linear-attention==0.6.0"):
        fla_torch.enable()


def test_a_package_that_fla_needs_is_named():
    process = run_python("import sys; sys.modules['triton'] = None; import fla_torch; fla_torch.enable()")
    last_line = process.stderr.strip().splitlines()[-1]
    assert last_line.endswith("UnsupportedVersionError: flash-linear-attention needs triton: pip install triton")


def test_a_registry_that_is_switched_off_is_named():
    process = run_python("import fla_torch; fla_torch.enable()", FLA_DISABLE_BACKEND_DISPATCH="1")
    last_line = process.stderr.strip().splitlines()[-1]
    assert last_line.startswith("fla_torch.registry.UnsupportedVersionError: FLA_DISABLE_BACKEND_DISPATCH=1")
    assert last_line.endswith("unset it")


def test_import_is_silent_and_leaves_fla_alone():
    process = run_python("import fla_torch, sys; print([name for name in sys.modules if name.split('.')[0] == 'fla'])")
    assert process.stdout.strip() == "[]"
    assert process.stderr == ""
