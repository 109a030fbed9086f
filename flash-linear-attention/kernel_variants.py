"""Whether all variants that fla tunes among compute the same: Triton compiles some wrong on some GPUs.

    python flash-linear-attention/kernel_variants.py [--rules delta gated kda] [--sizes 32x128 64x32 ...] [--jobs 8]

Sizes are key x value channels of a head. For each a process sends random inputs through fla's chunked operator, forward
and backward, in bfloat16. Where fla would time the variants of a kernel, all of them run on the same tensors instead,
and each is compared with the first, which is the one that the operator goes on with; so what comes out at the end,
against our backend in float64, says whether the first ones are right. A process that dies (of an illegal memory access,
say) is started again without the variant that it died of. Ends with exit code 1 if anything is wrong.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product

import torch

RULES = ("delta", "gated", "kda")
SIZES = ("128x128", "64x128", "48x128", "32x128", "24x128", "16x128", "32x64", "64x32", "128x32", "32x32")
TOLERANCE = 2e-2  # operands of matrix products have 8 bits
B, T, H = 4, 512, 16


def main() -> None:
    """Try every rule at every size, and print what is wrong as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rules", nargs="*", choices=RULES, default=["delta"])
    parser.add_argument("--sizes", nargs="*", default=SIZES, metavar="KxV")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time: most of the work is compiling")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--one", nargs=3, metavar=("RULE", "KxV", "WITHOUT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        rule, size, without = chosen.one
        run_one(rule, *map(int, size.split("x")), torch.device(chosen.device), json.loads(without))
        return
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    print("| rule | K x V | kernel | variant | what is wrong |\n|---|---|---|---|---|", flush=True)
    wrong = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        pairs = list(product(chosen.rules, chosen.sizes))
        for (rule, size), found in zip(pairs, pool.map(lambda pair: try_all(*pair, chosen.device), pairs), strict=True):
            wrong += len(found)
            for kernel, variant, told in found or [("", "", "nothing")]:
                print(f"| {rule} | {size} | {kernel} | {variant} | {told} |", flush=True)
    sys.exit(1 if wrong else 0)


def try_all(rule: str, size: str, device: str) -> list[tuple[str, str, str]]:
    """Return kernel, variant and what is wrong with it, for a rule and a size; a process does the work."""
    without, fatal = [], []
    command = [sys.executable, __file__, "--device", device, "--one", rule, size]
    while True:
        done = subprocess.run([*command, json.dumps(without)], capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        wrong = [(line["kernel"], line["variant"], line["wrong"]) for line in lines if "wrong" in line]
        if not done.returncode:
            return fatal + wrong
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if not lines or "trying" not in lines[-1]:
            return [*fatal, *wrong, ("", "", why)]
        kernel, variant = lines[-1]["trying"]
        without.append([kernel, variant])
        fatal.append((kernel, variant, next((line for line in done.stderr.splitlines() if "CUDA" in line), why)))


def run_one(rule: str, K: int, V: int, device: torch.device, without: list) -> None:
    """Run one operator at one size, and print a line of JSON for each variant that is tried and each that is wrong."""
    import fla_torch

    if device.type != "cuda":
        fla_torch.enable()
    leaves = draw(rule, K, V, device)
    with comparing(without, tell):
        # fla refuses some backward passes on some GPUs.
        output, gradients = outcome(rule, leaves)
    if device.type == "cuda":
        torch.cuda.synchronize()
    fla_torch.enable(cuda=device.type == "cuda")
    right, right_gradients = outcome(rule, [leaf.detach().double().requires_grad_() for leaf in leaves])
    named = [("output", output, right)]
    if gradients is not None:
        named += zip(("dq", "dk", "dv", "dbeta", "dg"), gradients, right_gradients, strict=False)
    for name, found, expected in named:
        if not (apart := difference(found, expected)) < TOLERANCE:
            tell(kernel=name, variant="the first of each kernel", wrong=f"{apart:.0%} from float64")


def draw(rule: str, K: int, V: int, device: torch.device) -> list[torch.Tensor]:
    """Return query, key, value, beta and, where the rule has one, the log decay, of a head or of a key channel."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    unit = [torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2)]
    leaves = [tensor.bfloat16() for tensor in (*unit, normal(B, T, H, V), normal(B, T, H).sigmoid())]
    if rule != "delta":
        decayed = (B, T, H, K) if rule == "kda" else (B, T, H)
        leaves.append(torch.nn.functional.logsigmoid(normal(*decayed) + 3))
    return [leaf.requires_grad_() for leaf in leaves]


def outcome(rule: str, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Return what an operator gives, and the gradients of its inputs; None where fla refuses to compute them."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    operator = {"delta": chunk_delta_rule, "gated": chunk_gated_delta_rule, "kda": chunk_kda}[rule]
    names = ("q", "k", "v", "beta", "g")
    output, _ = operator(**dict(zip(names, leaves, strict=False)))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    try:
        return output, torch.autograd.grad(output, leaves, direction)
    except RuntimeError as error:
        if "Please upgrade Triton" not in str(error):
            raise
        return output, None


@contextmanager
def comparing(without: list, tell: Callable[..., None]) -> Iterator[None]:
    """While the block runs, Triton's tuning runs each variant once, on the same tensors, and tells which differ.

    Args:
        without: pairs of kernel and variant that are not run.
        tell: called with ``trying`` before a variant, and with ``kernel``, ``variant`` and ``wrong`` where one differs.
    """
    from triton.runtime.autotuner import Autotuner

    given, first = {}, {}  # of a kernel at some shapes: its tensors before any variant ran, and after the first
    plain = Autotuner._bench, Autotuner.__dict__["do_bench"]

    def bench(tuner, *args, config, **more) -> list[float]:
        kernel, variant = tuner.base_fn.__name__, str(config)
        if [kernel, variant] in without:
            return [float("inf")] * 3
        tell(trying=[kernel, variant])
        arguments = (tuner.nargs | more).items()
        tensors = {name: value for name, value in arguments if isinstance(value, torch.Tensor)}
        key = kernel, tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        before = given.setdefault(key, {name: tensor.clone() for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            tensor.data.copy_(before[name])  # some kernels write where they read; autograd need not know
        times = plain[0](tuner, *args, config=config, **more)
        torch.cuda.synchronize()
        if times[0] == float("inf"):  # it does not fit into this GPU
            return times
        expected = first.setdefault(key, {name: tensor.clone() for name, tensor in tensors.items()})
        apart = max((difference(tensor, expected[name]), name) for name, tensor in tensors.items())
        if not apart[0] < TOLERANCE:
            tell(kernel=kernel, variant=variant, wrong=f"{apart[1]} is {apart[0]:.0%} from the first variant's")
        return times

    Autotuner._bench = bench
    Autotuner.do_bench = property(lambda tuner: lambda call, quantiles: (call(), [1.0] * len(quantiles))[1])
    try:
        yield
    finally:
        Autotuner._bench, Autotuner.do_bench = plain


def difference(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``|tensor - expected| / |expected|``; numbers that neither kernel wrote may be NaN in both."""
    tensor, expected = tensor.double(), expected.double()
    is_same = (tensor == expected) | (tensor.isnan() & expected.isnan())
    apart = torch.where(is_same, 0, tensor - expected).norm() / expected.nan_to_num().norm().clamp_min(1e-30)
    return apart.nan_to_num(nan=torch.inf).item()


def tell(**line: object) -> None:
    """Print a line for the process that started this one, at once: the next variant may be the last."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
