"""The speech LLMs that are known, as a Markdown table: python -m unique_asr.models.pretrained"""

from unique_asr.models.pretrained import ADAPTERS, estimate

print("| model | licence | one pass | audio tokens/s | gives | GB for 10 minutes | GB for an hour, or a whole pass |")
print("|---|---|---|---|---|---|---|")
for adapter in ADAPTERS.values():
    for checkpoint in adapter.checkpoints:
        limit = adapter.pass_seconds
        length = f"{limit / 60:.0f} min" if limit >= 60 else f"{limit:.0f} s"
        gives = "times, speakers" if adapter.parser.timed else "text"
        # bfloat16, page statistics included; the weights are in both
        short, long = (estimate(adapter, min(seconds, limit), checkpoint).total / 1e9 for seconds in (600, 3600))
        print(
            f"| `{checkpoint.hub_id}` | {adapter.licence} | {length} | {adapter.tokens_a_second:g} | {gives} "
            f"| {short:.1f} | {long:.1f} |"
        )
