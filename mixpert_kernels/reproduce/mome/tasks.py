"""What is asked of the images, and the answers: four groups of instructions, named as the paper names its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import charts
from .pages import LETTERS, WORDS
from .scenes import CELLS, COLORS, COUNTS, SHAPES, Thing, choose_things

GROUPS = ("Gen", "REC", "REG", "Doc")
KINDS = ("scene", "chart", "page")  # of images
NUMBERS = ("zero", "one", "two", "three", "four", "five")
QUESTIONS = {
    "scene": ("how many shapes are there", "count the shapes", "what is the number of shapes"),
    "chart": ("what does the chart show", "describe the chart", "what can be seen in the chart"),
    "page": (
        *("which word is printed large", "read the large word", "what does the page say"),
        "spell the word of the page",
    ),
    "REC": (
        *("where is the {color} {shape}", "locate the {color} {shape}"),
        *("point to the {color} {shape}", "give the place of the {color} {shape}"),
    ),
    "REG": (
        *("what is at {x} {y}", "describe the shape at {x} {y}"),
        *("which shape lies at {x} {y}", "name what you find at {x} {y}"),
    ),
}
ASKED = {"Gen": ("scene", "chart"), "REC": ("scene",), "REG": ("scene",), "Doc": ("page",)}


class Facts(NamedTuple):
    """What there is to say about an image.

    Attributes:
        kind: of ``KINDS``.
        things: of a scene.
        words: of any other image: what the chart shows, or the letters of the page's word.
    """

    kind: str
    things: tuple[Thing, ...] = ()
    words: tuple[str, ...] = ()

    def described(self) -> list[tuple[str, ...]]:
        """Words that go together, as the language model is told them: a tuple a thing, or a letter."""
        if self.kind == "scene":
            return [(t.color, t.shape, f"x{t.column}", f"y{t.row}") for t in self.things]
        return [(word,) for word in self.words] if self.kind == "page" else [self.words]

    def caption(self) -> set[str]:
        """The words of a caption, which says what there is and not where, and reads no page."""
        if self.kind == "scene":
            said = {word for t in self.things for word in (t.color, t.shape)}
            return said | {NUMBERS[len(self.things)]}
        return {self.kind} if self.kind == "page" else {self.kind, *self.words}


class Question(NamedTuple):
    """One question about an image.

    Attributes:
        group: of ``GROUPS``.
        instruction: its words.
        answer: its words.
    """

    group: str
    instruction: str
    answer: str


def facts_of(kind: str, index: int, rng: np.random.Generator) -> Facts:
    """What image ``index`` of a kind shows; ``rng`` chooses what the index does not decide."""
    if kind == "scene":
        return Facts(kind, things=tuple(choose_things(COUNTS[index % len(COUNTS)], rng)))
    if kind == "chart":
        return Facts(kind, words=chart_words(index % len(charts.LABELS)))
    return Facts(kind, words=tuple(WORDS[index % len(WORDS)]))


def chart_words(label: int) -> tuple[str, ...]:
    """What a chart of that label shows, as it is asked for."""
    return ("bar", NUMBERS[label + 1]) if label < charts.BARS else (charts.LABELS[label],)


def ask(group: str, facts: Facts, rng: np.random.Generator) -> Question:
    """A question of a group about an image, and its answer."""
    if group in ("REC", "REG"):
        thing = facts.things[int(rng.integers(len(facts.things)))]
        place = {"x": f"x{thing.column}", "y": f"y{thing.row}"}
        template = _pick(rng, QUESTIONS[group])
        instruction = template.format(color=thing.color, shape=thing.shape, **place)
        found = (thing.color, thing.shape) if group == "REG" else tuple(place.values())
        return Question(group, instruction, " ".join(found))
    words = (NUMBERS[len(facts.things)],) if facts.kind == "scene" else facts.words
    return Question(group, _pick(rng, QUESTIONS[facts.kind]), " ".join(words))


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


PAD, END, ANSWER, BLANK = "<pad>", "<end>", "<answer>", "<blank>"
CAPTION_WORDS = tuple(
    dict.fromkeys((*COLORS, *SHAPES, *KINDS, *NUMBERS, "bar", *charts.LABELS[charts.BARS :]))
)


def _vocabulary() -> tuple[str, ...]:
    words = [PAD, END, ANSWER, BLANK, *CAPTION_WORDS, *LETTERS]
    words += [f"{axis}{cell}" for axis in "xy" for cell in range(CELLS)]
    asked = " ".join(template for templates in QUESTIONS.values() for template in templates)
    words += [word for word in asked.split() if "{" not in word]
    return tuple(dict.fromkeys(words))


VOCABULARY = _vocabulary()
IDS = {word: i for i, word in enumerate(VOCABULARY)}
LENGTH = 13  # of a question and its answer at most


def encode(question: Question) -> tuple[list[int], list[int]]:
    """Ids (LENGTH,) of instruction, mark, answer and end, padded; and the labels: the ids where they are to be said."""
    said = [IDS[word] for word in question.instruction.split()] + [IDS[ANSWER]]
    answer = [IDS[word] for word in question.answer.split()] + [IDS[END]]
    rest = LENGTH - len(said) - len(answer)
    return said + answer + rest * [IDS[PAD]], len(said) * [-100] + answer + rest * [-100]
