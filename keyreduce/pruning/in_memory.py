"""A module in memory and a plan to the smaller module."""

from transformers import PreTrainedModel

from keyreduce.checkpoint.rewrite import EditedTensors
from keyreduce.families import family_of
from keyreduce.models.in_memory import ModuleCheckpoint, rebuilt
from keyreduce.pruning.plan import Plan
from keyreduce.pruning.prune import plan_edits


def pruned_module(model: PreTrainedModel, source: ModuleCheckpoint, plan: Plan) -> PreTrainedModel:
    """Return a new module that holds what a plan leaves of ``model``, of which ``source`` is the checkpoint.

    Raises KeyreduceError if the model's class does not load it.
    """
    edited = EditedTensors(source, plan_edits(source, plan))
    config = family_of(source.config).resized(source.config, plan.after)
    return rebuilt(model, config, {name: edited.read(name) for name in edited.tensors})
