"""Run the decode kernel in Triton's interpreter, which must be chosen before Triton is imported: a program of its own.

It prints the relative errors of several steps in a row against the definition in float64, as JSON. Run by
``test_decode_kernel.py``.
"""

import contextlib
import itertools
import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore")

import fla_decode
import torch
import torch.nn.functional as F
from delta_rule_reference import draw_inputs, reference_delta_rule, relative_error
from fla_decode import registry
from state_formats import read, steps_off

# K, V, key heads, value heads, tiling: channels in one part, in one with a rest, in two with one, and several tiles.
SIZES = {
    "whole": (8, 8, 1, 1, None),
    "a rest": (12, 5, 1, 2, None),
    "odd": (23, 40, 2, 4, None),
    "long": (96, 16, 1, 1, fla_decode.Tiling(8, 2, width=16, run=4)),
    "tiles of four": (12, 18, 1, 3, fla_decode.Tiling(4, 1, ".cg", "")),
}
RULES = ("ungated", "gated", "raw")
STEPS = 2


def decode(size: str, rule: str, state_v_first: bool, inplace: bool, dtype: torch.dtype) -> list[float]:
    """Return the relative errors of the outputs and of the last state after `STEPS` steps."""
    K, V, H, W, tiling = SIZES[size]
    query, key, value, beta, log_decay, state = draw_inputs(
        1, B=2, T=STEPS, H=H, W=W, K=K, V=V, gated=rule != "ungated"
    )
    query, key, value, beta = (tensor.to(dtype) for tensor in (query, key, value, beta))
    options = dict(scale=0.3, state_v_first=state_v_first, inplace=inplace, tiling=tiling)
    expected = dict(query=query, key=key, beta=beta, log_decay=log_decay)
    if rule == "raw":
        # The raw gate is what the log decay was; large enough at one place for softplus to be its argument.
        log_decay[0, 0, 0] = 40.0
        A_log, dt_bias = torch.linspace(-3, -2, W), torch.linspace(-1, 1, W)
        options |= dict(A_log_W=A_log, dt_bias_W=dt_bias, normalize=True, beta_is_logit=True, allow_neg_eigval=True)
        expected["log_decay"] = -A_log.double().exp() * F.softplus(log_decay.double() + dt_bias.double())
        expected["beta"] = 2 * beta.double().sigmoid()
        for name in ("query", "key"):
            vector = expected[name].double()
            expected[name] = vector / (vector.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    output_reference, state_reference = reference_delta_rule(
        expected["query"], expected["key"], value, expected["beta"], expected["log_decay"],
        scale=0.3, initial_state=state,
    )  # fmt: skip
    state = (state.mT if state_v_first else state).contiguous()
    outputs = []
    for t in range(STEPS):
        before, copied = state, state.clone()
        gate = None if log_decay is None else log_decay[:, t : t + 1]
        step = (tensor[:, t : t + 1] for tensor in (query, key, value, beta))
        output, state = fla_decode.decode_step(*step, state, gate_B1W=gate, **options)
        assert output.dtype == dtype and state.dtype == torch.float32
        assert (state is before) == inplace
        assert inplace or torch.equal(before, copied)
        outputs.append(output)
    state = state.mT if state_v_first else state
    return [relative_error(torch.cat(outputs, dim=1), output_reference), relative_error(state, state_reference)]


# What states are stored as, one after the other: the layout of int8 is its own, and any can follow any.
FORMATS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "int8": (torch.int8, torch.int8),
    "int8, then float32": (torch.int8, torch.float32),
}
# K, V: in one part, in several (96, 80), in several with a rest, and value channels that no tile divides.
FORMAT_SIZES = ((16, 8), (96, 4), (80, 13), (23, 5), (4, 20))


def store(dtype: torch.dtype, K: int, V: int, rule: str, state_v_first: bool, inplace: bool) -> tuple[float, float]:
    """Return how far states are off, in steps of their format, and the relative error of the output, at worst.

    The first state is float32. Each step is compared with one in float64 from the state that it found.
    """
    query, key, value, beta, log_decay, state = draw_inputs(
        K + V, B=1, T=STEPS + 1, H=1, W=2, K=K, V=V, gated=rule != "ungated"
    )
    state[0, 0] = 0  # nothing was written yet
    state[:, 1] *= 1e-3
    if rule == "forgetting":
        log_decay.fill_(-1000.0)  # the old state counts for nothing, and its decay is 0 in float32
    state = (state.mT if state_v_first else state).contiguous()
    off, worst = [], []
    for t, dtype_after in enumerate((dtype[0], *dtype)):
        step = [tensor[:, t : t + 1] for tensor in (query, key, value, beta)]
        gate = None if log_decay is None else log_decay[:, t : t + 1]
        before = read(state, state_v_first=state_v_first)
        right, exact = reference_delta_rule(*step, gate, scale=0.3, initial_state=before)
        held, is_int8 = state, not torch.is_tensor(state)
        options = dict(gate_B1W=gate, scale=0.3, state_v_first=state_v_first, inplace=inplace)
        output, state = fla_decode.decode_step(*step, state, state_dtype=dtype_after, **options)
        if is_int8 and dtype_after == torch.int8:
            assert all((new is old) == inplace for new, old in zip(state, held, strict=True))
        elif not is_int8 and dtype_after == held.dtype:
            assert (state is held) == inplace
        assert is_int8 == (dtype_after == torch.int8) or state is not held
        if not inplace:
            assert torch.equal(read(held, state_v_first=state_v_first), before)
        off.append(steps_off(state, exact, state_v_first=state_v_first))
        worst.append(relative_error(output, right))
    return max(off), max(worst)


