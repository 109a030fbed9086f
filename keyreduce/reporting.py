"""How long-running work reports its progress: to a reporter, which on the command line is the console."""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

_log = logging.getLogger("keyreduce")


class Reporter:
    """The reporter of Python programs: remarks go to the log ``keyreduce``, and no progress bar is drawn."""

    def note(self, message: str) -> None:
        """Report something in passing, such as that the text ended early."""
        _log.info("%s", message)

    def keep(self, what: str) -> None:
        """Learn what stays, and is found by a later run, should the work be stopped from now on."""

    def progress(self, description: str, total: int | None, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Return a context that gives a function to call with each amount of ``unit`` that is done.

        Args:
            description: what is done, such as "calibrating".
            total: how much there is to do; None where that is not known.
            unit: what is counted, such as "tokens".
        """
        return contextlib.nullcontext(lambda amount: None)
