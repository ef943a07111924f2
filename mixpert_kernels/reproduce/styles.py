"""Fonts, palettes, papers, photographs and digits: each belongs to one split, so that no two splits share any."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

SPLITS = ("train", "held_out", "test")

Color = tuple[int, int, int]


class Sources(NamedTuple):
    """What the images of one split are made of.

    Attributes:
        fonts: files that matplotlib ships.
        palettes: colours of bars and lines.
        papers: background colours.
        inks: colours of text and axes.
        photos: files that scikit-image (and, with ``sklearn/`` in front, scikit-learn) ship.
        digits: scikit-learn's digits by their number modulo 8.
    """

    fonts: tuple[str, ...]
    palettes: tuple[tuple[str, ...], ...]
    papers: tuple[str, ...]
    inks: tuple[str, ...]
    photos: tuple[str, ...]
    digits: tuple[int, ...]


SOURCES = {
    "train": Sources(
        fonts=(
            *("DejaVuSans.ttf", "DejaVuSans-BoldOblique.ttf", "DejaVuSansMono-Bold.ttf"),
            *("DejaVuSerif.ttf", "DejaVuSerif-BoldItalic.ttf", "STIXGeneral.ttf"),
            *("STIXGeneralBol.ttf", "STIXGeneralBolIta.ttf", "cmr10.ttf", "cmss10.ttf"),
            *("cmtt10.ttf", "cmb10.ttf"),
        ),
        palettes=(
            ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e"),
            ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"),
            ("#333333", "#777777", "#999999", "#555555", "#222222"),
            ("#8c510a", "#01665e", "#bf812d", "#35978f", "#543005"),
            ("#e41a1c", "#377eb8", "#4daf4a", "#984ea3", "#ff7f00"),
            ("#440154", "#31688e", "#35b779", "#21918c", "#90d743"),
        ),
        papers=("#ffffff", "#f7f7f7", "#fffdf5", "#eef3f8", "#f4efe6", "#e8e8e8"),
        inks=("#000000", "#19191e", "#2b2b45", "#3a2a1a"),
        photos=(
            *("astronaut.png", "coffee.png", "motorcycle_left.png", "coins.png", "brick.png"),
            *("grass.png", "gravel.png", "ihc.png", "retina.jpg", "moon.png", "sklearn/flower.jpg"),
        ),
        digits=(0, 2, 4, 6, 7),
    ),
    "held_out": Sources(
        fonts=(
            "DejaVuSerif-Italic.ttf",
            "DejaVuSansMono-BoldOblique.ttf",
            "DejaVuSans-Oblique.ttf",
        ),
        palettes=(
            ("#a6cee3", "#1f78b4", "#b2df8a", "#33a02c", "#fb9a99"),
            ("#003f5c", "#58508d", "#bc5090", "#ff6361", "#ffa600"),
        ),
        papers=("#fcfcf4", "#f0f4f0"),
        inks=("#101010", "#22324a"),
        photos=("clock_motion.png", "cell.png", "hubble_deep_field.jpg"),
        digits=(3,),
    ),
    "test": Sources(
        fonts=(
            *("DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif-Bold.ttf"),
            *("DejaVuSansMono-Oblique.ttf", "STIXGeneralItalic.ttf"),
        ),
        palettes=(
            ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3"),
            ("#264653", "#2a9d8f", "#e9c46a", "#e76f51", "#6d597a"),
            ("#5f0f40", "#9a031e", "#0f4c5c", "#e36414", "#6a994e"),
        ),
        papers=("#fdfdf8", "#f2f2f2", "#f9f5ee"),
        inks=("#0a0a14", "#303030"),
        photos=(*("chelsea.png", "camera.png", "rocket.jpg", "sklearn/china.jpg"),),
        digits=(1, 5),
    ),
}


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships, at ``size`` pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
