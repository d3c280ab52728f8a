"""The known speech LLMs as a Markdown table: python -m unique_asr.models.pretrained"""

from unique_asr.models.pretrained import KNOWN_MODELS
from unique_asr.models.pretrained.pass_memory import estimate_pass_memory

COLUMNS = (
    "model", "licence", "one pass", "audio tokens/s", "gives", "GB for 10 minutes", "GB for an hour, or a whole pass",
)  # fmt: skip


def print_table() -> None:
    """Print a row for each checkpoint; memory is with bfloat16, weights and page statistics included."""
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for known_model in KNOWN_MODELS.values():
        limit = known_model.pass_seconds
        length = f"{limit / 60:.0f} min" if limit >= 60 else f"{limit:.0f} s"
        gives = "times, speakers" if known_model.parser.timed else "text"
        for checkpoint in known_model.checkpoints:
            estimates = (estimate_pass_memory(known_model, min(seconds, limit), checkpoint) for seconds in (600, 3600))
            cells = (
                f"`{checkpoint.hub_id}`", known_model.licence, length, f"{known_model.tokens_a_second:g}", gives,
                *(f"{memory.total / 1e9:.1f}" for memory in estimates),
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    print_table()
