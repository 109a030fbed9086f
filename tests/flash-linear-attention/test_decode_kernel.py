"""The decode kernel: in Triton's interpreter against the definition, which calls it takes, and on a GPU against fla."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import fla.backends
import fla.ops
import fla_decode
import fla_torch
import pytest
import torch
from delta_rule_reference import draw_inputs, reference_delta_rule, relative_error
from fla.layers import delta_net
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from fla.ops.gated_delta_rule import fused_recurrent, fused_recurrent_gated_delta_rule
from fla_decode import registry, step
from fla_decode.state import FLOATS
from state_formats import read, steps_off
from torch._subclasses import FakeTensorMode

# Not in a fixture: the test modules that are imported after this one must find the dispatched names already.
fla_decode.enable()
fla_decode.disable()


def run_python(*arguments):
    """Run a fresh interpreter and return the finished process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def enabled():
    fla_decode.enable()
    yield
    fla_decode.disable()


@pytest.fixture(scope="module")
def interpreted():
    """What the kernel gives in Triton's interpreter, without a GPU."""
    process = run_python(Path(__file__).with_name("decode_interpreted.py"))
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_steps_equal_the_definition(interpreted):
    assert len(interpreted["float32"]) == 15
    assert {name: errors for name, errors in interpreted["float32"].items() if not max(errors) < 1e-6} == {}


def test_half_precision_rounds_only_the_output(interpreted):
    # bfloat16 keeps 8 bits; the interpreter cuts the others off.
    output, state = interpreted["bfloat16"]
    assert output < 2**-7
    assert state < 1e-6


def test_stored_states_are_rounded_to_their_format(interpreted):
    formats = interpreted["formats"]
    assert len(formats) == 20
    # The interpreter cuts bfloat16 off, where a GPU rounds to nearest: a whole step, not half of one.
    most = {name: 1 if name.startswith("bfloat16") else 0.5 for name in formats}
    assert {name: (off, output) for name, (off, output) in formats.items() if not (off < most[name] + 1e-3)} == {}
    # The output is taken before the rounding.
    assert {name: output for name, (_, output) in formats.items() if not output < 1e-6} == {}


@pytest.mark.parametrize("state_v_first", [False, True])
def test_a_state_becomes_int8_and_comes_back(state_v_first):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 5, 7, generator=generator)
    rows[0, 1, 2] = 0  # a row of zeros has scale 0, and no quotient
    rows[1, 0, 0] = torch.tensor([127.0, 0.5, 1.5, -2.5, -126.5, 3, -127])  # ties go to the even neighbour
    state = rows if state_v_first else rows.mT.contiguous()
    stored = fla_decode.quantize(state, state_v_first=state_v_first)
    assert stored.codes_BWVK.shape == rows.shape and stored.codes_BWVK.is_contiguous()
    assert stored.codes_BWVK[1, 0, 0].tolist() == [127, 0, 2, -2, -126, 3, -127]
    assert stored.codes_BWVK[0, 1, 2].tolist() == [0] * 7 and stored.scales_BWV[0, 1, 2] == 0
    assert stored.nbytes == 2 * 3 * 5 * (7 + 4)
    assert steps_off(stored, rows.mT) < 0.5 + 1e-4
    back = fla_decode.dequantize(stored, state_v_first=state_v_first)
    assert back.shape == state.shape and back.dtype == torch.float32
    assert relative_error(back, read(stored).mT if state_v_first else read(stored)) < 1e-7


def test_functions_of_fla_come_to_the_kernel(interpreted):
    errors = dict(interpreted["dispatch"])
    assert errors.pop("calls") == len(errors) == 3
    assert max(errors.values()) < 1e-6


def test_functions_of_fla_keep_the_state_as_asked(interpreted):
    found = dict(interpreted["stored"])
    for name in ("ungated", "gated"):
        assert "only single tokens can follow" in found.pop(f"{name}, int8, more tokens")
        assert found.pop(f"{name}, int8") == "torch.int8"
        assert found.pop(f"{name}, bfloat16") == "torch.bfloat16"
    assert found == {}


def test_parts_of_a_power_of_two_cover_the_key_channels():
    for K in range(1, 257):
        width = step.part_width(K)
        parts = math.ceil(K / width)
        assert math.log2(width).is_integer() and parts <= 16, K
        assert K % width == 0 or width <= 16, K


def test_common_sizes_waste_no_channel():
    widths = {K: step.part_width(K) for K in (32, 48, 64, 80, 96, 112, 128, 192)}
    assert widths == {32: 32, 48: 16, 64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 192: 64}


