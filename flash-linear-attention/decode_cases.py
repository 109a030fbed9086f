"""What decode_benchmark.py times: inputs, fla's functions, and the float64 step that both are checked with.

Shapes: B sequences, H key heads, W value heads, K key channels, V value channels.
"""

from typing import NamedTuple

import fla.ops
import torch
from fla_decode.step import TILINGS, Tiling, decode_step

H, V = 16, 128


class Case(NamedTuple):
    """How a rule is called: by whom, and so with what."""

    name: str
    is_gated: bool
    is_raw: bool
    normalize: bool
    state_v_first: bool


CASES = (
    Case("ungated, the kernel alone", False, False, False, False),
    Case("ungated, as fla's DeltaNet calls it", False, False, True, False),
    Case("gated, as transformers' models call it", True, False, True, False),
    Case("gated, as fla's GatedDeltaNet calls it", True, True, True, True),
)
# K, V, value heads of a key head.
SIZES = [(K, 128, 1) for K in (128, 96, 64, 32)] + [(48, 128, 2), (57, 80, 2), (103, 127, 4), (16, 256, 1)]


def draw(case: Case, B: int, K: int, *, W: int = H, V: int = V, seed: int = 0) -> dict:
    """Return random inputs of `decode_step`, bfloat16 with a float32 state."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    inputs = dict(query_B1HK=normal(B, 1, H, K), key_B1HK=normal(B, 1, H, K), value_B1WV=normal(B, 1, W, V))
    if not case.normalize:
        inputs["key_B1HK"] = torch.nn.functional.normalize(inputs["key_B1HK"], dim=-1)
    beta = normal(B, 1, W)
    inputs["beta_B1W"] = beta if case.is_raw else beta.sigmoid()
    inputs["state"] = normal(*((B, W, V, K) if case.state_v_first else (B, W, K, V)), dtype=torch.float32)
    inputs |= dict(normalize=case.normalize, state_v_first=case.state_v_first, beta_is_logit=case.is_raw)
    if case.is_raw:
        inputs |= dict(gate_B1W=normal(B, 1, W), A_log_W=torch.linspace(-1, 1, W, device="cuda"))
        inputs |= dict(dt_bias_W=torch.linspace(-2, 0, W, device="cuda"))
    elif case.is_gated:
        inputs["gate_B1W"] = torch.nn.functional.logsigmoid(normal(B, 1, W, dtype=torch.float32) + 2)
    return inputs


def call_fla(case: Case, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """What `decode_step` computes, by fla."""
    arguments = [inputs[name] for name in ("query_B1HK", "key_B1HK", "value_B1WV")]
    options = dict(initial_state=inputs["state"], output_final_state=True, beta=inputs["beta_B1W"])
    options["use_qk_l2norm_in_kernel"] = case.normalize
    if not case.is_gated:
        return fla.ops.fused_recurrent_delta_rule(*arguments, **options)
    options |= dict(g=inputs["gate_B1W"], state_v_first=case.state_v_first)
    if case.is_raw:
        options |= dict(use_gate_in_kernel=True, A_log=inputs["A_log_W"], dt_bias=inputs["dt_bias_W"])
        options |= dict(use_beta_sigmoid_in_kernel=True)
    return fla.ops.fused_recurrent_gated_delta_rule(*arguments, **options)


def reference(case: Case, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The step as its definition reads, in float64."""
    query, key, value, beta, state = (
        inputs[name].double() for name in ("query_B1HK", "key_B1HK", "value_B1WV", "beta_B1W", "state")
    )
    query, key = (tensor[:, 0].repeat_interleave(value.shape[2] // H, dim=1) for tensor in (query, key))
    value, beta = value[:, 0], beta[:, 0]
    state = state.mT if case.state_v_first else state
    if case.normalize:
        query, key = (tensor / (tensor.square().sum(-1, keepdim=True) + 1e-6).sqrt() for tensor in (query, key))
    beta = beta.sigmoid() if case.is_raw else beta
    if case.is_gated:
        gate = inputs["gate_B1W"].double()[:, 0]
        if case.is_raw:
            rate = inputs["A_log_W"].double().exp()
            gate = -rate * torch.nn.functional.softplus(gate + inputs["dt_bias_W"].double())
        state = state * gate.exp()[..., None, None]
    update = beta[..., None] * (value - torch.einsum("bwkv,bwk->bwv", state, key))
    state = state + key[..., None] * update[..., None, :]
    output = torch.einsum("bwkv,bwk->bwv", state, query) * query.shape[-1] ** -0.5
    return output[:, None], state.mT if case.state_v_first else state


@torch.inference_mode()
def errors(case: Case, K: int, V: int, tiling: Tiling | None, *, B: int, group: int = 1) -> dict[str, float]:
    """Return the largest relative errors of output (bfloat16) and state, over a new state and one in place.

    Raises:
        ValueError: they are larger than rounding.
    """
    worst = {"output": 0.0, "state": 0.0}
    for inplace in (False, True):
        inputs = draw(case, B, K, W=H * group, V=V, seed=K)
        expected = reference(case, inputs)
        found = decode_step(**inputs, tiling=tiling, inplace=inplace)
        for name, ours, right in zip(worst, found, expected, strict=True):
            error = ((ours.double() - right).norm() / right.norm()).item()
            if not error < {"output": 4e-3, "state": 1e-6}[name]:
                raise ValueError(f"{case.name}, K={K}, V={V}, {tiling}: {name} is off by {error:.1e}")
            worst[name] = max(worst[name], error)
    return worst


def check_one(work: tuple[Case, int, Tiling], *, B: int) -> str | None:
    """Return what is wrong with a tiling, if anything: it may also not compile."""
    case, K, tiling = work
    try:
        errors(case, K, V, tiling, B=B)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def check_sizes(work: tuple[Case, tuple[int, int, int]]) -> dict[str, float]:
    """Return the errors of a case at one of `SIZES`, at two of them with every tiling in use."""
    case, (K, V, group) = work
    tilings = [None, *TILINGS[case.state_v_first].values()] if K in (96, 57) else [None]
    found = [errors(case, K, V, tiling, B=3, group=group if case.is_gated else 1) for tiling in tilings]
    return {name: max(each[name] for each in found) for name in found[0]}
