"""A picture of the loss curve."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from keyreduce import drawing


def draw_losses(tokens: Sequence[int], losses: Sequence[float], *, title: str, about: str, loss: str) -> Figure:
    """Draw losses (nats per token), and their running mean, against the tokens seen before each.

    ``title`` names model and mode, ``about`` text and device, and ``loss`` says which loss it is.
    """
    figure = drawing.new_figure(7, 4, title, about=about)
    axes = figure.subplots()
    few = {"marker": "o", "markersize": 4} if len(losses) < 30 else {}
    lines = axes.plot(tokens, losses, color=drawing.SKY, linewidth=1, **few, label="as logged")
    width = max(1, len(losses) // 20)
    if width > 1:
        # At both ends the mean is over fewer entries, since nothing was logged beyond them.
        sums, counts = (np.convolve(row, np.ones(width), "same") for row in (losses, np.ones(len(losses))))
        lines += axes.plot(tokens, sums / counts, color=drawing.BLACK, linewidth=2, label=f"mean of {width} entries")
        drawing.legend(figure, lines)
    axes.xaxis.set_major_formatter(lambda tokens, _: _scaled(tokens))
    axes.set_xlim(left=0)
    drawing.finish(axes, x="tokens seen", y=f"{loss}, nats per token")
    return figure


def _scaled(tokens: float) -> str:
    if tokens >= 1e6:
        return f"{tokens / 1e6:g}M"
    return f"{tokens / 1e3:g}k" if tokens >= 1e3 else f"{tokens:g}"
