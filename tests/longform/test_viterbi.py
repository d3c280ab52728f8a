"""Cheapest paths: the loop for the compiler, and what is compiled of it, against the plain twin."""

import builtins

import numpy as np
import pytest

from unique_asr.longform import viterbi


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs that are often equal, and jumps of which some are not allowed."""
    rng = np.random.default_rng(seed)
    states = 2 * int(rng.integers(1, 12 if seed % 8 else 120)) + 1
    costs = rng.integers(0, 4, (int(rng.integers(2, 300)), states)).astype(np.float32)
    if seed % 2:
        costs += rng.random(costs.shape, np.float32)
    jump = np.full(states, np.inf, np.float32)
    jump[3::2] = np.where(rng.random(len(jump[3::2])) < 0.3, np.inf, 0)
    return costs, jump


@pytest.mark.parametrize("seed", range(40))
def test_the_loop_finds_the_path_of_the_twin(seed):
    np.testing.assert_array_equal(viterbi.loop(*case(seed)), viterbi.reference(*case(seed)))


def test_so_does_the_compiled_loop():
    find = viterbi._compiled()
    assert find is not viterbi.reference, "numba comes with librosa"
    for seed in range(100):
        np.testing.assert_array_equal(find(*case(seed)), viterbi.reference(*case(seed)))


@pytest.mark.parametrize("find", [viterbi.reference, viterbi.loop])
def test_too_few_frames_for_the_states_have_no_path(find):
    jump = np.full(9, np.inf, np.float32)
    assert len(find(np.zeros((3, 9), np.float32), jump)) == 0
    assert find(np.zeros((7, 9), np.float32), jump).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_path_takes_the_cheap_states():
    costs = np.ones((6, 5), np.float32)
    jump = np.array([np.inf, np.inf, np.inf, 0, np.inf], np.float32)
    costs[[0, 1, 2, 3, 4, 5], [0, 0, 1, 3, 3, 4]] = 0
    for find in (viterbi.reference, viterbi.loop):
        assert find(costs, jump).tolist() == [0, 0, 1, 3, 3, 4]


def test_long_recordings_get_the_compiled_loop(monkeypatch):
    found = []
    monkeypatch.setattr(viterbi, "_calls", iter(range(viterbi.SHORT + 2)))
    monkeypatch.setattr(viterbi, "reference", lambda *given: found.append("twin"))
    monkeypatch.setattr(viterbi, "_compiled", lambda: lambda *given: found.append("compiled"))
    for _ in range(viterbi.SHORT + 2):
        viterbi.cheapest_path(*case(0))
    assert found == ["twin"] * viterbi.SHORT + ["compiled"] * 2


def test_without_numba_the_twin_goes_on(monkeypatch):
    real = builtins.__import__

    def no_numba(name, *rest, **options):
        if name == "numba":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", no_numba)
    assert viterbi._compiled.__wrapped__() is viterbi.reference
