"""Whether two texts share a document: calibration text and held-out text must not."""

import hashlib
from collections.abc import Iterator

from keyreduce.data.text import DatasetText, StdlibText, TextSource
from keyreduce.errors import KeyreduceError

_SHORTEST = 40  # characters; a licence line or an empty stub may be in both


def refuse_overlap(calibration: TextSource, heldout: TextSource) -> None:
    """Check that a held-out text shares no document with the calibration text.

    Documents of at least 40 characters are compared as a whole (a file is one document, unless it holds rows); parts of
    documents and changed ones are not recognised. The documents of a named dataset are not compared, since all of it
    would have to be fetched. Nor are two splits of the standard library, which are made of different files.

    Raises:
        KeyreduceError: it is the same text, or a document is in both.
    """
    if calibration.identity == heldout.identity:
        raise KeyreduceError("calibration and held-out text are the same; give different ones")
    kinds = {type(calibration), type(heldout)}
    if DatasetText in kinds or kinds == {StdlibText}:
        return
    seen = set(_digests(calibration))
    count = sum(digest in seen for digest in _digests(heldout))
    if count:
        documents = (
            f"{count:,} documents of the held-out text are" if count > 1 else "1 document of the held-out text is"
        )
        raise KeyreduceError(f"{documents} in the calibration text too; give different ones")


def _digests(text: TextSource) -> Iterator[bytes]:
    for pieces in text.in_pieces():
        digest, length = hashlib.blake2b(digest_size=16), 0
        for piece in pieces:
            digest.update(piece.encode())
            length += len(piece)
        if length >= _SHORTEST:
            yield digest.digest()
