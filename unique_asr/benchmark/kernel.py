"""Every stage of a sparse decode step of one layer on a GPU, and the whole, against dense attention by other libraries.

A step is what a decoder runs for a layer: append the token and its statistics, score and select pages, attend. Lengths
fill the cache, so that the token appended completes its page (with pages of 8 one step in eight does).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unique_asr.attention import SparseAttentionConfig, SparsityCounters, reference
from unique_asr.attention.paged_layer import PagedLayer
from unique_asr.attention.static_step import StaticStep
from unique_asr.attention.steps import run_static_step
from unique_asr.benchmark.timing import attempt, measure_copy_bandwidth, time_graph
from unique_asr.kernels import page_scores, sparse_decode, sparse_step, top_pages

WORKING_SET = 4  # times the L2 cache: what is read between two reads of the same memory


class Case:
    """A batch of sequences of one length, with more copies of a layer's keys and values than the L2 cache holds.

    Args:
        batch: sequences; context: tokens of each.
        heads: query heads; kv_heads: KV heads; head_dim: D.
    """

    def __init__(
        self,
        batch: int,
        context: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.batch, self.context, self.heads, self.kv_heads, self.dim = batch, context, heads, kv_heads, head_dim
        self.device, self.dtype = device, dtype
        statistics_bytes = batch * kv_heads * context // 8 * (head_dim + 4)  # the smallest that any stage reads, nearly
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(32, max(1, -(-WORKING_SET * cache // statistics_bytes)))
        shape = batch, kv_heads, context, head_dim
        self.token_bytes = 2 * head_dim * dtype.itemsize  # of a key and a value
        self.dense_bytes = batch * kv_heads * context * self.token_bytes
        copies = max(1, min(copies, int(0.7 * torch.cuda.mem_get_info(device)[0] / self.dense_bytes)))
        self.keys = [torch.randn(shape, device=device, dtype=dtype) for _ in range(copies)]
        self.values = [torch.randn(shape, device=device, dtype=dtype) for _ in range(copies)]
        self.query = torch.randn(batch, heads, 1, head_dim, device=device, dtype=dtype)
        self.token = torch.randn(2, batch, kv_heads, 1, head_dim, device=device, dtype=dtype)
        self.scaling = head_dim**-0.5

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.context // 1024} K context, {len(self.keys)} copies"

    def make_layers(self, config: SparseAttentionConfig) -> list[PagedLayer]:
        """Make layers over the same keys and values, with statistics and a static step that writes the last token."""
        step = StaticStep(
            torch.full((1,), self.context - 1, device=self.device), sparse=True, config=config, capacity=self.context
        )
        layers = []
        for keys, values in zip(self.keys, self.values):
            layer = PagedLayer(config, SparsityCounters())
            layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values, layer.length, layer.step = keys, values, self.context, step
            for level in layer.levels:
                level.grow(self.context)
            layer.update_statistics()
            layers.append(layer)
        return layers


class Table:
    """Prints a line for each measurement; one that fails prints why and does not stop the others."""

    def __init__(self, bandwidth: float):
        self.bandwidth = bandwidth  # bytes a second of a copy, read and written

    def measure_row(
        self, name: str, calls: Sequence[Callable[[], object]], bytes_moved: float, replays: int = 25, note: str = ""
    ) -> float | None:
        """Time calls, print the line, and return the seconds of one call.

        Args:
            bytes_moved: that a call has to read and write, at least.
        """
        seconds = attempt(lambda: time_graph(calls, replays))
        if seconds is not None:
            share = bytes_moved / seconds / self.bandwidth
            line = f"  {name:42s} {seconds * 1e6:9.1f} us  {bytes_moved / 1e6:9.1f} MB  {share:5.0%} of copy  {note}"
            print(line.rstrip(), flush=True)
        return seconds


@torch.no_grad()
def benchmark(
    cases: Sequence[Sequence[int]],
    configurations: Sequence[dict],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    flashinfer: Sequence[str] = (),
    top_pages: Sequence[Sequence[int]] = (),
    tune: bool = False,
) -> None:
    """Print a table for each case.

    Args:
        cases: [batch, context] each; context in tokens.
        configurations: fields of `SparseAttentionConfig` each.
        heads: query heads; kv_heads: KV heads; head_dim: D.
        flashinfer: cuda_cores, tensor_cores: on what FlashInfer's dense attention is measured.
        top_pages: [rows, pages, count] each, for the selection of pages alone.
        tune: whether other tiles than those of the kernels are tried.
    """
    table = Table(measure_copy_bandwidth(device))
    shape = f"{heads} query heads, {kv_heads} KV heads, head dim {head_dim}"
    print(f"copy {table.bandwidth / 1e12:.2f} TB/s; {shape}, {str(dtype).removeprefix('torch.')}", flush=True)

    def measure_case(case: Case) -> None:
        print(f"\n{case}; KV {case.dense_bytes / 1e6:.0f} MB a layer", flush=True)
        dense = measure_dense(case, flashinfer, table)
        for configuration in configurations:
            attempt(partial(measure_step, case, configuration, dense, table, tune))
            torch.cuda.empty_cache()

    for batch, context in cases:
        attempt(lambda: measure_case(Case(batch, context, heads, kv_heads, head_dim, device, dtype)))  # noqa: B023
        torch.cuda.empty_cache()
    for rows, pages, count in top_pages:  # last, for FlashInfer compiles its top-k for minutes
        attempt(partial(measure_top_pages, rows, pages, count, device))


def measure_dense(case: Case, flashinfer: Sequence[str], table: Table) -> float | None:
    """Return the seconds of dense attention: FlashInfer's if it is installed, on its faster cores, else SDPA's."""
    calls = [
        lambda keys=keys, values=values: F.scaled_dot_product_attention(case.query, keys, values, enable_gqa=True)
        for keys, values in zip(case.keys, case.values)
    ]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        sdpa = table.measure_row("dense, SDPA (FlashAttention)", calls, case.dense_bytes, 10)
    times = [attempt(partial(measure_flashinfer, case, cores, table)) for cores in flashinfer]
    times = [time for time in times if time is not None]
    if flashinfer and not times:
        print("  FlashInfer is missing or failed: speed-ups are over SDPA (pip install unique-asr[flashinfer])")
    return min(times, default=sdpa)


def measure_flashinfer(case: Case, cores: str, table: Table) -> float | None:
    """Measure FlashInfer's paged decode with pages of 16 tokens; `cores` are cuda_cores or tensor_cores."""
    import flashinfer

    size, device = 16, case.device
    blocks = case.batch * case.context // size
    counts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * (case.context // size)
    pages = torch.arange(blocks, dtype=torch.int32, device=device)
    last = torch.full((case.batch,), size, dtype=torch.int32, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device=device), "NHD", use_cuda_graph=True,
        use_tensor_cores=cores == "tensor_cores", paged_kv_indptr_buffer=counts.clone(),
        paged_kv_indices_buffer=pages.clone(), paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        counts, pages, last, case.heads, case.kv_heads, case.dim, size,
        q_data_type=case.dtype, kv_data_type=case.dtype,
    )  # fmt: skip
    query, shape = case.query[:, :, 0], (blocks, size, case.kv_heads, case.dim)
    if case.dense_bytes < 2e9:
        exact = F.scaled_dot_product_attention(case.query, case.keys[0], case.values[0], enable_gqa=True)[:, :, 0]
        right = tuple(each.transpose(1, 2).reshape(shape) for each in (case.keys[0], case.values[0]))
        error = (wrapper.run(query, right) - exact).abs().max().item()
        print(f"  FlashInfer {flashinfer.__version__}, {cores}: largest difference to SDPA {error:.4f}", flush=True)
    # The same memory read as another layout: its numbers are elsewhere, its time is not.
    calls = [
        partial(wrapper.run, query, (keys.view(shape), values.view(shape)))
        for keys, values in zip(case.keys, case.values)
    ]
    return table.measure_row(f"dense, FlashInfer, {cores}", calls, case.dense_bytes, 10)


