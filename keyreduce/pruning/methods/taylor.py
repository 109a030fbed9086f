"""Taylor: how much the loss would change to first order if a channel's weights were zero.

With ``s_nc = sum_d W_cd dL_n/dW_cd`` for row n of the calibration text, the score of a row of weights depends on the
option ``form``: ``first`` is ``|sum_n s_nc|``; ``squared`` is ``sum_n s_nc^2``, the diagonal Fisher information along
the row; ``element`` is ``sum_d |W_cd sum_n dL_n/dW_cd|``. A key channel has its rows of Wq and Wk, a value channel its
row of Wv and its column of Wo, a head all of them; their scores are added. Ma et al., "LLM-Pruner", arXiv:2305.11627,
section 3.2.
"""

from keyreduce.errors import KeyreduceError
from keyreduce.pruning.methods.method import LayerView, Method, all_targets

FORMS = {"first": "signed", "squared": "squared", "element": "element"}


def _score(layer: LayerView, form: str, parts: tuple[str, str]):
    taylor = layer.statistics.taylor
    assert taylor is not None  # needs_gradients
    one, other = (taylor.of(FORMS[form], part) for part in parts)
    return one.abs() + other.abs()  # only signed scores can be negative


def _check(options) -> None:
    if options["form"] not in FORMS:
        raise KeyreduceError(f"`form` is {options['form']!r}; take one of {', '.join(FORMS)}")


TAYLOR = Method(
    name="taylor",
    summary="weights times their gradient (needs a calibration with gradients)",
    citation="Ma et al., arXiv:2305.11627",
    select=all_targets(
        key=lambda layer, form: _score(layer, form, ("query", "key")),
        value=lambda layer, form: _score(layer, form, ("value", "output")),
    ),
    needs_statistics=True,
    needs_gradients=True,
    options={"form": "first"},
    check=_check,
)
