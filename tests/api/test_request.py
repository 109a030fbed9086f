"""Requests: one declaration of a setting, checked the same whoever makes it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyreduce.api.benchmark import BenchmarkRequest
from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.compare import CompareRequest
from keyreduce.api.convert import ConvertRequest
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.api.prune import PruneRequest
from keyreduce.api.rank import RankRequest
from keyreduce.api.recover import RecoverRequest
from keyreduce.api.registries import FamiliesRequest, MethodsRequest
from keyreduce.api.request import Request, Result, option, specs
from keyreduce.api.verify import VerifyRequest
from keyreduce.errors import KeyreduceError
from keyreduce.sweep.request import SweepRequest, TableRequest

REQUESTS = (
    *(BenchmarkRequest, CalibrateRequest, CompareRequest, ConvertRequest, EvaluateRequest, PruneRequest),
    *(RankRequest, RecoverRequest, SweepRequest, TableRequest, VerifyRequest, FamiliesRequest, MethodsRequest),
)


@dataclass(frozen=True, kw_only=True)
class Sample(Request):
    """A request with a field of each kind."""

    place: Path = option(help="A path.")
    kind: Literal["some", "other"] = option("some", help="A choice.")
    count: int | None = option(None, help="A number.", minimum=1, maximum=5)
    share: float = option(0.5, help="A number.", minimum=0)
    names: tuple[str, ...] = option((), help="Names.", commas=True)
    sizes: tuple[int, ...] = option((1, 2), help="Numbers.", commas=True, minimum=1)
    files: tuple[Path, ...] = option((), help="Paths.")
    is_on: bool = option(False, help="A flag.")


def test_values_become_what_their_fields_hold():
    request = Sample(place="here", share=1, names="a, b,c", sizes="3,4", files=["x", Path("y")])
    assert request.place == Path("here")
    assert (type(request.share), request.share) == (float, 1.0)
    assert (request.names, request.sizes, request.files) == (("a", "b", "c"), (3, 4), (Path("x"), Path("y")))
    assert Sample(place="here", names=0.5, sizes=7).names == ("0.5",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.share = 2


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "neither"}, "`kind` is 'neither'; take one of some, other"),
        ({"count": 0}, "`count` is 0; it is at least 1"),
        ({"count": 6}, "`count` is 6; it is at most 5"),
        ({"count": 1.5}, "`count` is 1.5, where a whole number belongs"),
        ({"count": True}, "`count` is True, where a whole number belongs"),
        ({"share": float("nan")}, "`share` is nan; it is at least 0"),
        ({"share": None}, "`share` is None, where a number belongs"),
        ({"sizes": "1,x"}, "`sizes` has 'x', where whole numbers with commas between them belong"),
        ({"sizes": (1, 0)}, "`sizes` is 0; it is at least 1"),
        ({"files": 3}, "`files` is 3, where paths belong"),
        ({"is_on": "yes"}, "`is_on` is 'yes', where true or false belongs"),
    ],
)
def test_what_no_field_holds_is_refused(values, told):
    with pytest.raises(KeyreduceError) as caught:
        Sample(**{"place": "here"} | values)
    assert str(caught.value) == told
    assert caught.value.field == next(iter(values))
    assert caught.value.with_names("--{}".format).startswith(f"--{next(iter(values))} ")


@given(st.builds(dict, count=st.none() | st.integers(1, 5), share=st.floats(0, 1e9), is_on=st.booleans()))
def test_json_and_back(values):
    request = Sample(place="there", files=["a", "b"], **values)
    assert Sample.of_json(json.loads(json.dumps(request.to_json()))) == request


def test_json_of_another_form_is_refused():
    with pytest.raises(KeyreduceError, match="`nothing` is unknown; known are place, kind"):
        Sample.of_json({"place": "here", "nothing": 1})
    with pytest.raises(KeyreduceError, match="`place` is missing; it is a path"):
        Sample.of_json({})


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda one: one.__name__)
def test_every_request_can_be_sent_as_it_is_by_default(request_type):
    given = {name: "x" for name, spec in specs(request_type).items() if spec.default is dataclasses.MISSING}
    request = request_type(**given)
    assert request_type.of_json(json.loads(json.dumps(request.to_json()))) == request
    for name, spec in specs(request_type).items():
        assert (spec.option.help and spec.option.help[-1] in ".)0123456789") or name in ("method", "mode"), name
        assert all(other in specs(request_type) for other in spec.option.instead_of), name
        if spec.choices and not spec.is_many and spec.default is not None:
            assert spec.default in spec.choices


def test_results_leave_out_what_there_is_not():
    @dataclass(frozen=True, kw_only=True)
    class Made(Result):
        folder: Path
        sizes: dict[int, tuple[int, ...]]
        seconds: float | None = None

    assert Made(folder=Path("a/b"), sizes={1: (2, 3)}).to_json() == {"folder": "a/b", "sizes": {"1": [2, 3]}}
