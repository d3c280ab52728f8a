"""RULER's tasks, generated: needles, tracing, counting and questions in a context of any length (arXiv 2404.06654).

    samples = [make_sample("multikey", 4096, count_tokens, seed=index) for index in range(20)]
    samples[0].score(answer(samples[0].prompt))  # 0 to 1

Templates and counts follow the paper's. Its haystacks of essays are the sentences of any text, its dictionary is
Whisper's list of American spellings. A sample depends on task, length and seed alone: it is the same for all methods.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
)  # fmt: skip
NEEDLE = "One of the special magic numbers for {key} is: {value}."
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3  # words to be found, how often each occurs, how often every other does
HOPS = 4  # times that a value is assigned from one variable to the next
ZIPF = 2.0  # exponent of the frequencies of coded words
ADJECTIVES = ("brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "loud", "mild")
NOUNS = ("anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "ladder", "mirror")


@dataclass(frozen=True)
class RulerSample:
    """A prompt that ends where the answer begins, and what the answer has to contain."""

    task: str
    prompt: str
    begin: str  # first words of the answer, given to the model
    answers: tuple[str, ...]
    answer_tokens: int  # that the model may write
    any_of: bool = False  # one of the answers is enough
    others: tuple[str, ...] = ()  # for the counting tasks: as many words of the text that are no answers

    def score(self, output: str) -> float:
        """Compute the share of the answers in an output, in any case; with `any_of`, 1 if one of them is there."""
        found = [answer.lower() in output.lower() for answer in self.answers]
        return float(any(found)) if self.any_of else sum(found) / len(found)


@dataclass(frozen=True)
class Sources:
    """What tasks may need: sentences for haystacks, and rows with `question`, `answers` and `context`."""

    sentences: tuple[str, ...] = ()
    questions: tuple[dict[str, Any], ...] = ()


def make_sample(
    task: str, length: int, count_tokens: Callable[[str], int], seed: int = 0, sources: Sources | None = None
) -> RulerSample:
    """Make the longest sample whose prompt and answer take at most `length` tokens.

    Args:
        task: a key of `TASKS`.
        length: tokens.
        count_tokens: counts the tokens of a prompt.
        seed: gives another sample.
        sources: texts and questions, for the tasks that need them.

    Raises:
        ValueError: there is no such task, it needs questions, or it alone takes more tokens.
    """
    if task not in TASKS:
        raise ValueError(f"text.tasks names {task!r}: choose from {', '.join(TASKS)}")
    build, sources = TASKS[task], sources or Sources()

    def make(units: int) -> RulerSample:
        return build(random.Random(f"{task} {length} {seed}"), units, sources)

    def fits(units: int) -> bool:
        sample = make(units)
        return count_tokens(sample.prompt + sample.begin) + sample.answer_tokens <= length

    low, high = 0, 16
    if not fits(0):
        raise ValueError(f"text.lengths has {length} tokens: the task {task} alone takes more")
    while high < 4 * length and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return make(low)


def make_needles(
    rng: random.Random, units: int, sources: Sources, task: str, keys: int = 1, values: int = 1, queries: int = 1,
    essay: bool = True,
) -> RulerSample:  # fmt: skip
    """Hide numbers between sentences and ask for some of them.

    Args:
        rng: what is random.
        units: sentences.
        sources: sentences of the haystack, if `essay`.
        task: name of the task.
        keys: how many keys are hidden.
        values: numbers of each key.
        queries: how many of the keys are asked for.
        essay: take the sentences of `sources`; False: the paper's noise.
    """
    names = rng.sample([f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS], keys)
    numbers = {name: [str(rng.randint(1000000, 9999999)) for _ in range(values)] for name in names}
    told = [NEEDLE.format(key=name, value=value) for name in names for value in numbers[name]]
    text = build_haystack(rng, units, told, sources.sentences if essay else NOISE)
    asked = rng.sample(names, queries)
    listed = asked[0] if queries == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    several = values > 1 or queries > 1
    what = "are all the special magic numbers" if several else "is the special magic number"
    prompt = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        f"I will quiz you about the numbers afterwards.\n{text}\n"
        f"What {what} for {listed} mentioned in the provided text?"
    )
    begin = f" The special magic number{'s' if several else ''} for {listed} mentioned in the provided text "
    begin += "are" if several else "is"
    return RulerSample(task, prompt, begin, tuple(number for name in asked for number in numbers[name]), 128)


def build_haystack(rng: random.Random, units: int, needles: Sequence[str], sentences: Sequence[str]) -> str:
    """Join `units` sentences, taken in their order again and again, with the needles at random places between them."""
    sentences = sentences or NOISE
    hay = [sentences[index % len(sentences)] for index in range(units)]
    for needle in needles:
        hay.insert(rng.randint(0, len(hay)), needle)
    return " ".join(hay)


def make_tracking(rng: random.Random, units: int, sources: Sources, example: bool = True) -> RulerSample:
    """Hide assignments that hand a value from variable to variable, and ask for all variables that have it."""
    names = draw_coded_words(rng, HOPS + 1, string.ascii_uppercase, letters=5)
    value = str(rng.randint(10000, 99999))
    steps = [f"VAR {names[0]} = {value}."]
    steps += [f"VAR {after} = VAR {before}." for before, after in itertools.pairwise(names)]
    hay = [NOISE[index % len(NOISE)] for index in range(units)]
    for number, place in enumerate(sorted(rng.randint(0, units) for _ in steps)):
        hay.insert(place + number, steps[number])
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{' '.join(hay)}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above."
    )
    begin = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are:"
    )
    if example:
        shown = make_tracking(rng, 5, sources, example=False)
        prompt = f"{shown.prompt}{shown.begin} {' '.join(shown.answers)}\n\n{prompt}"
    return RulerSample("tracking", prompt, begin, tuple(names), 30)


def make_common_words(rng: random.Random, units: int, sources: Sources, example: bool = True) -> RulerSample:
    """List words of which ten occur far more often than the others, and ask for these ten; units: the others."""
    chosen = rng.sample(load_dictionary(), min(COMMON + units, len(load_dictionary())))
    times = (COMMON_TIMES, OTHER_TIMES) if example else (10, 1)
    words = chosen[:COMMON] * times[0] + chosen[COMMON:] * times[1]
    rng.shuffle(words)
    numbered = " ".join(f"{index}. {word}" for index, word in enumerate(words, start=1))
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{numbered}\n"
        "Question: What are the 10 most common words in the above list?"
    )
    begin = " Answer: The top 10 words that appear most often in the list are:"
    if example:
        shown = make_common_words(rng, 10, sources, example=False)
        prompt = f"{shown.prompt}{shown.begin} {format_answers('common_words', shown.answers)}\n{prompt}"
    others = tuple(rng.sample(chosen[COMMON:], min(COMMON, len(chosen) - COMMON)))
    return RulerSample("common_words", prompt, begin, tuple(chosen[:COMMON]), 120, others=others)


def make_frequent_words(rng: random.Random, units: int, sources: Sources) -> RulerSample:
    """Write dots and coded words with Zipf's frequencies, and ask for the three most frequent words."""
    count = max(units, 64)
    codes = ["....", *draw_coded_words(rng, max(8, count // 8), string.ascii_lowercase, letters=6)]
    shares = [(rank + 1) ** -ZIPF for rank in range(len(codes))]
    words = [code for code, share in zip(codes, shares) for _ in range(round(count * share / sum(shares)))]
    rng.shuffle(words)
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(words)}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    begin = " Answer: According to the coded text above, the three most frequently appeared words are:"
    rare = sorted(set(words) - set(codes[:4]))
    return RulerSample(
        "frequent_words", prompt, begin, tuple(codes[1:4]), 50, others=tuple(rng.sample(rare, min(3, len(rare))))
    )


def format_answers(task: str, words: Sequence[str]) -> str:
    """Write the answer of a counting task."""
    if task == "common_words":
        return " ".join(f"{index}. {word}" for index, word in enumerate(words, start=1))
    return ", ".join(words)


def make_question(rng: random.Random, units: int, sources: Sources) -> RulerSample:
    """Ask a question whose document stands among `units` documents of other questions.

    Raises:
        ValueError: `sources` has no questions.
    """
    if not sources.questions:
        raise ValueError("the task qa needs text.qa=FILE, JSON lines of question, answers and context; or leave it out")
    row = rng.choice(sources.questions)
    others = list(dict.fromkeys(other["context"] for other in sources.questions if other["context"] != row["context"]))
    documents = [row["context"], *rng.sample(others, min(units, len(others)))]
    rng.shuffle(documents)
    listed = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, start=1))
    rule = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    prompt = f"{rule}\n\nThe following are given documents.\n\n{listed}\n\n{rule}\n\nQuestion: {row['question']}"
    return RulerSample("qa", prompt, " Answer:", tuple(row["answers"]), 32, any_of=True)


