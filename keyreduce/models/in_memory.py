"""A model in memory as a checkpoint to prune from, and the smaller model that comes of it."""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from keyreduce.checkpoint.shards import make_spec
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.models.classes import family_in, from_pretrained
from keyreduce.models.loading import LoadedModel, prepare_backend, silenced
from keyreduce.models.tokenizers import check_vocabulary


class ModuleCheckpoint(Checkpoint):
    """A model's tensors as the library would save them: under their names in files, and in their pieces.

    Reading copies to the CPU. The model itself is never changed.
    """

    shards = None

    def __init__(self, model: PreTrainedModel):
        super().__init__(())
        self.path = Path(model.name_or_path or type(model).__name__)
        self.config = model.config.to_dict()
        state = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
        self._state: Mapping[str, torch.Tensor] = revert_weight_conversion(model, state)
        self.tensors = {name: make_spec(name, value.dtype, value.shape) for name, value in self._state.items()}

    @property
    def sidecars(self) -> tuple[Path, ...]:
        return ()

    def read(self, name: str) -> torch.Tensor:
        if name not in self._state:
            raise KeyreduceError(f"the model has no tensor {name!r}")
        # A copy: the pruned model must not share memory with this one.
        return self._state[name].detach().to("cpu", copy=True).contiguous()

    def ranges(self, name: str) -> None:
        return None


def loaded_module(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, gradients: bool = False
) -> LoadedModel:
    """Return a model in memory as commands have it that loaded it from a folder, ready to run where it is.

    For ``gradients`` see :func:`keyreduce.models.loading.prepare_backend`.
    """
    family, name = family_in(model), Path(model.name_or_path or type(model).__name__)
    if tokenizer is not None:
        embeddings: Any = model.get_input_embeddings()
        check_vocabulary(tokenizer, len(embeddings.weight), name)
    prepare_backend(model.device, gradients=gradients)
    return LoadedModel(model, tokenizer, family, name)


def rebuilt(model: PreTrainedModel, config: Mapping, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Return a new model of the same class, on the same device, each parameter in the dtype that it has in ``model``.

    It is made from the content of its config.json and name in files -> tensor, of all that the class asks for.

    Raises KeyreduceError if the class does not load them.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    # Some parameters may be wider than the others, and no bit of theirs may be lost on the way.
    widest = reduce(torch.promote_types, dtypes.values(), torch.float32)
    with silenced():
        theirs = type(model.config).from_dict(dict(config))
        new, report = from_pretrained(type(model), None, config=theirs, state_dict=dict(tensors), dtype=widest)
    if missing := report["missing_keys"]:
        raise KeyreduceError(f"the model has no tensor {min(missing)!r}, which its config asks for")
    for name, parameter in new.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    new.config.dtype = model.config.dtype
    new.name_or_path = new.config.name_or_path = model.name_or_path
    if (generation_config := getattr(model, "generation_config", None)) is not None:
        new.generation_config = generation_config
    return new.to(model.device).train(model.training)