def dispatch() -> dict[str, float]:
    """Return the errors of fla's functions where tensors pass for tensors on CUDA, and how often ours was called."""
    import fla.ops

    # A local name is not replaced, as one that a module of transformers holds in a closure is not.
    held = fla.ops.fused_recurrent_gated_delta_rule
    fla_decode.enable()
    assert held is not fla.ops.fused_recurrent_gated_delta_rule
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    calls, step = [], registry.decode_step
    registry.decode_step = lambda *arguments, **options: calls.append(options) or step(*arguments, **options)
    query, key, value, beta, log_decay, state = draw_inputs(2, B=2, T=1, H=1, W=1, K=6, V=4)
    found = {}
    with torch.no_grad():
        options = dict(initial_state=state, output_final_state=True)
        result = fla.ops.fused_recurrent_delta_rule(query, key, value, beta, scale=0.5, **options)
        reference = reference_delta_rule(query, key, value, beta, scale=0.5, initial_state=state)
        found["ungated"] = max(map(relative_error, result, reference))
        options["initial_state"] = state.mT.contiguous()
        reference = reference_delta_rule(query, key, value, beta, log_decay, scale=6**-0.5, initial_state=state)
        for name, function in {"gated": fla.ops.fused_recurrent_gated_delta_rule, "gated, held": held}.items():
            output, last = function(query, key, value, g=log_decay, beta=beta, state_v_first=True, **options)
            found[name] = max(map(relative_error, (output, last.mT), reference))
    found["calls"] = len(calls)
    return found


def stored_dispatch() -> dict[str, str]:
    """Return what states fla's functions return where `enable` was asked for another format, and what int8 refuses."""
    import fla.ops

    query, key, value, beta, log_decay, state = draw_inputs(3, B=2, T=2, H=1, W=1, K=6, V=4)
    functions = {"ungated": (fla.ops.fused_recurrent_delta_rule, {})}
    functions["gated"] = (fla.ops.fused_recurrent_gated_delta_rule, {"g": log_decay})
    found = {}
    for (name, (function, gate)), dtype in itertools.product(functions.items(), (torch.bfloat16, torch.int8)):
        fla_decode.enable(state_dtype=dtype)
        held = state
        for t in range(2):
            step = {name: tensor[:, t : t + 1] for name, tensor in (gate | {"beta": beta}).items()}
            arguments = [tensor[:, t : t + 1] for tensor in (query, key, value)]
            with torch.no_grad():
                held = function(*arguments, **step, initial_state=held, output_final_state=True)[1]
            # fla's cache holds pairs too, but gives them back as plain tuples.
            held = held if torch.is_tensor(held) else tuple(held)
        title = f"{name}, {str(dtype)[6:]}"
        found[title] = str(held.dtype if torch.is_tensor(held) else held[0].dtype)
        if dtype == torch.int8:
            try:
                function(query, key, value, beta=beta, **gate, initial_state=held, output_final_state=True)
            except ValueError as error:
                found[f"{title}, more tokens"] = str(error)
    return found


if __name__ == "__main__":
    errors = {}
    for index, (size, rule) in enumerate(itertools.product(SIZES, RULES)):
        # Three rules, so each size and each rule comes with both layouts, in place and not.
        v_first, inplace = index % 2 == 0, index % 4 < 2
        name = f"{size}, {rule}, {'v first' if v_first else 'k first'}, {'in place' if inplace else 'new'}"
        errors[name] = decode(size, rule, v_first, inplace, torch.float32)
    half = decode("odd", "gated", False, False, torch.bfloat16)
    formats = {}
    for index, (name, (K, V)) in enumerate(itertools.product(FORMATS, FORMAT_SIZES)):
        rule = ("ungated", "gated", "forgetting")[index % 3]
        v_first, inplace = index % 2 == 0, index % 4 < 2
        title = f"{name}, {K} x {V}, {rule}, {'v first' if v_first else 'k first'}, {'in place' if inplace else 'new'}"
        formats[title] = store(FORMATS[name], K, V, rule, v_first, inplace)
    result = {"float32": errors, "bfloat16": half, "formats": formats, "dispatch": dispatch()}
    result["stored"] = stored_dispatch()
    json.dump(result, sys.stdout)
