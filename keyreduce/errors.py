"""The one exception type for what a user can cause and can mend, and how errors of others are told."""

import re


class KeyreduceError(Exception):
    """A mistake in the input, told in one line: what is wrong, and what to do about it.

    The command line prints the message and exits with code 2; a traceback appears only with
    ``--debug``. Anything else that is raised is a defect of keyreduce and keeps its traceback.
    """


# Errors of other libraries whose message needs no type beside it.
_TOLD_BY_MESSAGE = (AssertionError, ImportError, OSError, RuntimeError, ValueError)


def reason(error: Exception) -> str:
    """Return the first sentence of another library's error; with its type, where the sentence says less than that."""
    sentence = re.split(r"\. |\n", str(error))[0].rstrip(".:")
    return sentence if sentence and isinstance(error, _TOLD_BY_MESSAGE) else f"{type(error).__name__}: {sentence}"
