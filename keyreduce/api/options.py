"""The settings that several requests share, each declared once: in a base class, or by a function that fields call."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyreduce.api.request import Request, option
from keyreduce.workspace import Workspace

if TYPE_CHECKING:
    from keyreduce.data.text import Split, TextSource

DEFAULT_WORK = "keyreduce-out"
MOST = 10**9  # beyond any text, and far below where counting itself fails
MOST_SEED = 2**32 - 1
COUNT = {"minimum": 1, "maximum": MOST}
COUNTS = COUNT | {"commas": True}
MODEL_FLAGS = ("--model", "-m")
MODEL = {"env": "BASE_MODEL_DIR", "metavar": "PATH|NAME", "flags": MODEL_FLAGS, "panel": "Model"}
COMPRESSED = {
    "env": "COMPRESSED_MODEL",
    "metavar": "PATH",
    "panel": "Model",
    "shown_default": "what prune or recover wrote into --work",
}
Dtype = Literal["float32", "bfloat16", "float16"]
# The headings of the help; what has none stands under "How".
TEXT = {"panel": "Text"}
OUTPUT = {"panel": "Output"}
HARDWARE = {"panel": "Hardware"}
_MODEL = "Folder (Hugging Face or DCP), name on the hub, or shipped model."


def model(help: str = _MODEL, shown_default: str = "delta-net-5m", **more: Any) -> Any:
    """A model to begin with."""
    return option(None, help, shown_default=shown_default, **MODEL, **more)


def compressed(**more: Any) -> Any:
    """A pruned model."""
    return option(None, "The pruned model to compare with the dense one.", **COMPRESSED, **more)


def work() -> Any:
    """The work folder."""
    return option(DEFAULT_WORK, "Where commands find files.", env="KEYREDUCE_WORK", metavar="DIR", **OUTPUT)


def config() -> Any:
    """The config of a DCP."""
    return option(None, "For a DCP without one: config.json, or its folder.", metavar="PATH", panel="Model")


def num_batches(default: int | None, help: str = "Batches to run.", minimum: int = 1, **more: Any) -> Any:
    """How many batches of text."""
    return option(default, help, env="NUM_BATCHES", minimum=minimum, maximum=MOST, **TEXT, **more)


def batch_size(default: int, help: str = "Rows in a batch.") -> Any:
    """How many rows in a batch."""
    return option(default, help, **COUNT, **TEXT)


def seq_len(default: int, minimum: int = 1) -> Any:
    """How many tokens in a row."""
    return option(default, "Tokens in a row.", minimum=minimum, maximum=MOST, **TEXT)


def dtype() -> Any:
    """What to compute in; the type of the field is :data:`Dtype` or None."""
    return option(None, "What to compute in.", shown_default="bfloat16 on a GPU, else float32", **HARDWARE)


def device(help: str = "cpu, cuda, cuda:1, ...") -> Any:
    """What to compute on."""
    return option(None, help, metavar="D", shown_default="a GPU if any", **HARDWARE)


def output(
    help: str,
    metavar: str = "DIR",
    shown_default: str = "in --work",
    env: str | None = None,
    flags: tuple[str, ...] = ("--output", "-o"),
) -> Any:
    """Where to write; a second output of a command has no ``flags`` but its name."""
    return option(None, help, metavar=metavar, shown_default=shown_default, env=env, flags=flags, **OUTPUT)


@dataclass(frozen=True, kw_only=True)
class AfterPrune(Request):
    """The settings of commands that find what prune wrote."""

    work: Path = work()
    # The environment may say where that is, as it does to prune.
    pruned: Path | None = option(None, "Where prune wrote.", env="OUTPUT_DIR", metavar="DIR", hidden=True)

    @property
    def workspace(self) -> Workspace:
        """The work folder."""
        return Workspace(self.work, self.pruned)


@dataclass(frozen=True, kw_only=True)
class OfPair(AfterPrune):
    """The settings of commands that compare a dense with a pruned model; see :func:`keyreduce.api.pair.load_pair`."""

    model: str | None = model(shown_default="what the pruned model was made from")
    compressed: str | None = compressed()
    unrelated: bool = option(False, "Allow a dense model of another origin.", panel="Model")


@dataclass(frozen=True, kw_only=True)
class OfText(Request):
    """The settings that say what text is taken."""

    text: tuple[Path, ...] = option(
        (),
        ".txt, .md, .py, .jsonl, .parquet (field 'text'), or a folder of them; may be repeated.",
        metavar="FILE|FOLDER",
        shown_default="the Python standard library's source",
        **TEXT,
    )
    dataset: str | None = option(None, "A dataset for the datasets library, streamed.", metavar="NAME", **TEXT)
    dataset_config: str | None = option(None, "The dataset's configuration.", metavar="C", **TEXT)
    split: str | None = option(None, "The dataset's split.", metavar="S", shown_default="train", **TEXT)

    def text_source(self, default: "Split") -> "TextSource":
        """Return the text; ``default`` is the part of the standard library's source that is taken if none is named.

        Raises KeyreduceError if there is no such text, or the fields contradict each other.
        """
        from keyreduce.data.text import text_source

        return text_source(self.text, self.dataset, self.dataset_config, self.split, default=default)


@dataclass(frozen=True, kw_only=True)
class OfRun(Request):
    """The settings of commands that compute and write."""

    seed: int = option(0, "Seed of everything that is drawn.", minimum=0, maximum=MOST_SEED)
    device: str | None = device()
    overwrite: bool = option(False, "Replace what is at --output.", **OUTPUT)


@dataclass(frozen=True, kw_only=True)
class Uploaded(Request):
    """The setting of commands whose result may go to the hub."""

    push_to_hub: str | None = option(
        None, "Upload the result to the hub too, with its record.", metavar="OWNER/NAME", **OUTPUT
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub:
            from keyreduce.checkpoint.hub import check_name

            check_name(self.push_to_hub)

    def pushed(self, folder: Path) -> str | None:
        """Upload the result, if that was asked for, and return its address on the hub."""
        from keyreduce.checkpoint.hub import push_to_hub

        return self.push_to_hub and push_to_hub(folder, self.push_to_hub)


@dataclass(frozen=True, kw_only=True)
class OfFiles(Uploaded):
    """The settings of commands that write all tensors again."""

    dtype: Dtype | None = option(None, "Cast the weights to it.", shown_default="as they are", **OUTPUT)
    max_shard_size: str | None = option(
        None, "Most bytes in a shard: 1GB.", metavar="SIZE", shown_default="the source's, or 5GB", **OUTPUT
    )

    @property
    def file_settings(self) -> dict[str, Any]:
        """Those that decide what the files hold, where they were given; the size of shards in bytes."""
        from keyreduce.checkpoint.writing import parse_size

        size = self.max_shard_size and parse_size(self.max_shard_size)
        found = {"dtype": self.dtype, "max_shard_size": size}
        return {name: value for name, value in found.items() if value}
