"""The tasks `ruler`, `counting` and `perplexity`: any causal language model, with the methods and budgets of speech.

Models too small to answer RULER's counting tasks may know the answer all the same: task=counting lets them read the
right answer and a wrong one, and measures how much likelier the right one is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from unique_asr.evaluation.decodings import JsonLinesStore, digest_file, identify_weights
from unique_asr.evaluation.method_grid import build_methods
from unique_asr.evaluation.methods import Sliding, describe_method
from unique_asr.evaluation.text_report import TextResult, write_text_results
from unique_asr.evaluation.text_tasks import TASK_RUNS, LanguageModel
from unique_asr.models import resolve_device, resolve_dtype


def evaluate_text(config: DictConfig, results: list[TextResult]) -> None:
    """Evaluate the methods of a run on texts, print a line for each method, task and length, and write the files.

    Args:
        config: of the command.
        results: those of the folder so far, from other jobs of a multirun; new ones are added.

    Raises:
        ValueError: options do not fit, or with `decode=false` nothing was decoded before.
    """
    settings, options, batch = OmegaConf.to_container(config), config.text, config.batch
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    methods = {name: method for name, method in build_methods(config).items() if not isinstance(method, Sliding)}
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    language_model = LanguageModel(options.model, config.device, config.dtype)
    task_run = TASK_RUNS[config.task](language_model, options)
    folder = Path(config.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: None if options[name] is None else digest_file(options[name]) for name in ("file", "qa")}
    about = files | {"task": config.task, "model": identify_weights(options.model), "dtype": str(dtype), "batch": batch}
    for name, attention in methods.items():
        kind, fields = describe_method(attention)
        own = {"attention": fields, "class": kind}
        if attention.selector is not None:
            own["method"] = attention.selector.name
        store = JsonLinesStore(folder / "decodings", about | own, config.resume)
        for task, length, samples in task_run.list_samples():
            missing = [key for key in samples if store.get(key) is None]
            if missing and not config.decode:
                done = f"{len(samples) - len(missing)} of {len(samples)} samples done"
                print(f"{name} {task} {length}: left out, {done}", file=sys.stderr)
                continue
            for first in range(0, len(missing), batch):
                keys = missing[first : first + batch]
                with torch.no_grad():
                    for key, value in zip(keys, task_run.run([samples[key]() for key in keys], attention), strict=True):
                        store.put(key, value)
            values = [store.get(key) for key in samples]
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
