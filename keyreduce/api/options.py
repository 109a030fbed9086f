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
Dtype = Literal["float32", "bfloat16", "float16"]
_MODEL = "Hugging Face folder, DCP folder, name on the hub, or name of a shipped model."
_TEXT = "Text"


def model(*, help: str = _MODEL, shown_default: str = "delta-net-5m") -> Any:
    """A model to begin with."""
    return option(None, help=help, env="BASE_MODEL_DIR", metavar="PATH|NAME", shown_default=shown_default)


def compressed(
    *, help: str = "The pruned model to compare with the dense one.", instead_of: tuple[str, ...] = ()
) -> Any:
    """A pruned model."""
    return option(
        None,
        help=help,
        env="COMPRESSED_MODEL",
        metavar="PATH",
        shown_default="what prune or recover wrote into --work",
        instead_of=instead_of,
    )


def work() -> Any:
    """The work folder."""
    return option(DEFAULT_WORK, help="Where commands find each other's files.", env="KEYREDUCE_WORK", metavar="DIR")


def config() -> Any:
    """The config of a DCP."""
    return option(
        None, help="For a DCP without one: the model's config.json, or a folder that holds it.", metavar="PATH"
    )


def num_batches(default: int, *, help: str = "Batches to run.", minimum: int = 1) -> Any:
    """How many batches of text."""
    return option(default, help=help, env="NUM_BATCHES", minimum=minimum, maximum=MOST)


def batch_size(default: int, *, help: str = "Rows in a batch.") -> Any:
    """How many rows in a batch."""
    return option(default, help=help, minimum=1, maximum=MOST)


def seq_len(default: int, *, minimum: int = 1) -> Any:
    """How many tokens in a row."""
    return option(default, help="Tokens in a row.", minimum=minimum, maximum=MOST)


def dtype() -> Any:
    """What to compute in; the type of the field is :data:`Dtype` or None."""
    return option(None, help="What to compute in.", shown_default="bfloat16 on a GPU, float32 on a CPU")


def cast_to() -> Any:
    """What to cast weights to; the type of the field is :data:`Dtype` or None."""
    return option(None, help="Cast the weights to it, in files and config.", shown_default="as they are")


def max_shard_size() -> Any:
    """The size of shards."""
    return option(
        None,
        help="The most bytes in a safetensors shard of several tensors: 500MB, 5GB.",
        metavar="SIZE",
        shown_default="the source's shards, or 5GB",
    )


def output(*, help: str, metavar: str = "DIR", shown_default: str = "in --work", env: str | None = None) -> Any:
    """Where to write."""
    return option(None, help=help, metavar=metavar, shown_default=shown_default, env=env)


def push_to_hub() -> Any:
    """A repository on the hub that gets the result."""
    return option(
        None,
        help="Upload the result to the hub as well, its record and command lines included.",
        metavar="OWNER/NAME",
        shown_default="not uploaded",
    )


@dataclass(frozen=True, kw_only=True)
class AfterPrune(Request):
    """The settings of commands that find what prune wrote."""

    work: Path = work()
    # The environment may say where that is, as it does to prune.
    pruned: Path | None = option(None, help="Where prune wrote.", env="OUTPUT_DIR", metavar="DIR", hidden=True)

    @property
    def workspace(self) -> Workspace:
        """The work folder."""
        return Workspace(self.work, self.pruned)


@dataclass(frozen=True, kw_only=True)
class OfPair(AfterPrune):
    """The settings of commands that compare a dense with a pruned model; see :func:`keyreduce.api.pair.load_pair`."""

    model: str | None = model(shown_default="what the pruned model was made from")
    compressed: str | None = compressed()
    unrelated: bool = option(False, help="Allow a dense model that the pruned one was not made from.")


@dataclass(frozen=True, kw_only=True)
class OfText(Request):
    """The settings that say what text is taken."""

    text: tuple[Path, ...] = option(
        (),
        help=".txt, .md, .py, .jsonl or .parquet (field or column 'text'), or a folder of them; may be repeated.",
        metavar="FILE|FOLDER",
        panel=_TEXT,
        shown_default="the Python standard library's source",
    )
    dataset: str | None = option(None, help="A name for datasets, streamed.", metavar="NAME", panel=_TEXT)
    dataset_config: str | None = option(None, help="Its configuration.", metavar="C", panel=_TEXT)
    split: str | None = option(None, help="Its split.", metavar="S", panel=_TEXT, shown_default="train")

    def text_source(self, default: "Split") -> "TextSource":
        """Return the text; ``default`` is the part of the standard library's source that is taken if none is named.

        Raises:
            KeyreduceError: there is no such text, or the fields contradict each other.
        """
        from keyreduce.data.text import text_source

        return text_source(self.text, self.dataset, self.dataset_config, self.split, default=default)


@dataclass(frozen=True, kw_only=True)
class OfRun(Request):
    """The settings of commands that compute and write."""

    seed: int = option(0, help="Seed of everything that is drawn.", minimum=0, maximum=MOST_SEED)
    device: str | None = option(
        None, help="cpu, cuda, cuda:1, ...", metavar="DEVICE", shown_default="a GPU if there is one"
    )
    overwrite: bool = option(False, help="Replace what is at --output.")
