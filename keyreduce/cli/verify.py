"""``keyreduce verify``: a checkpoint read to the last byte and compared with its record."""

from keyreduce.api import verify
from keyreduce.cli.console import Console, megabytes


def show(request: verify.VerifyRequest, console: Console) -> None:
    """Verify, and print what was found."""
    result = verify.run(request, console)
    console.table("", ("file", "SHA-256"), list(result.sha256.items()))
    console.say(f"{result.verified}: {result.tensors} tensors, {megabytes(result.bytes)}, every value finite")
    if result.is_whole:
        console.say(f"its {'tensors' if request.load else 'mixers'} are those that its config.json asks for")
    if result.checksums_compared:
        console.say("it is what its keyreduce.json describes, to the last byte")
    elif result.is_recorded:
        console.say(
            "its config and samples of its weights are what its keyreduce.json describes; an earlier version wrote "
            "that, without checksums, so that other changes would not be found"
        )
    else:
        console.say("it has no record of what was written, to compare with")
    if result.sums_compared or request.write_sums:
        console.say(f"its files {'are now' if request.write_sums else 'are those'} in SHA256SUMS")
    console.finish(result)
