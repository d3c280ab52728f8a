"""Dense against sparse attention on one recording: where the texts differ, and what each took."""

from __future__ import annotations

from difflib import SequenceMatcher

from unique_asr.transcript import Transcript, TranscriptionInfo

DENSE, SPARSE = "only dense", "only sparse"


def find_differences(dense: str, sparse: str) -> list[tuple[str, str | None]]:
    """Return pieces of text, each with the transcript that alone has it (DENSE, SPARSE), or None if both have it."""
    before, after = dense.split(), sparse.split()
    pieces: list[tuple[str, str | None]] = []
    for _, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if before[i:j] == after[k:m]:
            pieces.append((" ".join(before[i:j]) + " ", None))
            continue
        pieces += [(" ".join(before[i:j]) + " ", DENSE)] if i < j else []
        pieces += [(" ".join(after[k:m]) + " ", SPARSE)] if k < m else []
    return pieces


def compare(dense: Transcript, sparse: Transcript) -> tuple[list[tuple[str, str | None]], list[list[str]]]:
    """Return the differences of the texts, and a row of a table under COLUMNS for each transcript."""
    return find_differences(dense.text, sparse.text), [_row("dense", dense.info), _row("sparse", sparse.info)]


COLUMNS = ["Attention", "Decoding (s)", "All (s)", "Steps", "Sparse steps", "Pages read", "Coverage"]


def _row(name: str, info: TranscriptionInfo) -> list[str]:
    timings = {stage: seconds for stage, seconds in info.timings.items() if stage != "load"}
    sparsity = info.sparsity
    return [
        name,
        f"{timings.get('decode', 0.0):.1f}",
        f"{sum(timings.values()):.1f}",
        str(sparsity.get("steps", "")),
        str(sparsity.get("sparse_steps", "")),
        f"{100 * sparsity.get('share_of_pages_read', 1.0):.0f} %",
        f"{100 * info.coverage:.0f} %",
    ]
