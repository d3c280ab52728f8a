"""The cheapest path through states in a row: what an alignment is made of. Compiled, with a plain NumPy twin."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np

SHORT = 64  # paths, some ten minutes of speech: whoever needs no more does without loading a compiler
_calls = itertools.count()


def cheapest_path(costs: np.ndarray, jump: np.ndarray) -> np.ndarray:
    """The states [T] of the cheapest path through S states in T frames; empty if there is none.

    A path begins in state 0 or 1, ends in one of the last two, and from a frame to the next stays, goes on by one
    state, or by two at the price of `jump`. Of equal paths the one that stays wins, then the one that goes on by one.

    Args:
        costs: [T, S] float32, of being in a state.
        jump: [S] float32, of coming from the state two before; infinite where that is not allowed.
    """
    find = reference if next(_calls) < SHORT else _compiled()
    return find(costs, jump)


def reference(costs: np.ndarray, jump: np.ndarray) -> np.ndarray:
    """`cheapest_path`, frame by frame."""
    frames, states = costs.shape
    total = np.full(states, np.inf, np.float32)
    total[:2] = costs[0, :2]
    options = np.full((3, states), np.inf, np.float32)  # stay, come from the state before, or from the one before that
    moves = np.empty((frames, states), np.int8)
    for frame in range(1, frames):
        options[0] = total
        options[1, 1:] = total[:-1]
        np.add(total[:-2], jump[2:], out=options[2, 2:])
        moves[frame] = options.argmin(0)
        options.min(0, out=total)
        total += costs[frame]
    state = states - 1 if total[-1] <= total[-2] else states - 2
    if not np.isfinite(total[state]):
        return np.empty(0, np.int64)
    path = np.empty(frames, np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        if frame:
            state -= int(moves[frame, state])
    return path


def loop(costs: np.ndarray, jump: np.ndarray) -> np.ndarray:
    """The same, state by state, for the compiler."""
    frames, states = costs.shape
    total = np.full(states, np.float32(np.inf))
    total[:2] = costs[0, :2]
    moves = np.zeros((frames, states), np.int8)
    for frame in range(1, frames):
        for state in range(states - 1, -1, -1):  # downwards, so that the states before are still those of before
            best, move = total[state], 0
            if state >= 1 and total[state - 1] < best:
                best, move = total[state - 1], 1
            if state >= 2 and total[state - 2] + jump[state] < best:
                best, move = total[state - 2] + jump[state], 2
            total[state] = best + costs[frame, state]
            moves[frame, state] = move
    state = states - 1 if total[states - 1] <= total[states - 2] else states - 2
    if not np.isfinite(total[state]):
        return np.empty(0, np.int64)
    path = np.empty(frames, np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        state -= int(moves[frame, state])
    return path


@functools.cache
def _compiled() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`loop`, compiled in 4 s once for all processes, or the twin where numba is missing or older than this NumPy."""
    try:
        from numba import njit
    except ImportError:
        return reference
    try:
        return njit(cache=True)(loop)
    except RuntimeError:  # neither the folder of this file nor the user's can be written to
        return njit(loop)
