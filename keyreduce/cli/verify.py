"""``keyreduce verify``: a checkpoint read to the last byte and held against its record."""

import os
from typing import Annotated

import typer

from keyreduce.cli import options


def verify(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            envvar="COMPRESSED_MODEL",
            help="Hugging Face folder, or DCP folder.",
            show_default="what prune or recover wrote into --work",
        ),
    ] = None,
    work: options.Work = options.DEFAULT_WORK,
    config: options.Config = None,
    write_sums: Annotated[
        bool,
        typer.Option("--write-sums", help="Note the files' hashes in the folder, as SHA256SUMS, for later and others."),
    ] = False,
    load: Annotated[
        bool,
        typer.Option("--load", help="Build the library's model of its config, and compare all tensors with it."),
    ] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Read every value of a checkpoint: are all finite, all there, and those that were written?"""
    from keyreduce.api.pair import latest
    from keyreduce.checkpoint.find import open_model
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.checkpoint.verify import SUMS_NAME, check_finite, compare_sums, hash_files, read_sums
    from keyreduce.cli.console import Console, megabytes
    from keyreduce.errors import KeyreduceError
    from keyreduce.outputs import appearing
    from keyreduce.pruning.prune import read_record
    from keyreduce.workspace import Workspace

    console, found = Console(as_json=json), path or str(latest(Workspace(work)))
    if path is None and not os.path.isdir(found):
        raise KeyreduceError(f"there is no pruned model at {found}; run keyreduce prune, or name a PATH")
    with freed_tensors_returned():
        source = open_model(found, config=config)
        recorded = read_record(source.path).get("identity")
        if recorded not in (None, source.identity):
            raise KeyreduceError(f"{source.path} is not what its record describes: it was changed since, or damaged")
        noted = None if write_sums else read_sums(source.path)
        with console.progress("reading", source.nbytes, "B") as progress:
            check_finite(source, progress=progress)
        with console.progress("hashing", sum(os.path.getsize(file) for file in source.files), "B") as progress:
            sums = hash_files(source, progress=progress)
        if noted is not None:
            compare_sums(source.path, sums, noted)
        is_whole = _is_whole(source, load, console)
    source.refuse_changed()
    if write_sums:
        text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        with appearing(source.path / SUMS_NAME, folder=False, overwrite=True) as temporary:
            temporary.write_text(text)
    console.table("", ("file", "SHA-256"), list(sums.items()))
    console.say(f"{source.path}: {len(source.tensors)} tensors, {megabytes(source.nbytes)}, every value finite")
    if is_whole:
        console.say(f"its {'tensors' if load else 'mixers'} are those that its config.json asks for")
    if recorded is None:
        console.say("it has no record of what was written, to compare with")
    else:
        console.say("it is what its keyreduce.json describes")
    if noted is not None or write_sums:
        console.say(f"its files {'are now' if write_sums else 'are those'} in {SUMS_NAME}")
    console.result(
        {
            "verified": str(source.path),
            "tensors": len(source.tensors),
            "bytes": source.nbytes,
            "is_whole": is_whole,
            "is_recorded": recorded is not None,
            "sums_compared": noted is not None,
            "sha256": sums,
        }
    )


def _is_whole(source, load: bool, console) -> bool | None:
    """Whether all tensors are there; None of a model of which nothing can be said."""
    from keyreduce.errors import UnknownArchitecture
    from keyreduce.families.mixer_tensors import check_mixers

    try:
        if load:
            from keyreduce.models.meta import check_source  # with transformers and fla, which takes seconds

            check_source(source)
        else:
            check_mixers(source.config, source.shapes, source.path)
    except UnknownArchitecture as error:
        console.note(f"not checked whether all tensors of the model are there: {error}")
        return None
    return True
