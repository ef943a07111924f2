"""Text pages drawn with Pillow in the fonts that matplotlib ships: eight kinds, some made to look scanned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WIDTH, HEIGHT, MARGIN = 480, 600, 36
INK = (25, 25, 30)


class Face(NamedTuple):
    """A font's file for text and the one for headings."""

    regular: str
    bold: str


EVALUATION_FACES = (
    Face("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    Face("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
)
TRAINING_FACES = (
    Face("STIXGeneral.ttf", "STIXGeneralBol.ttf"),
    Face("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    Face("DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf"),
    Face("STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"),
)
WHO = ("The committee", "Our office", "The auditor", "The supplier", "Each member", "The library")
DID = ("approved", "reviewed", "postponed", "received", "requested", "published", "returned")
WHAT = (
    *("the annual budget", "a revised plan", "the signed contract", "two open invoices"),
    *("the new catalogue", "a short report", "the minutes", "an earlier offer"),
)
WHEN = (
    *("last Monday", "before the deadline", "in the second quarter", "without objection"),
    *("after a long debate", "by return of post", "with minor changes", "for the third time"),
)
ITEMS = ("Paper, A4", "Toner", "Desk lamp", "Chair", "Cable, 2 m", "Binder", "Stamps", "Envelopes")
CODE = (
    "def route(scores, delta):",
    "    best = argmax(scores)",
    "    gap = scores[best] - runner_up",
    "    return best if gap >= delta else 0",
    "for tile in batch:",
    "    expert = route(score(tile), 0.1)",
    "    queue[expert].append(tile)",
    "while queue:",
    "    run(queue.pop())",
    "",
)


class Pen:
    """Writes down a page, line by line.

    Args:
        rng: source of every choice.
        face: the fonts.
        size: height of the text in pixels.
    """

    def __init__(self, rng: np.random.Generator, face: Face, size: int) -> None:
        self.rng, self.size, self.y = rng, size, MARGIN
        self.page = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.page)
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.regular = ImageFont.truetype(str(fonts / face.regular), size)
        self.bold = ImageFont.truetype(str(fonts / face.bold), int(size * 1.4))

    def full(self) -> bool:
        return self.y > HEIGHT - MARGIN - self.size

    def line(self, text: str, x: int = MARGIN) -> None:
        if not self.full():
            self.draw.text((x, self.y), text, fill=INK, font=self.regular)
        self.y += int(self.size * 1.45)

    def heading(self, text: str) -> None:
        self.draw.text((MARGIN, self.y), text, fill=INK, font=self.bold)
        self.y += int(self.size * 2.4)

    def rule(self) -> None:
        self.draw.line((MARGIN, self.y, WIDTH - MARGIN, self.y), fill=INK)
        self.y += self.size // 2

    def paragraph(self, sentences: int, left: int = MARGIN, right: int = WIDTH - MARGIN) -> None:
        words = " ".join(sentence(self.rng) for _ in range(sentences)).split()
        while words:
            text = words.pop(0)
            while words and self.regular.getlength(f"{text} {words[0]}") <= right - left:
                text = f"{text} {words.pop(0)}"
            self.line(text, left)
        self.y += self.size // 2

    def row(self, cells: tuple[str, ...]) -> None:
        width = (WIDTH - 2 * MARGIN) // len(cells)
        for index, cell in enumerate(cells):
            place = (MARGIN + index * width, self.y)
            self.draw.text(place, cell, fill=INK, font=self.regular)
        self.y += int(self.size * 1.6)


def sentence(rng: np.random.Generator) -> str:
    """A plain office sentence."""
    return " ".join(str(rng.choice(words)) for words in (WHO, DID, WHAT, WHEN)) + "."


def _letter(pen: Pen) -> None:
    date = f"{pen.rng.integers(1, 29)} March 2021"
    for text in ("12 Harbour Street", date, "", "Dear Sir or Madam,"):
        pen.line(text)
    for _ in range(3):
        pen.paragraph(int(pen.rng.integers(3, 6)))
    pen.line("Yours faithfully,")


def _paper(pen: Pen) -> None:
    pen.heading("On the Order of Small Things")
    middle, top = WIDTH // 2, pen.y
    for left, right in ((MARGIN, middle - 8), (middle + 8, WIDTH - MARGIN)):
        pen.y = top
        while not pen.full():
            pen.paragraph(4, left, right)


def _invoice(pen: Pen) -> None:
    pen.heading(f"Invoice {pen.rng.integers(1000, 9999)}")
    pen.row(("Item", "Count", "Price"))
    pen.rule()
    for item in pen.rng.permutation(ITEMS):
        count, price = int(pen.rng.integers(1, 20)), pen.rng.uniform(2, 90)
        pen.row((str(item), str(count), f"{price:.2f}"))
    pen.rule()
    pen.row(("Total", "", f"{pen.rng.uniform(100, 900):.2f}"))
    pen.paragraph(3)


def _form(pen: Pen) -> None:
    pen.heading("Application form")
    for label in ("Name", "Street", "City", "Date of birth", "Telephone", "Occupation", "Remarks"):
        pen.line(label)
        pen.draw.rectangle((MARGIN + 150, pen.y - 20, WIDTH - MARGIN, pen.y), outline=INK)
        pen.y += pen.size
    pen.paragraph(4)


def _listing(pen: Pen) -> None:
    start = int(pen.rng.integers(len(CODE)))
    for index in range(40):
        pen.line(f"{index + 1:3d}  {CODE[(start + index) % len(CODE)]}")


def _receipt(pen: Pen) -> None:
    pen.heading("CITY MARKET")
    pen.rule()
    for _ in range(14):
        pen.row((str(pen.rng.choice(ITEMS)), f"{pen.rng.uniform(1, 60):.2f}"))
    pen.rule()
    pen.row(("TOTAL", f"{pen.rng.uniform(60, 400):.2f}"))
    pen.line("Thank you for your visit")


def _report(pen: Pen) -> None:
    for number in range(1, 4):
        pen.heading(f"{number}. {str(pen.rng.choice(WHAT)).capitalize()}")
        pen.paragraph(int(pen.rng.integers(3, 6)))


def _minutes(pen: Pen) -> None:
    pen.heading("Minutes of the meeting")
    for number in range(1, 13):
        pen.line(f"{number}.")
        pen.y -= int(pen.size * 1.45)
        pen.paragraph(1, MARGIN + 28)


KINDS: dict[str, Callable[[Pen], None]] = {
    "letter": _letter,
    "paper": _paper,
    "invoice": _invoice,
    "form": _form,
    "listing": _listing,
    "receipt": _receipt,
    "report": _report,
    "minutes": _minutes,
}


def draw_document(kind: str, rng: np.random.Generator, face: Face) -> Image.Image:
    """One page of ``kind`` with random text, 480 x 600 pixels."""
    pen = Pen(rng, face, int(rng.integers(12, 16)))
    KINDS[kind](pen)
    return pen.page


def scanned(page: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of the page as a poor scanner sees it: grey paper, uneven light, blur and noise."""
    height = int(page.height * rng.uniform(0.3, 0.9))
    page = page.crop((0, 0, page.width, height)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    across = np.linspace(rng.uniform(0.45, 1), rng.uniform(0.45, 1), page.width)
    down = np.linspace(rng.uniform(0.7, 1), rng.uniform(0.7, 1), page.height)
    light = (down[:, None] * across[None, :])[..., None]
    pixels = np.asarray(page, dtype=np.float32) * light + rng.normal(0, 4, (*light.shape[:2], 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def evaluation_documents(rng: np.random.Generator) -> dict[str, Image.Image]:
    """One page of each kind, in the evaluation fonts."""
    faces = EVALUATION_FACES
    return {
        kind: draw_document(kind, rng, faces[index % len(faces)])
        for index, kind in enumerate(KINDS)
    }


def training_document(index: int, rng: np.random.Generator) -> Image.Image:
    """A page in one of the training fonts; every third one looks scanned."""
    kind = tuple(KINDS)[index % len(KINDS)]
    page = draw_document(kind, rng, TRAINING_FACES[int(rng.integers(len(TRAINING_FACES)))])
    return scanned(page, rng) if index % 3 == 0 else page
