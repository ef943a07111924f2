"""Images between two domains, made of the same sources: no expert is trained on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .charts import draw_chart
from .documents import CANVAS, draw_document, fill_lines
from .photos import crop
from .styles import SOURCES


def chart_in_document(label: int, rng: np.random.Generator, split: str) -> Image.Image:
    """A chart among the lines of a page; asked is what the chart asks."""
    papers = SOURCES[split].papers
    page = Image.new("RGB", (CANVAS, CANVAS), papers[int(rng.integers(len(papers)))])
    pen = ImageDraw.Draw(page)
    side = int(rng.integers(44, 55))
    left, top = (int(v) for v in rng.integers(0, CANVAS - side + 1, 2))
    fill_lines(pen, rng, split, (0, CANVAS))
    chart = draw_chart(label, rng, split).resize((side, side), Image.Resampling.BOX)
    page.paste(chart, (left, top))
    return page


def noisy_scan(label: int, rng: np.random.Generator, split: str) -> Image.Image:
    """A page with the shades of a photograph over it, blurred and grainy; asked is the word."""
    drawn = draw_document(label, rng, split).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    page = np.asarray(drawn.reduce(2), np.float32)
    shade = crop(rng, split).astype(np.float32)
    share = rng.uniform(0.2, 0.5)
    grain = rng.normal(0, rng.uniform(4, 16), (*page.shape[:2], 1))
    pixels = page * (1 - share) + shade * share + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


AMBIGUOUS: dict[str, tuple[Callable, str]] = {
    "chart in document": (chart_in_document, "chart"),
    "noisy scan": (noisy_scan, "document"),
}
