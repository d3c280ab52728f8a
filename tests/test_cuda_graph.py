"""What a capture asks of Python, without a GPU; tests/gpu/test_batch_gpu.py captures."""

import gc

import pytest

from unique_asr.cuda_graph import garbage_kept


def test_nothing_is_collected_during_a_capture():
    with garbage_kept():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collecting_goes_on_after_an_error_and_stays_off_where_it_was():
    with pytest.raises(RuntimeError), garbage_kept():
        raise RuntimeError
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage_kept():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
