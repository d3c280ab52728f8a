"""RULER's tasks, generated: needles, tracing, counting and questions in a context of any length (arXiv 2404.06654).

    items = [make_item("multikey", 4096, count_tokens, seed=index) for index in range(20)]
    items[0].score(model_says(items[0].prompt))  # 0 to 1

Templates and counts follow the paper's. Its haystacks of essays are the sentences of any text, its dictionary is
Whisper's list of American spellings. An item depends on task, length and seed alone: it is the same for all.
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
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3  # words to be found, how often each is said, and every other word
HOPS = 4  # of a variable's value
ZIPF = 2.0  # exponent of the frequencies of coded words
ADJECTIVES = ("brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "loud", "mild")
NOUNS = ("anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "ladder", "mirror")


@dataclass(frozen=True)
class Item:
    """A prompt that ends where the answer begins, and what the answer has to contain."""

    task: str
    prompt: str
    begin: str  # first words of the answer, given to the model
    answers: tuple[str, ...]
    answer_tokens: int  # the model may write so many
    any_of: bool = False  # one of the answers is enough
    others: tuple[str, ...] = ()  # of the counting tasks: as many words of the text that are none of the answers

    def score(self, output: str) -> float:
        """The share of the answers in the output, whatever its case; for questions, whether there is one."""
        found = [answer.lower() in output.lower() for answer in self.answers]
        return float(any(found)) if self.any_of else sum(found) / len(found)


@dataclass(frozen=True)
class Sources:
    """What tasks may need: sentences for haystacks, and rows of question, answers and context."""

    sentences: tuple[str, ...] = ()
    questions: tuple[dict[str, Any], ...] = ()


def make_item(
    task: str, length: int, count_tokens: Callable[[str], int], seed: int = 0, sources: Sources | None = None
) -> Item:
    """The longest item whose prompt and answer take at most `length` tokens."""
    if task not in TASKS:
        raise ValueError(f"text.tasks names {task!r}: choose from {', '.join(TASKS)}")
    build, sources = TASKS[task], sources or Sources()

    def item(units: int) -> Item:
        return build(random.Random(f"{task} {length} {seed}"), units, sources)

    def fits(units: int) -> bool:
        made = item(units)
        return count_tokens(made.prompt + made.begin) + made.answer_tokens <= length

    low, high = 0, 16
    if not fits(0):
        raise ValueError(f"text.lengths has {length} tokens: the task {task} alone takes more")
    while high < 4 * length and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return item(low)


def needles(
    rng: random.Random, units: int, sources: Sources, task: str, keys: int = 1, values: int = 1, queries: int = 1,
    essay: bool = True,
) -> Item:  # fmt: skip
    """`keys` keys of `values` numbers each between sentences; `queries` of the keys are asked for."""
    names = rng.sample([f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS], keys)
    numbers = {name: [str(rng.randint(1000000, 9999999)) for _ in range(values)] for name in names}
    told = [NEEDLE.format(key=name, value=value) for name in names for value in numbers[name]]
    text = haystack(rng, units, told, sources.sentences if essay else NOISE)
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
    return Item(task, prompt, begin, tuple(number for name in asked for number in numbers[name]), 128)


def haystack(rng: random.Random, units: int, told: Sequence[str], sentences: Sequence[str]) -> str:
    """`units` sentences in their order, over and over, with what is told at random places between them."""
    sentences = sentences or NOISE
    hay = [sentences[index % len(sentences)] for index in range(units)]
    for needle in told:
        hay.insert(rng.randint(0, len(hay)), needle)
    return " ".join(hay)


def tracking(rng: random.Random, units: int, sources: Sources, example: bool = True) -> Item:
    """A value that is handed from variable to variable; all that have it are asked for."""
    names = coded_words(rng, HOPS + 1, string.ascii_uppercase, letters=5)
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
        shown = tracking(rng, 5, sources, example=False)
        prompt = f"{shown.prompt}{shown.begin} {' '.join(shown.answers)}\n\n{prompt}"
    return Item("tracking", prompt, begin, tuple(names), 30)


def common_words(rng: random.Random, units: int, sources: Sources, example: bool = True) -> Item:
    """A numbered list in which ten words come far more often than all others; `units` counts the others."""
    chosen = rng.sample(dictionary(), min(COMMON + units, len(dictionary())))
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
        shown = common_words(rng, 10, sources, example=False)
        prompt = f"{shown.prompt}{shown.begin} {listed('common_words', shown.answers)}\n{prompt}"
    others = tuple(rng.sample(chosen[COMMON:], min(COMMON, len(chosen) - COMMON)))
    return Item("common_words", prompt, begin, tuple(chosen[:COMMON]), 120, others=others)


def frequent_words(rng: random.Random, units: int, sources: Sources) -> Item:
    """A text of dots and coded words with Zipf's frequencies; the three most frequent words are asked for."""
    count = max(units, 64)
    codes = ["....", *coded_words(rng, max(8, count // 8), string.ascii_lowercase, letters=6)]
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
    return Item(
        "frequent_words", prompt, begin, tuple(codes[1:4]), 50, others=tuple(rng.sample(rare, min(3, len(rare))))
    )


def listed(task: str, words: Sequence[str]) -> str:
    """An answer of a counting task in full."""
    if task == "common_words":
        return " ".join(f"{index}. {word}" for index, word in enumerate(words, start=1))
    return ", ".join(words)


def qa(rng: random.Random, units: int, sources: Sources) -> Item:
    """A question whose document stands among those of other questions."""
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
    return Item("qa", prompt, " Answer:", tuple(row["answers"]), 32, any_of=True)


def coded_words(rng: random.Random, count: int, alphabet: str, letters: int) -> list[str]:
    """Distinct words of random letters."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(alphabet, k=letters))] = None
    return list(words)


@functools.cache
def dictionary() -> tuple[str, ...]:
    spelling = json.loads(resources.files(__package__).joinpath("english_spelling.json").read_text("utf-8"))
    return tuple(sorted({word for word in spelling.values() if word.isalpha()}))


def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text; its lines if it has no punctuation."""
    plain = " ".join(text.split())
    found = re.split(r"(?<=[.!?])\s+", plain)
    return tuple(found) if len(found) > 1 else tuple(line.strip() for line in text.splitlines() if line.strip())


Build = Callable[[random.Random, int, Sources], Item]
TASKS: dict[str, Build] = {
    "single": functools.partial(needles, task="single", essay=False),
    "essay": functools.partial(needles, task="essay"),
    "multikey": functools.partial(needles, task="multikey", keys=4),
    "multivalue": functools.partial(needles, task="multivalue", values=4),
    "multiquery": functools.partial(needles, task="multiquery", keys=4, queries=4),
    "tracking": tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "qa": qa,
}
