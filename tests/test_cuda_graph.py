"""What a capture asks of Python, without a GPU; tests/gpu/test_batch_gpu.py captures."""

import gc
import weakref

import pytest

from unique_asr.cuda_graph import garbage_kept


class Cycle:
    def __init__(self):
        self.itself = self


@pytest.fixture
def often():
    """Python collects with every other container that is made."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


def gone() -> bool:
    """Whether a cycle is collected while containers are made."""
    cycle = weakref.ref(Cycle())
    kept = [[each] for each in range(100)]
    return len(kept) == 100 and cycle() is None


def test_no_cycle_is_collected_during_a_capture(often):
    assert gone()
    with garbage_kept():
        assert not gone()
    assert gone()


def test_collecting_goes_on_after_an_error_and_stays_off_where_it_was(often):
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
