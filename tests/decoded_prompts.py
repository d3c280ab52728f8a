"""Random prompts, and what a decoder alone or an engine writes after them."""

import torch

from unique_asr.decoding.engine import PENDING
from unique_asr.decoding.greedy import GreedyDecoder


def make_prompts(*lengths):
    """Vectors [1, length, 90] for the tiny Llama."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, 90, generator=generator) for length in lengths]


def decode_alone(model, attention, prompt, count):
    """Tokens and log-probabilities."""
    decoder = GreedyDecoder(model, attention, capacity=1024, prefill_chunk=16)
    decoder.prefill(prompt)
    return list(decoder.tokens(count)), decoder.log_probs


def decode_together(engine, prompts, counts, beside, stop_ids=()):
    """What every prompt gets, (tokens, sequence), each begun as soon as fewer than `beside` others are at work."""
    waiting, running, results = list(range(len(prompts))), {}, {}
    while waiting or running:
        while waiting and len(running) < beside:
            index, sequence = waiting.pop(0), engine.new_sequence()
            sequence.prefill(prompts[index])
            running[index], results[index] = sequence.tokens(counts[index], stop_ids), ([], sequence)
        for index, tokens in list(running.items()):
            written, sequence = results[index]
            for token in tokens:
                if token is PENDING:
                    break
                written.append(token)
            else:
                engine.remove(sequence)
                del running[index]
        if running:
            engine.step()
    return [results[index] for index in range(len(prompts))]
