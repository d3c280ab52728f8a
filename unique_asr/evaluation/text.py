"""Text: RULER's tasks and perplexity with any causal language model, same methods and budgets as for speech.

Models too small to answer RULER's counting tasks may know the answer all the same: task=counting lets them read the
right answer and a wrong one, and measures how much likelier the right one is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from unique_asr.application.overrides import whole_number
from unique_asr.attention import SparseAttentionConfig
from unique_asr.evaluation.decodings import Rows, digest, identity
from unique_asr.evaluation.methods import Sliding, describe_method
from unique_asr.evaluation.text_report import TextResult, write_text_results
from unique_asr.evaluation.text_tasks import RUNS, LanguageModel
from unique_asr.models import resolve_device, resolve_dtype


def evaluate_text(
    config: DictConfig, methods: dict[str, SparseAttentionConfig | Sliding], results: list[TextResult]
) -> None:
    """Runs task=ruler, counting or perplexity: a line for each method, task and length; files as for speech.

    Adds to `results`, which are those of the folder, and writes all of them.
    """
    settings, options = OmegaConf.to_container(config), config.text
    if options.model is None:
        raise ValueError(f"text.model is missing: evaluate.py task={config.task} text.model=FOLDER")
    batch = whole_number(config, "batch", "samples")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    methods = {name: method for name, method in methods.items() if not isinstance(method, Sliding)}
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    language_model = LanguageModel(options.model, config.device, config.dtype)
    work = RUNS[config.task](language_model, options)
    folder = Path(config.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: None if options[name] is None else digest(options[name]) for name in ("file", "qa")}
    about = files | {"task": config.task, "model": identity(options.model), "dtype": str(dtype), "batch": batch}
    for name, attention in methods.items():
        kind, fields = describe_method(attention)
        own = {"attention": fields, "class": kind}
        if attention.selector is not None:
            own["method"] = attention.selector.name
        rows = Rows(folder / "decodings", about | own, config.resume)
        for task, length, samples in work.sets():
            missing = [key for key in samples if rows.get(key) is None]
            if missing and not config.decode:
                done = f"{len(samples) - len(missing)} of {len(samples)} samples done"
                print(f"{name} {task} {length}: left out, {done}", file=sys.stderr)
                continue
            for first in range(0, len(missing), batch):
                keys = missing[first : first + batch]
                with torch.no_grad():
                    for key, value in zip(keys, work.run([samples[key]() for key in keys], attention), strict=True):
                        rows.put(key, value)
            values = [rows.get(key) for key in samples]
            read, total = (sum(value[counter] for value in values) for counter in ("pages_read", "pages_total"))
            scores = [value["value"] for value in values]
            result = TextResult(name, attention.budget, config.task, task, length, scores)
            result.share_of_pages_read = read / max(total, 1)
            place = (result.system, task, length)
            results[:] = [each for each in results if (each.system, each.task, each.length) != place] + [result]
            print(
                f"{name:<18} {task:<14} {length:>6} {result} | pages read {result.share_of_pages_read:.1%}", flush=True
            )
            write_text_results(folder, results, settings)
    if not results:
        raise ValueError(f"{folder}: nothing was decoded yet with these settings; leave out decode=false")
