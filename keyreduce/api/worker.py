"""What carries out tasks: ``python -m keyreduce.api.worker FOLDER...``, one after another.

To import torch, transformers and fla takes seconds, which is longer than a small model takes to prune. So a process
carries out several tasks, and imports everything before the first step is timed.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from keyreduce.api.request import Request, specs
from keyreduce.api.tasks import LOG_NAME, RESULT_NAME, TASK_NAME, write_failure
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json, write_json
from keyreduce.reporting import Reporter


class _Log(Reporter):
    """A reporter that writes remarks into the log of a task."""

    def __init__(self, file: TextIO):
        self.file = file

    def note(self, message: str) -> None:
        print(message, file=self.file, flush=True)


def do_folders(folders: Sequence[Path]) -> None:
    """Carry out the tasks of some folders; each gets its result, or why it has none."""
    import torch

    from keyreduce.checkpoint.find import find_model
    from keyreduce.models.loading import load_model

    os.environ.setdefault("TQDM_MININTERVAL", "60")  # the bars of other libraries would fill the logs
    load_model(find_model(None), torch.device("cpu"), torch.float32)  # which imports what a model needs
    for folder in folders:
        do_folder(folder)


def do_folder(folder: Path) -> None:
    """Carry out one task: its steps in turn, then what it says of files to keep and folders to remove."""
    with (
        open(folder / LOG_NAME, "a", encoding="utf-8", errors="backslashreplace") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            task = read_json(folder / TASK_NAME)
            steps = {name: _do_step(step["verb"], step["request"], _Log(log)) for name, step in task["steps"].items()}
            for source, target in task.get("keep", {}).items():
                if (folder / source).is_file():
                    shutil.copyfile(folder / source, folder / target)
            for name in task.get("remove", []):
                shutil.rmtree(folder / name, ignore_errors=True)
            write_json(folder / RESULT_NAME, {**task.get("result", {}), "steps": steps}, overwrite=True)
        except Exception as error:  # whatever went wrong with this task, the next one may succeed
            traceback.print_exc(file=log)
            kind = "" if isinstance(error, KeyreduceError) else f"{type(error).__name__}: "
            write_failure(folder, f"{kind}{error}")


def _do_step(verb: str, content: dict, reporter: Reporter) -> dict:
    """Carry out one request, and return it with its result and its wall time in seconds."""
    module = importlib.import_module(f"keyreduce.api.{verb}")
    kind: type[Request] = getattr(module, f"{verb.capitalize()}Request")
    reporter.note(f"$ keyreduce {verb} {json.dumps(content)}")
    try:
        request = kind.of_json(content)
        start = time.perf_counter()
        result = module.run(request, reporter)
        seconds = time.perf_counter() - start
    except KeyreduceError as error:
        flags = {name: field.flag for name, field in specs(kind).items()}
        raise KeyreduceError(error.with_names(lambda name: flags.get(name, name))) from error
    return {"verb": verb, "request": content, "seconds": seconds, "result": result.to_json()}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half made is removed
    try:
        do_folders([Path(argument) for argument in sys.argv[1:]])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