def format_name(configuration: dict) -> str:
    """Return the fields of a configuration as text."""
    return ", ".join(f"{key} {value}" for key, value in configuration.items()) or "default"


def measure_step(case: Case, configuration: dict, dense: float | None, table: Table, tune: bool) -> None:
    """Measure every stage and the whole step of one configuration."""
    config = SparseAttentionConfig(**{"backend": "triton", **configuration})
    if config.reads_all(case.context):
        return
    layers = case.make_layers(config)
    print(f" {format_name(configuration)}: {attempt(partial(compare_with_pytorch, case, layers[0]))}", flush=True)
    rows = case.batch * case.kv_heads
    stored = [sum(each.nbytes for each in level.statistics) for level in layers[0].levels]
    scored = stored[0]
    if config.pages_per_super > 1:
        scored = stored[1] + stored[0] * min(1, (config.super_count + 1) * config.super_page_size / case.context)
    attended = rows * config.budget * case.token_bytes

    appends = [partial(layer.write_token, *case.token) for layer in layers]
    table.measure_row("append", appends, rows * case.token_bytes * (2 + config.page_size / 2))
    pages = attempt(partial(measure_selection, case, layers, scored, table, tune))
    if pages is not None:
        measure_attention(case, layers, pages, attended, table, tune)
    attempt(partial(measure_one_launch, case, layers, scored + attended, table))
    steps = [partial(run_static_step, layer, case.query, *case.token, case.scaling) for layer in layers]
    seconds = table.measure_row("whole step", steps, scored + attended)
    if seconds is not None and dense is not None:
        kept = sum(stored) / case.dense_bytes
        print(f"  {dense / seconds:.1f} x dense; statistics {kept:.2%} of the KV cache", flush=True)


