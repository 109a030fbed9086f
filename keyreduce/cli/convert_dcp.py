"""``keyreduce convert-dcp``: safetensors to torch distributed checkpoint, and back."""

from keyreduce.api import convert
from keyreduce.cli.console import Console, megabytes


def show(request: convert.ConvertRequest, console: Console) -> None:
    """Convert, and print what was written."""
    result = convert.run(request, console)
    if result.made:
        kind = f"a distributed checkpoint, {result.layout}," if result.is_dcp else "a Hugging Face folder"
        what = f"{kind} of {result.tensors} tensors, {megabytes(result.bytes)}, from {result.source}"
        console.say(f"wrote {result.converted}: {what}")
        if result.left_out:
            console.say(f"left out: {result.left_out} entries of optimizer and training state")
    console.finish(result)
