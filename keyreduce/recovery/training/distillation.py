"""The losses of a student on a text, and against the logits of its teacher.

Shapes: B rows, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F


def text_loss(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats of each token, given those before it; float32, no shape."""
    return F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def teacher_loss(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over tokens of KL(teacher || student), both at a temperature, times its square.

    The square keeps gradients of the same size at any temperature (Hinton et al., arXiv:1503.02531, section 2).

    Args:
        student_BTV, teacher_BTV: logits.
        temperature: what they are divided by.

    Returns:
        float32, no shape, in nats.
    """
    student_NV = (student_BTV.float() / temperature).flatten(0, 1).log_softmax(-1)
    teacher_NV = (teacher_BTV.float() / temperature).flatten(0, 1).log_softmax(-1)
    return F.kl_div(student_NV, teacher_NV, reduction="batchmean", log_target=True) * temperature**2
