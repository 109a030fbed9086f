"""fla's losses on a CPU against ``torch.nn.functional.cross_entropy``. Shapes: N predictions, C classes, D channels."""

import pytest
import torch
import torch.nn.functional as F
from fla.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss
from fla.modules.fused_cross_entropy import cross_entropy_loss
from torch.testing import assert_close

N, C, D = 37, 11, 8
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"logit_scale": 0.5},
    {"logit_softcapping": 2.0},
    {"lse_square_scale": 0.3},
    {"label_smoothing": 0.2, "logit_scale": 3.0, "logit_softcapping": 2.0, "lse_square_scale": 0.1},
]


def draw(ignore_index=-100, dtype=torch.float64):
    """Return logits and targets, of which a few are to be ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(N, C, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    target = torch.randint(C, (N,), generator=generator)
    target[::5] = ignore_index
    return logits, target


def reference_losses(
    logits, target, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, logit_softcapping=None,
    ignore_index=-100,
):  # fmt: skip
    """Return the loss of each prediction, z-loss included, and the z-loss alone."""
    logits = logits * logit_scale
    if logit_softcapping is not None:
        logits = logit_softcapping * torch.tanh(logits / logit_softcapping)
    loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index)
    z_loss = lse_square_scale * logits.logsumexp(dim=1).square() * (target != ignore_index)
    return loss + z_loss, z_loss


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_losses_and_gradients(options, ignore_index):
    logits, target = draw(ignore_index)
    losses = cross_entropy_loss(logits, target, ignore_index=ignore_index, **options)
    expected = reference_losses(logits, target, ignore_index=ignore_index, **options)
    assert_close(losses, expected)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    actual, wanted = (torch.autograd.grad((loss[0] * weights).sum(), logits) for loss in (losses, expected))
    assert_close(actual, wanted)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module(reduction, options):
    logits, target = draw()
    losses = FusedCrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)(logits, target)
    expected = reference_losses(logits, target, **options)
    if reduction != "none":
        counted = (target != -100).sum() if reduction == "mean" else 1
        expected = tuple(loss.sum() / counted for loss in expected)
    assert_close(losses, expected)
    actual, wanted = (torch.autograd.grad(loss[0].sum(), logits) for loss in (losses, expected))
    assert_close(actual, wanted)


def test_z_loss_is_for_logging_and_has_no_gradient_of_its_own():
    logits, target = draw()
    loss, z_loss = FusedCrossEntropyLoss(lse_square_scale=0.3, return_z_loss=True)(logits, target)
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert z_loss > 0
    assert_close(torch.autograd.grad(loss + z_loss, logits)[0], expected)


def test_gradient_is_written_over_the_logits_where_asked_for():
    logits, target = draw()
    values = logits.detach().clone()
    (expected,) = torch.autograd.grad(cross_entropy_loss(logits, target)[0].sum(), logits)
    (actual,) = torch.autograd.grad(cross_entropy_loss(logits, target, inplace_backward=True)[0].sum(), logits)
    assert_close(actual, expected)
    assert not torch.equal(logits, values)
    assert_close(logits.detach(), expected)


def test_targets_of_thirty_two_bits():
    logits, target = draw()
    assert_close(cross_entropy_loss(logits, target.int()), cross_entropy_loss(logits, target))


def test_sixteen_bit_logits_give_a_float32_loss():
    logits, target = draw(dtype=torch.bfloat16)
    loss = FusedCrossEntropyLoss()(logits, target)
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy(logits.float(), target))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_a_sharded_vocabulary_is_refused():
    logits, target = draw()
    with pytest.raises(ValueError, match="shard"):
        cross_entropy_loss(logits, target, process_group=object())
    with pytest.raises(ValueError, match="shard"):
        FusedCrossEntropyLoss(process_group=object())(logits, target)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "logit_scale": 0.5, "logit_softcapping": 2.0}])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("chunks", [1, 8])
def test_linear_map_and_loss_in_one(chunks, biased, reduction, options):
    _, target = draw()
    generator = torch.Generator().manual_seed(1)
    shapes = [(N, D), (C, D)] + ([(C,)] if biased else [])
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    bias = leaves[2] if biased else None
    loss = FusedLinearCrossEntropyLoss(num_chunks=chunks, reduction=reduction, **options)(
        leaves[0], target, leaves[1], bias
    )
    expected = reference_losses(F.linear(leaves[0], leaves[1], bias), target, **options)[0].sum()
    if reduction == "mean":
        expected = expected / (target != -100).sum()
    assert_close(loss, expected)
    actual, wanted = (torch.autograd.grad(3 * value, leaves) for value in (loss, expected))
    assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_linear_map_and_loss_can_be_run_backward_twice():
    _, target = draw()
    x, weight = torch.randn(N, D, requires_grad=True), torch.randn(C, D)
    loss = FusedLinearCrossEntropyLoss()(x, target, weight)
    first, second = (torch.autograd.grad(2 * loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
