"""Models whose output layer is their embeddings: one tensor, which a checkpoint may hold by either name, or by both."""

from collections.abc import Collection, Mapping

from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError

OUTPUT = "lm_head.weight"
# What the models of fla and transformers call them, alone and inside larger models.
_NAMES = ("embeddings", "embed_tokens", "language_model.embed_tokens", "word_embeddings")
EMBEDDINGS = tuple(f"model.{name}.weight" for name in _NAMES)


def tied_output(config: Mapping, names: Collection[str]) -> dict[str, str]:
    """Return the second name of a tied tensor -> the one by which a checkpoint has it; nothing if they are two.

    The safetensors of such a model hold the tensor once: under the embedding's name as transformers saves it, under the
    output layer's as ``safetensors.torch.save_model`` does. Torch's ``state_dict`` names it twice, and so do the
    distributed checkpoints of torchtitan and flame, which look for either name. Where both are there, the second one is
    the output layer's.
    """
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if config.get("tie_word_embeddings", inner) is not True:
        return {}
    if found := [name for name in EMBEDDINGS if name in names]:
        return {OUTPUT: found[-1]}
    if OUTPUT not in names:
        return {}
    # So fla calls the norm before a mixer, and transformers does not.
    is_part = any(name.startswith("model.language_model.") for name in names)
    is_fla = any(".attn_norm." in name for name in names)
    return {EMBEDDINGS[2 if is_part else 0 if is_fla else 1]: OUTPUT}


def refuse_untied(source: Checkpoint, remedy: str) -> None:
    """Refuse a checkpoint whose output layer is not the embeddings, though its config says so.

    Raises KeyreduceError, which ends with the remedy.
    """
    for second, first in tied_output(source.config, source.tensors).items():
        if second in source.tensors and not source.are_same(second, first):
            raise KeyreduceError(
                f"{source.path} holds a {second!r} that is not {first!r}, though its config ties the two "
                f"(tie_word_embeddings); {remedy}"
            )
