"""The one exception type for what a user can cause and can mend, and the first sentence of other libraries' errors."""

import re
from collections.abc import Callable

_FIELD = re.compile(r"`([a-z]\w*)`")


class KeyreduceError(Exception):
    """A mistake in the input, described in one line: what is wrong, and what to do about it.

    Where the message speaks of a setting it names the field of the request in backticks: "`ratio` is 1.5". Each caller
    puts its own word there: the command line the flag, a recipe the table and the key (:meth:`with_names`). The command
    line exits with code 2. Any other exception is a defect of keyreduce and keeps its traceback.
    """

    @property
    def field(self) -> str | None:
        """The first field that the message names, or None."""
        match = _FIELD.search(str(self))
        return match and match[1]

    def with_names(self, name_of: Callable[[str], str]) -> str:
        """Return the message with ``name_of(field)`` in the place of each field in backticks."""
        return _FIELD.sub(lambda match: name_of(match[1]), str(self))


class UnknownArchitecture(KeyreduceError):
    """Nothing can be said of this model: no table here, or no class of the libraries, is of its kind."""


# Errors of other libraries whose message needs no type beside it.
_CLEAR_WITHOUT_TYPE = (AssertionError, ImportError, OSError, RuntimeError, ValueError)


def reason(error: Exception) -> str:
    """Return the first sentence of another library's error; with its type, where the sentence says less than that."""
    sentence = re.split(r"\. |\n", str(error))[0].rstrip(".:")
    return sentence if sentence and isinstance(error, _CLEAR_WITHOUT_TYPE) else f"{type(error).__name__}: {sentence}"
