"""fla's models decode with transformers 5.24 and later too.

Since 5.24 transformers gives a model its state as ``cache``; before, that was ``past_key_values``. fla 0.6.0 knows the
old name alone and ignores arguments that it does not know, so that ``generate`` decodes each token without a state.
Here fla's models take the state under either name.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator

_DEPRECATION = "`past_key_values`/`cache_params` are deprecated"


def accept_cache() -> None:
    """Let fla's models take their state as the installed transformers passes it; again, this changes nothing."""
    from fla.models.generation_utils import FLAGenerationMixin
    from transformers.generation import GenerationMixin

    if "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return
    for model_class in _model_classes():
        forward = vars(model_class).get("forward")
        if forward is not None and not hasattr(forward, "takes_cache"):
            model_class.forward = _taking_cache(forward)
    # fla's own hands on the old name; all else that it does is for transformers before 5.
    FLAGenerationMixin.prepare_inputs_for_generation = GenerationMixin.prepare_inputs_for_generation
    # fla's code uses the old name in what it returns, which is for fla to change, and not for who runs its models.
    logger = logging.getLogger("transformers.utils.generic")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _model_classes() -> Iterator[type]:
    """Yield every class of fla's that its models are made of, some more than once."""
    import fla.models
    from transformers import PreTrainedModel

    for value in vars(fla.models).values():
        if isinstance(value, type) and issubclass(value, PreTrainedModel):
            yield from (base for base in value.__mro__ if base.__module__.startswith("fla."))


def _taking_cache(forward: Callable) -> Callable:
    # transformers reads the signature, and passes only what it finds there.
    @functools.wraps(forward)
    def call(self, *args, cache=None, **kwargs):
        if cache is not None:
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    call.takes_cache = True  # pyright: ignore[reportFunctionMemberAccess]  (a mark, so that it is not wrapped twice)
    return call


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_DEPRECATION)
