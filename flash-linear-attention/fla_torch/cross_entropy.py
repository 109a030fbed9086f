"""Cross entropy with fla's options. Shapes: N predictions, C classes."""

import torch

from fla_torch.numerics import pull_back, widen


def cross_entropy_fwd(
    logits, target, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, logit_softcapping=None,
    ignore_index=-100, process_group=None,
):  # fmt: skip
    """Return loss, its z-loss part and log-sum-exp, each ``[N]``, then the number of classes and the first class.

    Raises:
        ValueError: the vocabulary is sharded over processes, which only fla's own kernel knows.
    """
    _refuse_shards(process_group)
    loss, z_loss, lse = _losses(
        logits, target, label_smoothing, logit_scale, lse_square_scale, logit_softcapping, ignore_index
    )
    return loss, z_loss, lse, logits.shape[1], 0


def cross_entropy_bwd(
    logits, target, lse, dloss, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, logit_softcapping=None,
    ignore_index=-100, total_classes=None, class_start_idx=0, inplace_backward=False,
):  # fmt: skip
    """Return the gradient of the logits, written over them with ``inplace_backward``."""

    def loss_of(logits):
        return _losses(logits, target, label_smoothing, logit_scale, lse_square_scale, logit_softcapping, ignore_index)[
            0
        ]

    (gradient,) = pull_back(loss_of, [logits], [dloss.expand(target.shape)])
    return logits.copy_(gradient) if inplace_backward else gradient


def cross_entropy_loss_forward(module, input, target):
    """``FusedCrossEntropyLoss.forward`` without the check that its tensors are on a GPU."""
    _refuse_shards(module.process_group)
    loss, z_loss, _ = _losses(
        input, target, module.label_smoothing, module.logit_scale, module.lse_square_scale, module.logit_softcapping,
        module.ignore_index,
    )  # fmt: skip
    # The z-loss is part of the loss; by itself fla returns it for logging, without a gradient.
    losses = [loss, z_loss.detach()]
    if module.reduction != "none":
        losses = [loss.sum() for loss in losses]
    if module.reduction == "mean":
        losses = [loss / (target != module.ignore_index).sum() for loss in losses]
    return tuple(losses) if module.return_z_loss else losses[0]


def fused_linear_cross_entropy_bwd(do, dx, dw, db):
    """Return the gradients that fla's forward computed (from the two functions above), times that of the loss."""
    return tuple(None if gradient is None else gradient * do for gradient in (dx, dw, db))


def _refuse_shards(process_group):
    if process_group is not None:
        raise ValueError("the PyTorch backend of fla cannot shard a vocabulary: use fla's Triton kernels for it")


def _losses(logits_NC, target_N, label_smoothing, logit_scale, lse_square_scale, logit_softcapping, ignore_index):
    logits_NC = widen(logits_NC) * logit_scale
    if logit_softcapping is not None:
        logits_NC = logit_softcapping * torch.tanh(logits_NC / logit_softcapping)
    lse_N = logits_NC.logsumexp(dim=1)
    is_counted_N = target_N != ignore_index
    target_logit_N = logits_NC.gather(1, torch.where(is_counted_N, target_N, 0)[:, None])[:, 0]
    z_loss_N = lse_square_scale * lse_N.square()
    loss_N = lse_N + z_loss_N - (1 - label_smoothing) * target_logit_N
    if label_smoothing:
        loss_N = loss_N - label_smoothing * logits_NC.mean(dim=1)
    return torch.where(is_counted_N, loss_N, 0), torch.where(is_counted_N, z_loss_N, 0), lse_N
