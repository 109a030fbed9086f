"""The settings that several requests share, each declared once. A request calls what it has: ``seed: int = seed()``."""

from typing import Any, Literal

from keyreduce.api.request import option

DEFAULT_WORK = "keyreduce-out"
MOST_SEED = 2**32 - 1
Dtype = Literal["float32", "bfloat16", "float16"]
_MODEL = "Hugging Face folder, DCP folder, name on the hub, or name of a shipped model."
_TEXT = "Text"


def model(*, help: str = _MODEL, shown_default: str = "delta-net-5m") -> Any:
    """A model to begin with."""
    return option(None, help=help, env="BASE_MODEL_DIR", metavar="PATH|NAME", shown_default=shown_default)


def dense_model() -> Any:
    """The model that a pruned one is compared with."""
    return model(shown_default="what the pruned model was made from")


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


def unrelated() -> Any:
    """Whether the dense model may be another one than the pruned model was made from."""
    return option(False, help="Allow a dense model that the pruned one was not made from.")


def work() -> Any:
    """The work folder."""
    return option(DEFAULT_WORK, help="Where commands find each other's files.", env="KEYREDUCE_WORK", metavar="DIR")


def pruned() -> Any:
    """Where prune wrote, for the commands after it: the environment may say so, as it does to prune."""
    return option(None, help="Where prune wrote.", env="OUTPUT_DIR", metavar="DIR", hidden=True)


def config() -> Any:
    """The config of a DCP."""
    return option(
        None, help="For a DCP without one: the model's config.json, or a folder that holds it.", metavar="PATH"
    )


def text(*, help: str | None = None) -> Any:
    """Files and folders of text."""
    return option(
        (),
        help=help or ".txt, .md, .py, .jsonl or .parquet (field or column 'text'), or a folder of them; may be repeated.",
        metavar="FILE|FOLDER",
        panel=_TEXT,
        shown_default="the Python standard library's source",
    )


def dataset() -> Any:
    """A dataset by name."""
    return option(None, help="A name for datasets, streamed.", metavar="NAME", panel=_TEXT)


def dataset_config() -> Any:
    """The configuration of a dataset."""
    return option(None, help="Its configuration.", metavar="C", panel=_TEXT)


def split() -> Any:
    """The split of a dataset."""
    return option(None, help="Its split.", metavar="S", panel=_TEXT, shown_default="train")


def num_batches(default: int, *, help: str = "Batches to run.", minimum: int = 1) -> Any:
    """How many batches of text."""
    return option(default, help=help, env="NUM_BATCHES", minimum=minimum, maximum=10**9)


def batch_size(default: int, *, help: str = "Rows in a batch.") -> Any:
    """How many rows in a batch."""
    return option(default, help=help, minimum=1, maximum=10**9)


def seq_len(default: int, *, minimum: int = 1) -> Any:
    """How many tokens in a row."""
    return option(default, help="Tokens in a row.", minimum=minimum, maximum=10**9)


def seed() -> Any:
    """The seed."""
    return option(0, help="Seed of everything that is drawn.", minimum=0, maximum=MOST_SEED)


def device() -> Any:
    """What to compute on."""
    return option(None, help="cpu, cuda, cuda:1, ...", metavar="DEVICE", shown_default="a GPU if there is one")


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


def figures() -> Any:
    """Where to write figures."""
    return output(help="The figures as JSON.", metavar="FILE")


def overwrite() -> Any:
    """Whether to replace what is there."""
    return option(False, help="Replace what is at --output.")


def push_to_hub() -> Any:
    """A repository on the hub that gets the result."""
    return option(
        None,
        help="Upload the result to the hub as well, its record and command lines included.",
        metavar="OWNER/NAME",
        shown_default="not uploaded",
    )
