"""The speech LLMs that are known, as a Markdown table: python -m unique_asr.models.pretrained"""

from unique_asr.models.pretrained import KNOWN_MODELS
from unique_asr.models.pretrained.pass_memory import estimate_pass_memory

print("| model | licence | one pass | audio tokens/s | gives | GB for 10 minutes | GB for an hour, or a whole pass |")
print("|---|---|---|---|---|---|---|")
for known_model in KNOWN_MODELS.values():
    for checkpoint in known_model.checkpoints:
        limit = known_model.pass_seconds
        length = f"{limit / 60:.0f} min" if limit >= 60 else f"{limit:.0f} s"
        gives = "times, speakers" if known_model.parser.timed else "text"
        # bfloat16, page statistics included; the weights are in both
        memory = (estimate_pass_memory(known_model, min(seconds, limit), checkpoint) for seconds in (600, 3600))
        short, long = (each.total / 1e9 for each in memory)
        print(
            f"| `{checkpoint.hub_id}` | {known_model.licence} | {length} | {known_model.tokens_a_second:g} | {gives} "
            f"| {short:.1f} | {long:.1f} |"
        )
