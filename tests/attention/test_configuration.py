"""The settings of sparse attention."""

from dataclasses import replace

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
    ],
)
def test_a_wrong_option_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        replace(SparseAttentionConfig(), **wrong)
