"""The one exception type for what a user can cause and can mend."""


class KeyreduceError(Exception):
    """A mistake in the input, told in one line: what is wrong, and what to do about it.

    The command line prints the message and exits with code 2; a traceback appears only with
    ``--debug``. Anything else that is raised is a defect of keyreduce and keeps its traceback.
    """
