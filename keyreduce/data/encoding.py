"""Documents of any length to token ids, in memory that does not grow with the document.

The rule: a document of at most 131,072 characters is encoded whole. A longer one is encoded in parts of about that
length. It is cut at the end of a line, before the line feed; where that does not serve, before other white space; else
before a punctuation mark. A place serves if the tokenizer itself divides the text there: the 1,000 characters before
and the 1,000 after it, encoded together, give the tokens that they give apart, but for a mark that some tokenizers put
in front of any text and that is left out. So the tokens are those of the whole document, for a tokenizer that does not
look further than that from such a place; those that split text into words first do not. Where no such place is found
near the end of a part, as in one word of thousands of characters, the document is cut all the same, and its tokens may
differ there.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

Document = str | Iterable[str]
"""A text, or pieces that joined are it."""
_LENGTH = 1 << 17  # characters that are encoded at a time
_SEARCHED = 1 << 14  # characters at the end of those, where a place to cut is looked for
_AROUND = 1_000  # characters on either side of it
_TRIED = 16  # places of each kind
_PLACES = [re.compile(place) for place in (r"(?<=\S)(?=\n)", r"(?<=\S)(?=\s)", r"(?<=\w)(?=[^\w\s])")]


class Encoded(NamedTuple):
    """A part of a document: its text, the ids of its tokens, and where in this text each of them ends.

    ``ends`` is empty where the tokenizer, being one in Python, does not say.
    """

    text: str
    ids: list[int]
    ends: list[int]


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> Iterator[Encoded]:
    """Yield a document in parts, at least one, that joined are all of it; without the tokenizer's special tokens."""
    pieces, marks = _sliced(document), 0
    text, rest = _fill("", pieces)
    while rest:
        cut, marks_after = _place(text, tokenizer)
        yield _encode(text[:cut], tokenizer, marks)
        (text, rest), marks = _fill(text[cut:] + rest, pieces), marks_after
    yield _encode(text, tokenizer, marks)


def _encode(text: str, tokenizer: PreTrainedTokenizerFast, marks: int = 0) -> Encoded:
    """Encode a text as if other text were before it: without its first ``marks`` tokens."""
    # verbose=False: no warning about the model's maximum length, since the tokens are cut into rows afterwards.
    has_offsets = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=has_offsets
    )
    ends = [end for _, end in encoded["offset_mapping"]] if has_offsets else []
    return Encoded(text, encoded["input_ids"][marks:], ends[marks:])


def _place(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Return where to cut a text that goes on, and how many tokens of marks are before what is after the cut."""
    begin, last = len(text) - _SEARCHED, len(text)
    for place in _PLACES:
        found = [begin + match.start() for match in place.finditer(text[begin:-_AROUND])]
        last = found[-1] if found and last == len(text) else last
        for cut in islice(reversed(found), _TRIED):
            before, after = text[cut - _AROUND : cut], text[cut : cut + _AROUND]
            together, *apart = (_encode(one, tokenizer).ids for one in (before + after, before, after))
            marks = sum(map(len, apart)) - len(together)
            if marks >= 0 and together == apart[0] + apart[1][marks:]:
                return cut, marks
    return last, 0


def _sliced(document: Document) -> Iterator[str]:
    for piece in (document,) if isinstance(document, str) else document:
        yield from (piece[begin : begin + _LENGTH] for begin in range(0, len(piece), _LENGTH))


def _fill(text: str, pieces: Iterator[str]) -> tuple[str, str]:
    """Return the text to encode next, and what was read beyond it: nothing only where the document ends with it."""
    read, length = [text], len(text)
    while length <= _LENGTH and (piece := next(pieces, None)) is not None:
        read.append(piece)
        length += len(piece)
    text = "".join(read)
    return text[:_LENGTH], text[_LENGTH:]
