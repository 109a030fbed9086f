"""A needle in a haystack: a sentence hidden in real text gives a password, and the end of the text asks for it.

Where several sentences give the passwords of several names, the text asks for one of them: the multi-key form of Hsieh
et al., "RULER", arXiv:2404.06654, section 3. Names and passwords are random, so that no other text holds the answer.
They are common words where the tokenizer has those as tokens of their own, else a few letters.

Shapes: T tokens in a sequence, N in the haystack, A tokens in the alphabet, P tokens in a name or a password,
C choices.
"""

import re
from collections.abc import Iterator
from itertools import chain, cycle, islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from keyreduce.data.batches import separator_ids, token_rows
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.probes import CHOICES, Probe, choices

DEPTHS = (0.0, 1 / 3, 2 / 3, 1.0)
_WORD = re.compile("[\u0120\u2581][a-z]{3,8}")  # with the space before it, as byte-level BPE and SentencePiece mark it
_ENOUGH_WORDS = 256
_LETTERS = 4  # of a name or a password, where there are no words


class Wording(NamedTuple):
    """The sentence in tokens: ``before``, a name, ``between``, a password, ``after``.

    Attributes:
        separator: what stands before a document: one token or none.
        alphabet_A: the tokens that names and passwords are made of (LongTensor).
        size: how many tokens a name and a password have.
    """

    separator: list[int]
    before: list[int]
    between: list[int]
    after: list[int]
    alphabet_A: torch.Tensor
    size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "Wording":
        """Return the wording in a tokenizer's tokens; a KeyreduceError says that none are words or letters."""
        vocabulary = tokenizer.get_vocab()
        alphabet = sorted(token_id for token, token_id in vocabulary.items() if _WORD.fullmatch(token))
        size, space = 1, ""
        if len(alphabet) < _ENOUGH_WORDS:
            alphabet = [vocabulary[letter] for letter in "abcdefghijklmnopqrstuvwxyz" if letter in vocabulary]
            size, space = _LETTERS, " "
        if len(alphabet) <= CHOICES:
            raise KeyreduceError("the tokenizer has neither words nor letters as tokens; leave needle out of `recall`")
        parts = (f"\nThe password of the{space}", f" is{space}", ".\n")
        before, between, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        return cls(separator_ids(tokenizer), before, between, after, torch.tensor(alphabet), size)

    def sentence(self, name: list[int], password: list[int]) -> list[int]:
        """Return the token ids of the sentence about one name."""
        return [*self.before, *name, *self.between, *password, *self.after]

    def haystack(self, length: int, pairs: int) -> int:
        """Return how many of ``length`` tokens are left for text, or 0 where they are less than a quarter.

        The others are ``pairs`` sentences and the question, which ends before the last token of the password.
        """
        sentence = len(self.sentence([0] * self.size, [0] * self.size))
        text = length - len(self.separator) - pairs * sentence - (sentence - len(self.after) - 1)
        return text if pairs >= 1 and 4 * text >= length else 0


def draw(
    text: TextSource,
    tokenizer: PreTrainedTokenizerFast,
    wording: Wording,
    length: int,
    pairs: int,
    number: int,
    generator: torch.Generator,
) -> Iterator[Probe]:
    """Yield ``number`` sequences that ask for one password; each of its P tokens is chosen from C.

    The sentence that tells it stands at each of `DEPTHS` in turn, the others anywhere, and their passwords are the
    first of the wrong choices. The text is taken in its own order, from the start again where it ends. A KeyreduceError
    says that it is shorter than one haystack.
    """
    size = wording.haystack(length, pairs)
    # Documents are joined by line feeds: a separator would make the model forget what was before.
    documents = (chain(pieces, "\n") for pieces in text.in_pieces())
    haystacks = list(islice(token_rows(documents, tokenizer, size, separated=False), number))
    if not haystacks or len(haystacks[0]) < size:
        raise KeyreduceError(
            f"the text has {sum(map(len, haystacks))} tokens, too few for a haystack of {size}; "
            "give more text, or smaller `recall_lengths`"
        )
    for haystack_N, depth in zip(islice(cycle(haystacks), number), cycle(DEPTHS)):
        yield _hide(haystack_N.tolist(), wording, depth, pairs, generator)


def _hide(haystack: list[int], wording: Wording, depth: float, pairs: int, generator: torch.Generator) -> Probe:
    names_and_passwords: list[list[int]] = []
    while len(names_and_passwords) < 2 * pairs:
        drawn = torch.randint(len(wording.alphabet_A), (wording.size,), generator=generator)
        if (code := wording.alphabet_A[drawn].tolist()) not in names_and_passwords:
            names_and_passwords.append(code)
    name, password = names_and_passwords[:2]
    # The first sentence tells what is asked for; at a position that it shares with others, it comes after them.
    places = torch.randint(len(haystack) + 1, (pairs,), generator=generator).tolist()
    places[0] = round(depth * len(haystack))
    tokens, start = list(wording.separator), 0
    for number in sorted(range(pairs), key=lambda number: (places[number], -number)):
        tokens += haystack[start : places[number]]
        tokens += wording.sentence(*names_and_passwords[2 * number : 2 * number + 2])
        start = places[number]
    tokens += [*haystack[start:], *wording.before, *name, *wording.between, *password[:-1]]
    rows = []
    for place, answer in enumerate(password):
        rivals = [rival[place] for rival in names_and_passwords[3::2]]
        others = wording.alphabet_A[torch.randperm(len(wording.alphabet_A), generator=generator)]
        rows.append(choices(answer, rivals, others.tolist()))
    places_P = torch.arange(len(tokens) - len(password), len(tokens))
    return Probe(torch.tensor(tokens), places_P, torch.tensor(password), torch.stack(rows), depth)
