"""The output layer of a model that has one tensor for it and for its embeddings.

Its safetensors hold that tensor once, under the embedding's name. Torch's ``state_dict`` names it twice, and so do the
distributed checkpoints of torchtitan and flame, which look for either name.
"""

from collections.abc import Collection, Mapping

# What the models of fla and transformers call them, alone and inside larger models.
_OUTPUT = "lm_head.weight"
_EMBEDDINGS = ("model.embeddings.weight", "model.embed_tokens.weight", "model.language_model.embed_tokens.weight")


def tied_output(config: Mapping, names: Collection[str]) -> dict[str, str]:
    """Return the name of the output layer's weight -> that of the embeddings which it is; nothing if they are two.

    Args:
        config: the content of config.json.
        names: of the checkpoint's tensors.
    """
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    is_tied = config.get("tie_word_embeddings", inner)
    return {_OUTPUT: name for name in _EMBEDDINGS if name in names} if is_tied is True else {}