def draw_coded_words(rng: random.Random, count: int, alphabet: str, letters: int) -> list[str]:
    """Draw distinct words of random letters."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(alphabet, k=letters))] = None
    return list(words)


@functools.cache
def load_dictionary() -> tuple[str, ...]:
    """Load the words of Whisper's list of American spellings."""
    spelling = json.loads(resources.files(__package__).joinpath("english_spelling.json").read_text("utf-8"))
    return tuple(sorted({word for word in spelling.values() if word.isalpha()}))


def split_sentences(text: str) -> tuple[str, ...]:
    """Cut a text into sentences, or into its lines if it has no punctuation."""
    plain = " ".join(text.split())
    found = re.split(r"(?<=[.!?])\s+", plain)
    return tuple(found) if len(found) > 1 else tuple(line.strip() for line in text.splitlines() if line.strip())


Build = Callable[[random.Random, int, Sources], RulerSample]
TASKS: dict[str, Build] = {
    "single": functools.partial(make_needles, task="single", essay=False),
    "essay": functools.partial(make_needles, task="essay"),
    "multikey": functools.partial(make_needles, task="multikey", keys=4),
    "multivalue": functools.partial(make_needles, task="multivalue", values=4),
    "multiquery": functools.partial(make_needles, task="multiquery", keys=4, queries=4),
    "tracking": make_tracking,
    "common_words": make_common_words,
    "frequent_words": make_frequent_words,
    "qa": make_question,
}
