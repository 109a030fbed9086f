"""The sums of a calibration that is not finished, kept beside its output so that a run that was killed can be resumed.

The file holds every running sum as it is, the number of batches that they are over, and a hash of what they are made
from. Later batches are added as if the run had not been stopped, so that the result has the same bits. Under torchrun
each process keeps its own sums of its own batches, which the same number of processes resumes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from keyreduce import __version__
from keyreduce.checkpoint.shards import ShardPlan, make_spec, read_header
from keyreduce.checkpoint.writing import write_shard
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import appearing
from keyreduce.processes import Processes

EVERY_SECONDS = 60.0
_SHARE = 20  # writing takes at most one part of so many of a run's time
_KEY, _ENDING = "keyreduce", "sums"
_PACKAGES = ("flash-linear-attention", "torch", "transformers")


class PartialSums:
    """Keeps the sums of a run, and gives back those of an earlier run that was stopped.

    Args:
        target: the calibration file that the run is to make.
        inputs: what that is made from (:func:`keyreduce.calibration.run.describe_inputs`).
        device: what the model runs on.
        processes: which process this is, of how many.
        note: called with messages.
        keep: called with what is kept, once there is something.
    """

    def __init__(
        self,
        target: Path,
        inputs: Mapping,
        device: torch.device,
        processes: Processes,
        note: Callable[[str], None],
        keep: Callable[[str], None],
    ):
        target = Path(os.path.realpath(target))
        ending = f"-{processes.rank}-of-{processes.number}" if processes.number > 1 else ""
        self.path = target.with_name(f".{target.name}.{_ENDING}{ending}")
        self._target, self._note, self._keep = target, note, keep
        self._is_first, self._is_told = processes.rank == 0, False
        made_from = [dict(inputs), str(device), __version__, [version(package) for package in _PACKAGES]]
        self._hash = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        self._due = time.monotonic() + EVERY_SECONDS

    def restore(self, sums: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Put the sums of a run that was stopped into these tensors, in place; without such a run they stay.

        Returns the number of batches and of tokens that they are over.
        """
        if not self.path.exists():
            return 0, 0
        try:
            header = read_header(self.path)[0]
            record = json.loads(header.metadata[_KEY])
            is_ours = record["hash"] == self._hash
            with safe_open(str(self.path), framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()} if is_ours else {}  # noqa: SIM118
        except (KeyreduceError, SafetensorError, KeyError, ValueError):
            is_ours, found, record = False, {}, {}
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
        if not is_ours or shapes != {name: (tensor.shape, tensor.dtype) for name, tensor in sums.items()}:
            if self._is_first:
                self._note(f"{self.path} has the sums of a run from other inputs, and is not used")
            return 0, 0
        for name, tensor in sums.items():
            tensor.copy_(found[name])
        self._tell()
        if self._is_first:
            self._note(f"resuming after the {record['tokens']:,} tokens of a run that was stopped")
        return record["batches"], record["tokens"]

    def keep_if_due(self, sums: Mapping[str, torch.Tensor], batches: int, tokens: int) -> None:
        """Write the sums over so many batches and tokens, if the last time is long enough ago."""
        begun = time.monotonic()
        if begun < self._due:
            return
        record = {"hash": self._hash, "batches": batches, "tokens": tokens}
        specs = [make_spec(name, tensor.dtype, tensor.shape) for name, tensor in sums.items()]
        try:
            with appearing(self.path, folder=False, overwrite=True) as made:
                write_shard(made, ShardPlan(specs, {_KEY: json.dumps(record)}), lambda name: sums[name].cpu())
        except KeyreduceError as error:
            self._due = float("inf")  # what is asked for is the result, which may still find room
            self._note(f"no sums are kept on the way: {error}")
            return
        self._tell()
        ended = time.monotonic()
        self._due = ended + max(EVERY_SECONDS, _SHARE * (ended - begun))

    def _tell(self) -> None:
        """Say what stays from now on if the run is stopped; once, and in one process."""
        if self._is_first and not self._is_told:
            self._is_told = True
            self._keep(f"{self.path}, from which the same command resumes")

    def clear(self) -> None:
        """Remove what is kept; the first process also removes what runs of other numbers of processes have left."""
        pattern = f".{self._target.name}.{_ENDING}*" if self._is_first else self.path.name
        for left in [*self.path.parent.glob(pattern), *self.path.parent.glob(f".{pattern}.partial")]:
            shutil.rmtree(left, ignore_errors=True)
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