@pytest.mark.parametrize("K", [1, 20, 32, 57, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_every_size_has_a_tiling(K, state_v_first):
    sizes = itertools.product([1, 64, 127, 128, 512], [1, 1024, 10**6], (*FLOATS, torch.int8))
    for V, heads, dtype in sizes:
        v_first = state_v_first or dtype == torch.int8
        tiling = step.choose_tiling(K, V, heads=heads, state_v_first=v_first, state_dtype=dtype)
        assert math.log2(tiling.block_v).is_integer() and math.log2(tiling.warps).is_integer()
        # More would not stay in registers.
        numbers = tiling.width * math.ceil(K / tiling.width) * tiling.block_v
        assert numbers <= step.MAX_NUMBERS * 32 * tiling.warps
        assert tiling.width % tiling.run == 0


def fake_call(**changes):
    """Return the arguments of a decoding step, on CUDA as far as Python can tell."""
    with FakeTensorMode():
        arguments = dict(q=(2, 1, 3, 8), k=(2, 1, 3, 8), v=(2, 1, 3, 4), beta=(2, 1, 3), initial_state=(2, 3, 8, 4))
        arguments = {name: torch.empty(shape, device="cuda") for name, shape in arguments.items()}
    return arguments | {"output_final_state": True} | changes


def fake_tensor(*shape, device="cuda", **options):
    with FakeTensorMode():
        return torch.empty(*shape, device=device, **options)


def test_a_decoding_step_is_taken(enabled):
    assert registry.takes_ungated(**fake_call()) == (True, None)
    gates = dict(g=fake_tensor(2, 1, 3), A_log=fake_tensor(3), dt_bias=fake_tensor(3))
    assert registry.takes_gated(**fake_call(**gates, use_gate_in_kernel=True)) == (True, None)
    assert registry.takes_gated_fwd(**fake_call(**gates)) == (True, None)
    half = {name: fake_tensor(2, 1, 3, 8, dtype=torch.bfloat16) for name in ("q", "k")}
    assert registry.takes_ungated(**fake_call(**half))[0]


@pytest.mark.parametrize(
    "reason, changes",
    [
        ("on cpu", {"q": torch.empty(2, 1, 3, 8)}),
        ("more than one token", {"q": fake_tensor(2, 5, 3, 8)}),
        ("packed", {"cu_seqlens": fake_tensor(3)}),
        ("no state", {"initial_state": None}),
        ("none to write", {"output_final_state": False}),
        ("beta is absent", {"beta": None}),
        ("per channel", {"beta": fake_tensor(2, 1, 3, 4)}),
        ("256 key channels", {"k": fake_tensor(2, 1, 3, 257)}),
        ("do not divide", {"v": fake_tensor(2, 1, 4, 4)}),
        ("dtype", {"v": fake_tensor(2, 1, 3, 4, dtype=torch.float64)}),
        ("gradient", {"v": fake_tensor(2, 1, 3, 4, requires_grad=True)}),
    ],
)
def test_what_it_does_not_cover_is_left_to_fla(enabled, reason, changes):
    for takes in (registry.takes_ungated, registry.takes_gated, registry.takes_gated_fwd):
        taken, why = takes(**fake_call(**changes))
        assert not taken
        assert reason in why


@pytest.mark.parametrize("takes", [registry.takes_gated, registry.takes_gated_fwd])
def test_gates_that_it_does_not_cover_are_left_to_fla(enabled, takes):
    for name in ("gk", "gv"):
        assert "per channel" in takes(**fake_call(**{name: fake_tensor(2, 1, 3, 8)}))[1]
    gates = dict(g=fake_tensor(2, 1, 3), A_log=fake_tensor(3, requires_grad=True), use_gate_in_kernel=True)
    if takes is registry.takes_gated_fwd:
        gates.pop("use_gate_in_kernel")
    assert "gradient" in takes(**fake_call(**gates))[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_gate_in_kernel": True, "A_log": fake_tensor(3)},
        {"use_gate_in_kernel": True, "g": fake_tensor(2, 1, 3)},
        {"allow_neg_eigval": True},
        {"transpose_state_layout": True},
    ],
)
def test_what_fla_refuses_or_renames_is_left_to_fla(enabled, arguments):
    assert not registry.takes_gated(**fake_call(**arguments))[0]


def test_without_gradients_leaves_are_no_matter(enabled):
    with torch.no_grad():
        assert registry.takes_ungated(**fake_call(v=fake_tensor(2, 1, 3, 4, requires_grad=True)))[0]


def test_it_is_off_unless_asked_for():
    assert not fla_decode.is_enabled()
    assert registry.takes_ungated(**fake_call()) == (False, "the decode kernel is switched off")
    fla_decode.enable()
    assert fla_decode.is_enabled()
    fla_decode.disable()
    assert not registry.takes_gated(**fake_call())[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_a_format_that_no_state_has_is_refused(dtype):
    with pytest.raises(ValueError, match=f"`state_dtype` is {dtype}"):
        fla_decode.enable(state_dtype=dtype)
    assert not fla_decode.is_enabled()


def test_a_state_in_int8_is_never_left_to_fla(enabled):
    state = fake_tensor(2, 3, 4, 8, dtype=torch.int8), fake_tensor(2, 3, 4)
    assert registry.takes_ungated(**fake_call(initial_state=state)) == (True, None)
    more = fake_call(initial_state=state, q=fake_tensor(2, 5, 3, 8))
    assert registry.takes_ungated(**more)[0]
    with pytest.raises(ValueError, match="only single tokens can follow"):
        registry.fused_recurrent_delta_rule(**more)


def test_on_a_cpu_nothing_changes(enabled, monkeypatch):
    monkeypatch.setattr(registry, "decode_step", lambda *_, **__: pytest.fail("the kernel was called"))
    query, key, value, beta, log_decay, state = draw_inputs(0, B=2, T=1, H=2, W=2, K=6, V=5)
    options = dict(initial_state=state, output_final_state=True)
    output, last = delta_net.fused_recurrent_delta_rule(query, key, value, beta, scale=0.5, **options)
    expected = reference_delta_rule(query, key, value, beta, scale=0.5, initial_state=state)
    assert max(map(relative_error, (output, last), expected)) < 1e-6
    output, last = fused_recurrent_gated_delta_rule(query, key, value, g=log_decay, beta=beta, scale=0.5, **options)
    expected = reference_delta_rule(query, key, value, beta, log_decay, scale=0.5, initial_state=state)
    assert max(map(relative_error, (output, last), expected)) < 1e-6


def test_it_shares_the_names_with_the_other_backend(enabled):
    held = delta_net.fused_recurrent_delta_rule, fused_recurrent.fused_recurrent_gated_delta_rule_fwd
    fla_torch.enable()
    fla_decode.enable(inplace=True)
    assert held[0] is delta_net.fused_recurrent_delta_rule is fla.ops.fused_recurrent_delta_rule
    assert held[1] is fused_recurrent.fused_recurrent_gated_delta_rule_fwd


def test_the_other_backend_may_come_later():
    program = """
import fla_decode, torch
fla_decode.enable()
import fla_torch
fla_torch.enable()
from fla.layers.delta_net import fused_recurrent_delta_rule
from fla.ops import fused_recurrent_gated_delta_rule
x = torch.ones(1, 1, 1, 2)
options = dict(initial_state=torch.zeros(1, 1, 2, 2), output_final_state=True, scale=1.0)
print(fused_recurrent_delta_rule(x, x, x, x[..., 0], **options)[0].tolist())
print(fused_recurrent_gated_delta_rule(x, x, x, beta=x[..., 0], **options)[0].tolist())
"""
    process = run_python("-c", program)
    assert process.stdout.splitlines() == ["[[[[2.0, 2.0]]]]"] * 2, process.stderr


def test_a_registry_that_is_switched_off_is_named(monkeypatch):
    monkeypatch.setattr(registry, "_is_placed", False)
    monkeypatch.setattr(fla.backends, "_DISPATCH_DISABLED", True)
    with pytest.raises(fla_decode.UnsupportedVersionError, match=r"FLA_DISABLE_BACKEND_DISPATCH=1.*unset it"):
        fla_decode.enable()
    assert not fla_decode.is_enabled()


@pytest.mark.parametrize("name", [place[:2] for place in registry.PLACES])
def test_a_version_that_works_is_named_where_a_function_is_missing(monkeypatch, name):
    monkeypatch.setattr(registry, "_is_placed", False)
    monkeypatch.delattr(sys.modules[name[0]], name[1])
    with pytest.raises(fla_decode.UnsupportedVersionError, match=f"{name[1]}.*flash-linear-attention==0.6.0"):
        fla_decode.enable()
    assert not fla_decode.is_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("K, V", [(128, 128), (96, 128), (64, 128), (32, 128), (57, 80), (256, 127), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_steps_equal_the_definition(K, V, state_v_first, dtype):
    inputs = draw_inputs(K, B=3, T=4, H=2, W=4, K=K, V=V, device="cuda")
    query, key, value, beta = (tensor.to(dtype) for tensor in inputs[:4])
    log_decay, state = inputs[4:]
    cpu = [tensor.cpu() for tensor in (query, key, value, beta, log_decay)]
    expected = reference_delta_rule(*cpu, scale=K**-0.5, initial_state=state.cpu())
    state, outputs = (state.mT if state_v_first else state).contiguous(), []
    for t in range(4):
        arguments = (tensor[:, t : t + 1] for tensor in (query, key, value, beta))
        output, state = fla_decode.decode_step(
            *arguments, state, gate_B1W=log_decay[:, t : t + 1], state_v_first=state_v_first
        )
        outputs.append(output)
    assert relative_error(torch.cat(outputs, dim=1).cpu(), expected[0]) < (1e-6 if dtype == torch.float32 else 2**-8)
    assert relative_error((state.mT if state_v_first else state).cpu(), expected[1]) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("K, V", [(128, 128), (96, 104), (80, 104), (64, 64), (32, 128), (57, 80), (256, 127), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_on_a_gpu_stored_states_round_to_nearest(K, V, state_v_first, dtype):
    inputs = draw_inputs(K + V, B=3, T=4, H=2, W=4, K=K, V=V, device="cuda")
    state = (inputs[-1].mT if state_v_first else inputs[-1]).contiguous()
    for t in range(4):
        *arguments, gate = (tensor[:, t : t + 1] for tensor in inputs[:-1])
        before = read(state, state_v_first=state_v_first).cpu()
        cpu = [tensor.cpu() for tensor in (*arguments, gate)]
        right, exact = reference_delta_rule(*cpu, scale=K**-0.5, initial_state=before)
        options = dict(state_v_first=state_v_first, state_dtype=dtype, inplace=t % 2 == 1)
        output, state = fla_decode.decode_step(*arguments, state, gate_B1W=gate, **options)
        host = state.cpu() if torch.is_tensor(state) else tuple(part.cpu() for part in state)
        assert steps_off(host, exact, state_v_first=state_v_first) < 0.5 + 1e-3
        assert relative_error(output.cpu(), right) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_on_a_gpu_overlapping_launches_wait_for_each_other(inplace):
    inputs = draw_inputs(0, B=64, T=32, H=16, W=16, K=128, V=128, device="cuda")

    def decode(overlaps):
        state, outputs = inputs[-1].clone(), []
        for t in range(32):
            *step, gate = (tensor[:, t : t + 1] for tensor in inputs[:-1])
            tiling = fla_decode.Tiling(32, 4, overlaps=overlaps)
            output, state = fla_decode.decode_step(*step, state, gate_B1W=gate, inplace=inplace, tiling=tiling)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    expected = decode(False)
    for found, right in zip(decode(True), expected, strict=True):
        assert torch.equal(found, right)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = decode(True)
    graph.replay()
    for found, right in zip(recorded, expected, strict=True):
        assert torch.equal(found, right)


def tiny_model(family):
    sizes = dict(hidden_size=96, num_hidden_layers=2, vocab_size=50, num_heads=2, initializer_range=0.2)
    torch.manual_seed(0)
    if family == "delta_net":
        return DeltaNetForCausalLM(DeltaNetConfig(**sizes)).eval().cuda()
    config = GatedDeltaNetConfig(**sizes, head_dim=24, expand_v=2, num_v_heads=4)
    return GatedDeltaNetForCausalLM(config).eval().cuda()


def decode_tokens(model):
    """Return the logits of 6 tokens at once and 6 one by one, and the states after them."""
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1)).cuda()
    prefill = model(ids[:, :6], use_cache=True)
    logits, cache = [prefill.logits], prefill.past_key_values
    for t in range(6, 12):
        result = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        logits, cache = [*logits, result.logits], result.past_key_values
    return torch.cat(logits, dim=1), [layer["recurrent_state"] for layer in cache]


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
@torch.no_grad()
def test_on_a_gpu_models_decode_by_it(monkeypatch, family, inplace):
    model = tiny_model(family)
    expected, steps, ours = decode_tokens(model)[0], [], registry.decode_step
    monkeypatch.setattr(registry, "decode_step", lambda *a, **b: steps.append(b["inplace"]) or ours(*a, **b))
    fla_decode.enable(inplace=inplace)
    try:
        actual = decode_tokens(model)[0]
    finally:
        fla_decode.disable()
    assert steps == [inplace] * 12
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, within", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.int8, 3e-2)])
@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
@torch.no_grad()
def test_on_a_gpu_models_keep_their_states_in_fewer_bytes(family, dtype, within):
    # An int8 code is off by 1 / (127 * 12**0.5) of its row's largest number, which is some three times the rest, and
    # twelve steps round anew: 0.0023 * 3 * 12**0.5 = 0.024. On an H100 0.0235 was seen.
    model = tiny_model(family)
    expected, wide = decode_tokens(model)
    fla_decode.enable(state_dtype=dtype)
    try:
        actual, states = decode_tokens(model)
    finally:
        fla_decode.disable()
    assert 0 < relative_error(actual, expected) < within
    for state, full in zip(states, wide, strict=True):
        if dtype == torch.int8:
            assert sum(part.nbytes for part in state) < 0.3 * full.nbytes
        else:
            assert state.dtype == dtype and state.shape == full.shape
