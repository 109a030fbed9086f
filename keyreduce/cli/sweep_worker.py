"""What does the runs of a sweep: ``python -m keyreduce.cli.sweep_worker FOLDER...``, one after another.

Importing torch and fla takes seconds, more than pruning a small model does: so a process does several runs, each of
them as the commands that a user would type.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

from keyreduce import cli
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json, write_json
from keyreduce.sweep.record import FAILURE_NAME, LOG_NAME, RESULT_NAME, TASK_NAME
from keyreduce.sweep.runs import CHECKPOINT_NAME, CUT_NAME, DCP_NAME
from keyreduce.workspace import RECORD_NAME

_INTERRUPTED = 130


def run_folders(folders: Sequence[Path]) -> None:
    """Do the runs of some folders; each leaves there its result, or why it has none."""
    from keyreduce.checkpoint.find import find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.models.meta import build_model

    # What takes seconds to import is no part of a step's time: this imports it.
    build_model(open_folder(find_model(None)).config)

    commands = typer.main.get_command(cli.app).commands.values()
    for variable in {parameter.envvar for command in commands for parameter in command.params if parameter.envvar}:
        # The commands say all that they are to do; what a shell has set is for the sweep, not for them.
        for name in [variable] if isinstance(variable, str) else variable:
            os.environ.pop(name, None)
    for folder in folders:
        run_folder(folder)


def run_folder(folder: Path) -> None:
    """Do one run: its steps in turn, what they say in its log, what they report in its result."""
    task = read_json(folder / TASK_NAME)
    with (
        open(folder / LOG_NAME, "a", encoding="utf-8", errors="backslashreplace") as log,
        contextlib.redirect_stderr(log),
    ):
        try:
            steps = {name: _step(arguments, log) for name, arguments in task["steps"].items()}
            if (folder / CHECKPOINT_NAME / RECORD_NAME).is_file():
                shutil.copyfile(folder / CHECKPOINT_NAME / RECORD_NAME, folder / RECORD_NAME)
            if not task["keep_checkpoints"]:
                for name in (CUT_NAME, CHECKPOINT_NAME, DCP_NAME):
                    shutil.rmtree(folder / name, ignore_errors=True)
            write_json(folder / RESULT_NAME, {"settings": task["settings"], "steps": steps}, overwrite=True)
        except Exception as error:
            # Whatever went wrong with this one, the next may do.
            traceback.print_exc(file=log)
            message = str(error) if isinstance(error, KeyreduceError) else f"{type(error).__name__}: {error}"
            write_json(folder / FAILURE_NAME, {"message": " ".join(message.split())}, overwrite=True)


def _step(arguments: Sequence[str], log: io.TextIOBase) -> dict:
    """Run one command with ``--json``, and return the object that it prints, with its wall time in seconds."""
    print(f"$ keyreduce {' '.join(arguments)}", file=log, flush=True)
    sys.argv = ["keyreduce", *arguments]
    usage_error = typer.BadParameter.__base__  # which typer does not export
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = cli.app(list(arguments), standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        raise KeyreduceError(f"keyreduce {arguments[0]}: {error.format_message()}") from error
    seconds = time.perf_counter() - start
    if code == _INTERRUPTED:
        raise KeyboardInterrupt  # which is no failure of the run
    if isinstance(code, int) and code:
        raise KeyreduceError(f"keyreduce {arguments[0]} ended with exit code {code}")
    lines = printed.getvalue().strip().splitlines()
    return {"command": sys.argv, "seconds": seconds, "result": json.loads(lines[-1]) if lines else {}}


if __name__ == "__main__":
    try:
        run_folders([Path(argument) for argument in sys.argv[1:]])
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