def measure_selection(case: Case, layers: list[PagedLayer], scored: float, table: Table, tune: bool) -> list[Tensor]:
    """Measure scores and top pages, apart and as the step runs them; return the pages selected in each layer."""
    config, query, lengths = layers[0].config, case.query[:, :, 0], layers[0].step.make_lengths(case.batch)
    selects = [
        partial(layer.selector.select_by_kernels, query, layer.levels, lengths, case.scaling) for layer in layers
    ]
    table.measure_row("scores and top pages" + (", two levels" if config.pages_per_super > 1 else ""), selects, scored)
    if config.pages_per_super == 1:
        scores = [
            partial(
                page_scores.page_scores, query, layer.statistics, lengths, config.score, config.scale, config.page_size,
                config.combine, config.sink_pages, config.recent_pages,
            )
            for layer in layers
        ]  # fmt: skip
        example = scores[0]()
        table.measure_row("scores", scores, scored + example.nbytes)
        table.measure_row("top pages", [partial(top_pages.top_pages, example, config.pages - 1)], example.nbytes)
        if tune:
            tune_scores(scores, scored + example.nbytes, table)
    return [select() for select in selects]


def measure_attention(
    case: Case, layers: list[PagedLayer], pages: list[Tensor], attended: float, table: Table, tune: bool
) -> None:
    """Measure attention over the selected pages."""
    query, lengths = case.query[:, :, 0], layers[0].step.make_lengths(case.batch)
    for splits in [None] + ([1, 2, 4, 8, 16] if tune else []):
        attends = [
            partial(
                sparse_decode.sparse_decode, query, layer.keys, layer.values, chosen, lengths, case.scaling,
                layer.config.page_size, splits=splits,
            )
            for layer, chosen in zip(layers, pages)
        ]  # fmt: skip
        table.measure_row("attention" if splits is None else f"  attention in {splits} splits", attends, attended)


def measure_one_launch(case: Case, layers: list[PagedLayer], bytes_moved: float, table: Table) -> None:
    """Measure the kernel `sparse_step` without the cache around it, where it takes so many pages."""
    config, lengths = layers[0].config, layers[0].step.make_lengths(case.batch)
    query, (key, value) = case.query[:, :, 0], case.token
    if case.context // (config.page_size * config.pages_per_super) > sparse_step.STEP_PAGES:
        return
    two = {"super_count": config.super_count} if config.pages_per_super > 1 else {}
    calls = [
        partial(
            sparse_step.sparse_step, query, key, value, layer.keys, layer.values, layer.levels[0].statistics, lengths,
            config.pages - 1, config.score, config.scale, config.combine, config.sink_pages, config.recent_pages,
            scaling=case.scaling, super_statistics=layer.levels[1].statistics if two else (), **two,
        )
        for layer in layers
    ]  # fmt: skip
    table.measure_row("one launch", calls, bytes_moved)


def compare_with_pytorch(case: Case, layer: PagedLayer) -> str:
    """Say how far the step by kernels is from the step in PyTorch, for the first sequences of the batch."""
    rows = min(case.batch, 4)
    small = PagedLayer(layer.config, SparsityCounters())
    small.lazy_initialization(layer.keys[:rows], layer.values[:rows])
    small.keys, small.values, small.step = layer.keys[:rows], layer.values[:rows], layer.step
    for level, other in zip(small.levels, layer.levels):
        level.statistics = tuple(each[:rows] for each in other.statistics)
    ours = run_static_step(layer, case.query, *case.token, case.scaling)[:rows].float()
    small.triton = False
    token = case.token[:, :rows]
    theirs = run_static_step(small, case.query[:rows], *token, case.scaling).float()
    error = (ours - theirs).abs().amax(dim=-1)
    # PyTorch's scores are rounded to 16 bits, so that a page at the threshold may differ: those heads are counted.
    equal = (error < 0.02).float().mean().item()
    return f"{equal:.1%} of heads equal to PyTorch's step, largest difference {error.max():.3f}"


def tune_scores(scores: Sequence[Callable[..., Tensor]], bytes_moved: float, table: Table) -> None:
    """Measure the scoring kernel with other tiles than its own."""
    for pages, warps, (tiles, stages) in itertools.product((64, 128, 256), (4, 8), ((1, 1), (4, 2), (8, 3))):
        tile = page_scores.ScoreTile(pages, tiles, warps, stages)
        tiled = [partial(score, tile=tile) for score in scores]
        table.measure_row(f"  {pages} pages, {tiles} tiles, {warps} warps, {stages} stages", tiled, bytes_moved, 8)


def measure_top_pages(rows: int, pages: int, count: int, device: torch.device) -> None:
    """Measure the selection of pages alone, beside torch's and FlashInfer's top-k."""
    scores = torch.randn(rows, pages, device=device)
    chosen = top_pages.top_pages(scores, count)
    exact = reference.top_pages(scores.unsqueeze(0), count)[0]
    times = [("ours", time_graph([lambda: top_pages.top_pages(scores, count)]))]
    times.append(("torch.topk", time_graph([lambda: scores.topk(count, sorted=False)], 10)))
    try:
        import flashinfer

        times.append(("flashinfer.top_k", time_graph([lambda: flashinfer.top_k(scores, count)], 10)))
    except Exception as error:
        times.append((f"flashinfer.top_k: {type(error).__name__}", float("nan")))
    line = ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in times)
    print(f"top {count} of {rows} x {pages} (equal: {torch.equal(chosen.long(), exact)}): {line}", flush=True)
