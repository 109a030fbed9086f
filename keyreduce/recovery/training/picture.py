"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_losses(tokens: Sequence[int], losses: Sequence[float], label: str, target: Path) -> None:
    """Draw losses against tokens seen, as they are and smoothed, into a PNG file.

    Args:
        tokens: tokens seen, rising.
        losses: the loss there, nats per token.
        label: what the loss is.
        target: the file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="#9db8d2", linewidth=1, marker="." if len(losses) < 30 else "", label="as logged")
    width = max(1, len(losses) // 20)
    if width > 1:
        # A mean over what is there: fewer entries at both ends, and no number that was not logged.
        sums, counts = (np.convolve(row, np.ones(width), "same") for row in (losses, np.ones(len(losses))))
        axes.plot(tokens, sums / counts, color="#1f4e79", linewidth=2, label=f"mean of {width}")
        axes.legend(frameon=False)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(f"{label}, nats per token")
    axes.xaxis.set_major_formatter(lambda tokens, _: _scaled(tokens))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=150)


def _scaled(tokens: float) -> str:
    if tokens >= 1e6:
        return f"{tokens / 1e6:g}M"
    return f"{tokens / 1e3:g}k" if tokens >= 1e3 else f"{tokens:g}"
