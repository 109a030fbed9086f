"""The bytes of a stored state, counted number by number."""

import pytest

from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes
from keyreduce.serving.state_formats import FORMATS, bytes_of, formats_of

SIZES = {0: MixerSizes(2, 4, 80, 104), 3: MixerSizes(2, 2, 5, 3)}
# Of one head of 80 x 104 and one of 5 x 3: bytes of numbers, and how many scales.
HEADS = {
    "float32": ((33280, 0), (60, 0)),
    "bfloat16": ((16640, 0), (30, 0)),
    "float16": ((16640, 0), (30, 0)),
    "fp8": ((8320, 104), (15, 3)),
    "fp8-head": ((8320, 1), (15, 1)),
    "int8": ((8320, 104), (15, 3)),
    "int8-key": ((8320, 80), (15, 5)),
    "int8-key-32": ((8320, 80 * 4), (15, 5)),
    "int4": ((4160, 104), (8, 3)),
    "int4-32": ((4160, 104 * 3), (8, 3)),
    "int4-rotated": ((4160, 104), (8, 3)),
    "int4-key": ((4160, 80), (8, 5)),
    "int4-key-32": ((4160, 80 * 4), (8, 5)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_of_a_sequence(name):
    (large, large_scales), (small, small_scales) = HEADS[name]
    assert bytes_of(name, SIZES) == 4 * (large + 4 * large_scales) + 2 * (small + 4 * small_scales)


def test_a_format_for_each_head():
    mixed = {0: ["float32", "int8", "int8", "bfloat16"], 3: ["int4", "float32"]}
    assert formats_of(mixed, SIZES) == mixed
    assert bytes_of(mixed, SIZES) == 33280 + 2 * (8320 + 416) + 16640 + (8 + 12) + 60


@pytest.mark.parametrize(
    ("dtypes", "told"),
    [
        ("int3", "`state_dtype` is 'int3'; take one of float32, bfloat16"),
        ({0: ["int8"] * 4}, "0 formats for the 2 value heads of layer 3"),
        ({0: ["int8"] * 3, 3: ["int8"] * 2}, "3 formats for the 4 value heads of layer 0"),
        ({0: ["int8"] * 4, 3: ["int8", "x"]}, "`state_dtype` is 'x'"),
    ],
)
def test_what_is_no_choice_is_refused(dtypes, told):
    with pytest.raises(KeyreduceError, match=told):
        bytes_of(dtypes, SIZES)
