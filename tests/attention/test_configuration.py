"""The settings of sparse attention."""

import math
from dataclasses import fields, replace

import pytest

from unique_asr.attention import SparseAttentionConfig


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"budget": 500}, "multiple of the page size"),
        ({"budget": 16}, "always read"),
        ({"page_size": 12}, "page_size"),
        ({"score": "best"}, "unique, mean"),
        ({"combine": "sum"}, "max, share"),
        ({"backend": "cuda"}, "auto, torch"),
        ({"recent_pages": 0}, "page being written"),
        ({"statistics_dtype": "fp4"}, "keys, fp8, int8"),
        ({"super_page_size": 8}, "above the page size"),
        ({"super_page_size": 48}, "super_page_size is 48"),
        ({"super_page_size": 64, "super_pages": 7}, "at least 8"),
        *(({"budget": value}, "budget is .*: give a whole number, or null") for value in ("x", [1], 512.0, True)),
        *(
            ({name: value}, f"{name} is .*: give a whole number")
            for name in ("sink_pages", "recent_pages", "dense_layers")
            for value in ("x", None, 1.0, True)
        ),
        *(
            ({"scale": value}, "scale is .*: give a finite number")
            for value in ("a", None, True, math.nan, math.inf, -1)
        ),
        ({"dense_layers": -1}, "dense_layers is -1: give 0 or more"),
        *(
            ({"super_page_size": 64, "super_pages": value}, "super_pages is .*: give a whole")
            for value in ("x", 0, True)
        ),
        ({"super_pages": 64}, "without super_page_size"),
        ({"budget": None, "super_page_size": 48}, "super_page_size is 48"),
        ({"super_page_size": "x"}, "super_page_size is 'x'"),
        ({"page_size": 8.0}, "page_size is 8.0"),
        ({"page_size": "x"}, "page_size is 'x'"),
        ({"selector": "x"}, "selector is a str"),
    ],
)
def test_a_wrong_option_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        replace(SparseAttentionConfig(), **wrong)


@pytest.mark.parametrize("name", [field.name for field in fields(SparseAttentionConfig)])
@pytest.mark.parametrize("value", ["x\ny", [1], {}, 1.5j, pytest.param(object(), id="object")], ids=str)
def test_no_field_takes_anything(name, value):
    with pytest.raises(ValueError, match=rf"^attention\.{name} is [^\n]*$"):
        SparseAttentionConfig(**{name: value})
