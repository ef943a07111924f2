"""The MoME report: ``report.md`` beside the plots, written from ``results.json`` alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..report import Section, Table, columns, markdown, paired_table, spread_cell
from ..results import RESULTS
from ..statistics import OVERALL
from .encoders import ENCODERS
from .plots import PLOTS
from .scenes import CELLS
from .tasks import GROUPS
from .verdicts import PAPER, sentences

NAME = "reproduce_mome"
TITLES = {
    "clip": "clip alone",
    "pool+addition": "pooling + addition",
    "adt+addition": "ADT + addition",
    "adt+router": "ADT + router",
    "one": "ADT + router, continued with one adapter",
    "mole": "ADT + router, continued with MoLE",
    "wide": "ADT + router, continued with one wide adapter",
}

INTRODUCTION = """\
# MoME's ablations, at a scale anyone can rerun

Written by `mixpert reproduce mome` from its measurements: no number on this page was typed by hand, but for the
paper's averages and the section on how the sizes were chosen. **The scale is not the paper's**: encoders of width
{encoder} and a language model of width {llm}, trained for minutes on a CPU, say how the parts behave where four groups
of tasks need three small encoders. They neither confirm nor refute the paper's results, which are of models many
thousand times as large.

    {command}

{seed_count}; {cpu:,.0f} CPU seconds in processes of one thread, {minutes:.1f} minutes on a machine that may have had
other work; {versions}.

**Tasks.** Four groups, named as the paper names its own. *Gen*: how many shapes are in a scene, what does a chart
show? *REC*: in which of {cells} cells is the red circle? *REG*: what is in cell x3 y5? *Doc*: spell the large word of a
page. A scene is 1 to 3 shapes of 4 colours on a crop of a photograph, a page has any of 5 widths and 4 heights. An
answer is right when all its words are, and its end. {train:,} scenes, as many pages and half as many charts to train
on, with one question of each group that asks about them; {test:,} to test on. Training and test share no photograph,
palette, paper, or font of a large word; they do share the ways in which a question is put.

**Encoders.** CLIP, DINOv2 and Pix2Struct architectures of {encoder_layers} layers, trained by the program, then frozen.
*clip*: 32 pixels, {size} x {size} patches and CLS; learns the words of captions of scenes and charts. *dino*: 64
pixels, 8 x 8 patches; learns on scenes which shape is at a patch, and in which patch its centre is. *pix*: pages as
they are, 3 x 8 to 6 x 16 patches; learns which letter is at a patch. *dino* and *pix* see the other kinds of images
too, on which there is nothing for them. So each lacks what another has. That is by design, and so is how much there is
to gain from having three.

**Language model.** A Llama of {llm_layers} layers, trained on the same kinds of questions as text alone, where the
image is described in the place of the visual tokens. Beside each FFN is an adapter of hidden width {adapter}. The
paper's language model is frozen throughout; this one trains along in stage 1, and is frozen in stage 2.

**Visual tokens.** {size} x {size}, and clip's CLS, which is not routed. clip's patches are on that grid already. dino's
and pix's come there by average pooling, or by the adaptive deformable transformation (ADT, {adt_layers} layers). The
tokens of the three are added, or weighted by a router that reads a hashed bag of the instruction's words and trigrams.
The paper's grid is 16 x 16, its transformation has 6 layers.

**Training.** Stage 1: each arm from new weights for {steps:,} steps of {batch} questions ({shares}), the
same questions in the same order. Stage 2, from *ADT + router*: {more_steps:,} steps with its one adapter as it is (*the
control*), with {experts} copies of it and a router in each layer (*MoLE*), or with its one adapter grown to {experts}
times the hidden width, the new units silent at first (*wide*). All by `mome.build`, through the ops of this package.
"""

FINDINGS = """\
## What was found

Differences are paired: ± is the standard error over test questions. One counts as found where it is larger than two of
these and has the same sign with every seed; else it is called undecided.
"""

TOO_FEW = """\
**With fewer than three seeds this shows that the program runs, and nothing else.**
"""

CHOSEN = """\
## How the sizes were chosen

By short pilots with seed 0; what follows is typed by hand.

- The language model: with 3 layers and batches of 128 it still guessed which thing was asked for after 800 steps (REC
  35 %, REG 2 to 9 %, of 2 to 4 described things). With 2 layers, batches of 32, and one matrix, drawn larger, for
  reading and saying words, it answered 77 % of both after 3,000.
- It trains along in stage 1 because, frozen, it hardly learnt to see: with dino and ADT alone, asked REC and REG alone,
  20 and 19 % after 500 steps, against 61 and 51 % where it trains.
- A run before this one was stopped after its first seed: no arm was past 3 % on REC after 900 steps, and the four
  groups had shares alike. Then scenes got 1 to 3 shapes in the place of 2 to 4, dino learnt of all patches of a shape
  and not of the middle one alone, dino and pix saw images on which there is nothing for them, and REC and REG got three
  quarters of the questions. In a pilot of 300 steps ADT + router was then at 24 % on REC and 27 % on REG, pooling +
  addition at 3 and 23 %.
- So what made the model with ADT learn in minutes decided, which favours ADT. No arm has converged by the end of a run:
  the comparison is at an equal number of steps.
