"""A picture of the loss curve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_losses(tokens: Sequence[int], losses: Sequence[float], label: str, target: Path) -> None:
    """Draw losses (nats per token), and their running mean, against the tokens seen before each into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="#9db8d2", linewidth=1, marker="." if len(losses) < 30 else "", label="as logged")
    width = max(1, len(losses) // 20)
    if width > 1:
        # At both ends the mean is over fewer entries, since nothing was logged beyond them.
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
