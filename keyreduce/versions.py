"""With which versions of transformers things work, for what is said where they do not."""

from importlib.metadata import PackageNotFoundError, version

OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = "5.6.2", "5.24"
"""The oldest and the newest release that keyreduce was tested with, which are the range in pyproject.toml."""

LAST_BEFORE_CACHE = "5.23"
"""Later releases give a model its state as ``cache``, which fla 0.6 does not know."""


def tested_versions() -> str:
    """Return as half a sentence which releases of transformers were tested, and which one is installed."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = "none"
    return f"keyreduce works with transformers {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}, installed is {installed}"


def generation_note(shipped_by: str | None) -> str | None:
    """Return in one sentence with which versions ``generate`` is right; None where it is with all.

    ``shipped_by`` is the package that has the model's class, as :class:`keyreduce.families.Family` names it.
    """
    if shipped_by != "fla":
        return None
    return (
        f"to generate: transformers {OLDEST_TRANSFORMERS} to {LAST_BEFORE_CACHE}, or fla_torch.mend() first, which "
        "keyreduce brings (with later ones fla 0.6 alone forgets its state after each token)"
    )