"""


def write(folder: Path, found: dict[str, Any]) -> Path:
    """Write ``report.md`` beside the plots and return its path."""
    path = folder / "report.md"
    path.write_text(text(found), encoding="utf-8")
    return path


def publish(folder: Path, docs: Path, found: dict[str, Any]) -> Path:
    """Write the report as a page: ``docs/reproduce_mome.md``, its plots and numbers beside it; returns its path."""
    beside = docs / NAME
    beside.mkdir(parents=True, exist_ok=True)
    for name in (*PLOTS.values(), RESULTS):
        shutil.copyfile(folder / name, beside / name)
    path = docs / f"{NAME}.md"
    path.write_text(text(found, beside.name), encoding="utf-8")
    return path


def text(found: dict[str, Any], images: str = ".") -> str:
    """The report in markdown; ``images`` is where the plots are, seen from it."""
    parts = [_introduction(found), FINDINGS]
    if found["settings"]["seeds"] < 3:
        parts.append(TOO_FEW)
    parts += [f"- {sentence}" for sentence in sentences(found)]
    for title, note, table, plot in _sections(found):
        parts += [f"\n## {title}\n", note, "", markdown(table)]
        if plot:
            parts.append(f"\n![{title}]({images}/{plot})")
    return "\n".join(parts) + "\n\n" + CHOSEN


def tables(found: dict[str, Any]) -> str:
    """The tables alone, as the command prints them."""
    return "\n\n".join(f"{title}\n{columns(table)}" for title, _, table, _ in _sections(found))


def _introduction(found: dict[str, Any]) -> str:
    settings, versions = found["settings"], found["versions"]
    count = settings["seeds"]
    return INTRODUCTION.format(
        command=found["command"],
        seed_count=f"{count} seed{'s' * (count != 1)}",
        cpu=found["cpu seconds"],
        minutes=found["seconds"] / 60,
        versions=f"torch {versions['torch']}, {versions['cpu']}",
        cells=CELLS**2,
        batch=sum(settings["each"]),
        shares=", ".join(f"{n} {g}" for n, g in zip(settings["each"], GROUPS, strict=True)),
        **settings,
    )


def _sections(found: dict[str, Any]) -> list[Section]:
    """Title, what the table shows, the table and the plot's file."""
    return [
        (
            "Accuracy",
            "Percent of the test questions, mean ± standard deviation over seeds. Own parameters: transforms, "
            "projections, routers and adapters. *Paper*: its average over its own four groups, at "
            "its scale, of other images, questions and measures.",
            _accuracy(found),
            PLOTS["arms"],
        ),
        (
            "Paired differences",
            "Points, mean over seeds ± standard error over test questions (paired), and in brackets the standard "
            "deviation over seeds.",
            paired_table(found["differences"], TITLES, GROUPS),
            PLOTS["differences"],
        ),
        (
            "Weights of the encoders",
            "Percent by group of instructions, mean ± standard deviation over seeds. A weight says little alone: a "
            "projection can make up for it.",
            _weights(found),
            PLOTS["weights"],
        ),
        (
            "Adapters by group",
            "Percent of each group's test questions that each adapter of a layer gets under MoLE.",
            _adapters(found),
            PLOTS["adapters"],
        ),
        (
            "The frozen parts alone",
            "Percent, mean ± standard deviation over seeds, on test images: captions with every word right (clip), "
            "patches that show something told right (dino, pix), and questions about described images (llm).",
            _frozen(found),
            None,
        ),
        (
            "CPU seconds by job",
            "Mean over seeds, one thread, on a machine that may have had other work.",
            [["job", "seconds"], *([k, f"{v:.0f}"] for k, v in found["seconds by job"].items())],
            None,
        ),
    ]


def _accuracy(found: dict[str, Any]) -> Table:
    rows = [["", *GROUPS, OVERALL, "own parameters", "paper"]]
    for arm, title in TITLES.items():
        table = found["accuracy"][arm]
        cells = [spread_cell(table[group]) for group in (*GROUPS, OVERALL)]
        own = sum(n for name, n in found["parameters"][arm].items() if name != "other")
        paper = f"{PAPER[arm]:.2f}" if arm in PAPER else ""
        rows.append([title, *cells, f"{own:,}", paper])
    return rows


def _weights(found: dict[str, Any]) -> Table:
    rows = [["", "group", *ENCODERS]]
    for arm, weights in found["weights"].items():
        rows += [
            [TITLES[arm], group, *(spread_cell(weights[group][name]) for name in ENCODERS)]
            for group in GROUPS
        ]
    return rows


def _adapters(found: dict[str, Any]) -> Table:
    count = found["settings"]["experts"]
    rows = [["seed", "layer", "group", *(f"#{k}" for k in range(count))]]
    for seed, layers in enumerate(found["adapters"]):
        for n, layer in enumerate(layers):
            for group, shares in layer["shares"].items():
                rows.append([str(seed), str(n), group, *(f"{share:.1f}" for share in shares)])
    return rows


def _frozen(found: dict[str, Any]) -> Table:
    rows = [["", "of", "right"]]
    for name, table in (*found["encoders"].items(), ("llm", found["language model"])):
        rows += [[name, key, spread_cell(entry)] for key, entry in table.items()]
    return rows
