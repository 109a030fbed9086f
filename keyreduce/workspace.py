"""Where the commands find each other's files."""

from pathlib import Path

RECORD_NAME = "keyreduce.json"
PROJECTIONS_NAME = "keyreduce.npz"


class Workspace:
    """The work folder: each command's default output, which is the next command's default input.

    Args:
        root: the folder. It is made when something is first written into it.
        pruned: where ``prune`` writes, if that is another place than in ``root``.
    """

    def __init__(self, root: Path, pruned: Path | None = None):
        self.root = Path(root)
        self.calibration = self.root / "calibration.safetensors"
        self.pruned = pruned or self.root / "pruned"
        self.state_budget = self.root / "state-budget.json"
        self.dcp = self.root / "dcp"
        self.hf = self.root / "hf"
        self.benchmark = self.root / "benchmark.json"
        self.recovered = self.root / "recovered"
        self.evaluation = self.root / "eval.json"
        self.rank = self.root / "rank.json"
        self.rank_pictures = self.root / "rank"
        self.sweep = self.root / "sweep"
