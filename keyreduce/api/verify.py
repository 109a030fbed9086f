"""A checkpoint read to the last byte and compared with its record."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.errors import KeyreduceError, UnknownArchitecture
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    from keyreduce.checkpoint.source import Checkpoint


@dataclass(frozen=True, kw_only=True)
class VerifyRequest(options.AfterPrune):
    """Read a checkpoint whole: is each value finite, each mixer tensor there, and each byte as it was written?"""

    path: str | None = option(
        None, "Hugging Face folder, or DCP folder.", is_argument=True, **options.COMPRESSED | {"metavar": None}
    )
    config: Path | None = options.config()
    write_sums: bool = option(False, "Write the files' hashes to SHA256SUMS in the folder, which sha256sum -c checks.")
    load: bool = option(False, "Also build the library's own model, and compare all names and shapes.")


@dataclass(frozen=True, kw_only=True)
class VerifyResult(Result):
    """A checkpoint in which no fault was found."""

    verified: Path  # its folder.
    tensors: int  # how many tensors it has.
    bytes: int  # their size.
    # true where the mixers' tensors, or with ``load`` all tensors, are those that the config asks for; None where
    # that cannot be told.
    is_whole: bool | None
    is_recorded: bool  # whether it has a record of what was written, with which it was compared.
    # whether that record has checksums, by which any byte that changed is found; those of version 0.1 have none.
    checksums_compared: bool
    sums_compared: bool  # whether it has a file ``SHA256SUMS``, with which it was compared.
    sha256: dict[str, str]  # file name -> SHA-256 in hex, of all files that hold tensors.

    def to_json(self) -> dict:
        """Return the result as a JSON object, in which ``is_whole`` may be null."""
        return super().to_json() | {"is_whole": self.is_whole}


def run(request: VerifyRequest, reporter: Reporter = Reporter()) -> VerifyResult:
    """Verify a checkpoint, and write ``SHA256SUMS`` where that is asked for.

    Raises:
        KeyreduceError: there is no such checkpoint, it is damaged, or it was changed since it was written.
    """
    from keyreduce.api.pair import latest
    from keyreduce.checkpoint.find import open_model
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.checkpoint.record import Record
    from keyreduce.checkpoint.verify import check_finite, compare_sums, hash_files, write_sums

    found = request.path if request.path is not None else str(latest(request.workspace, "a `path`"))
    with freed_tensors_returned():
        source = open_model(found, config=request.config)
        record = Record.read(source.path)
        if record.identity not in (None, source.identity):
            raise KeyreduceError(f"{source.path} is not what its record describes: it was changed since, or damaged")
        size = sum(os.path.getsize(file) for file in source.files)
        with reporter.progress("hashing", size, "B") as progress:
            sums = hash_files(source, record, progress=progress)
        with reporter.progress("reading", source.nbytes, "B") as progress:
            check_finite(source, progress=progress)
        sums_compared = not request.write_sums and compare_sums(source.path, sums)
        is_whole = check_tensors(source, reporter, load=request.load)
    source.refuse_changed()
    if request.write_sums:
        write_sums(source.path, sums)
    return VerifyResult(
        verified=source.path,
        tensors=len(source.tensors),
        bytes=source.nbytes,
        is_whole=is_whole,
        is_recorded=record.identity is not None,
        checksums_compared=record.checksums is not None,
        sums_compared=sums_compared,
        sha256=sums,
    )


def check_tensors(source: "Checkpoint", reporter: Reporter, *, load: bool) -> bool | None:
    """Refuse tensors that the config does not ask for; return None where nothing can be said of such a model."""
    from keyreduce.families.mixer_tensors import check_mixers

    try:
        if load:
            from keyreduce.models.meta import check_source  # with transformers and fla, which takes seconds

            check_source(source)
        else:
            check_mixers(source.config, source.shapes, source.path)
    except UnknownArchitecture as error:
        reporter.note(f"not checked whether all tensors of the model are there: {error}")
        return None
    return True
