"""``keyreduce calibrate``: text to statistics."""

from keyreduce.api import calibrate
from keyreduce.cli.console import Console, megabytes


def show(request: calibrate.CalibrateRequest, console: Console) -> None:
    """Calibrate, and print what was written."""
    result = calibrate.run(request, console)
    if result is None:
        return
    if result.made:
        size = megabytes(result.bytes)
        console.say(f"wrote {result.calibration}: {result.tokens:,} tokens, {result.layers} layers, {size}")
    console.finish(result)
