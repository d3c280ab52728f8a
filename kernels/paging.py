"""Where tokens and pages lie: by position, or by a block table. And the counters of kernels whose last program merges.

Without a table sequence b of buffers [B, K, n, width] holds its tokens, or pages, in order. With one, int32
[B, blocks], the buffers are [blocks in all, K, n, width], and entry i of sequence b is [table[b, i // n], :, i % n].
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def locate(index, sequence, table, table_stride, mask, PER_BLOCK: tl.constexpr):
    """Return block and place within it, int64, of entries `index` where `mask`; PER_BLOCK 0: there is no table."""
    if PER_BLOCK > 0:
        block = tl.load(table + sequence * table_stride + index // PER_BLOCK, mask=mask, other=0).to(tl.int64)
        place = (index % PER_BLOCK).to(tl.int64)
    else:
        block = sequence
        place = index.to(tl.int64)
    return block, place


@triton.jit
def arrive(counter, count=1):
    """Add `count`, and return the value before: what was written by programs until they arrived is visible now."""
    tl.debug_barrier()
    return tl.atomic_add(counter, count, sem="acq_rel")


@triton.jit
def wait_for(counter, value, BITS: tl.constexpr = 0x7FFFFFFF):
    """Wait until these bits of the counter reach `value`: what was written until then is visible from here on."""
    while (tl.atomic_add(counter, 0, sem="acquire") & BITS) < value:
        pass
    tl.debug_barrier()


@triton.jit
def is_last(counter, PROGRAMS: tl.constexpr):
    """Tell whether this program is the last of PROGRAMS to get here, and reset the counter.

    What the others wrote is then visible.
    """
    last = arrive(counter) == PROGRAMS - 1
    if last:
        tl.store(counter, 0)
    return last


STREAMS = 16  # of a device: counters are allocated for so many at once
_pools: dict[tuple[torch.device, int], list[Tensor]] = {}  # never freed: captured graphs hold their addresses
_counters: dict[tuple[torch.device, int, int], Tensor] = {}  # of each device, size and stream: a row of a pool
_lock = threading.Lock()


def get_counters(rows: int, device: torch.device) -> Tensor:
    """Return at least `rows` counters, int32, of value 0 between launches, the same ones for every call on a stream.

    Graphs captured on one stream share its counters: where they may run at the same time, give each its own.

    Raises:
        RuntimeError: they would have to be allocated while a CUDA graph is captured.
    """
    size = max(16384, triton.next_power_of_2(rows))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    existing = _counters.get((device, size, stream))
    return _allocate_counters(device, size, stream) if existing is None else existing


def _allocate_counters(device: torch.device, size: int, stream: int) -> Tensor:
    with _lock:
        pools = _pools.setdefault((device, size), [])
        used = sum(key[:2] == (device, size) for key in _counters)
        if used == STREAMS * len(pools):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("run the step once before it is captured: its counters are not allocated yet")
            pools.append(torch.zeros(STREAMS, size, dtype=torch.int32, device=device))
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # other streams will use them too
        return _counters.setdefault((device, size, stream), pools[-1][used % STREAMS])


def make_table_arguments(block_table: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """Return a block table and its stride for a kernel; `other` takes the place of a table that is not there."""
    return (other, 0) if block_table is None else (block_table, block_table.stride(0))
