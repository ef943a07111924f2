"""The report: ``report.md`` beside the plots, written from ``results.json`` alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .data import DOMAINS, SIDE
from .plots import PLOTS
from .results import METHODS, RESULTS
from .routes import MAX_ERRORS
from .statistics import OVERALL
from .verdicts import sentences

TITLES = {
    "joint": "joint only",
    "continued": "joint, continued (control)",
    "specific": "task-specific only",
    "separate": "separate encoders from joint",
    "mixpert": "joint → experts, teacher-routed",
    "mixpert routed": "joint → experts, routed (score difference)",
    "mixpert direct": "joint → experts, routed (direct)",
}
Table = list[list[str]]
Section = tuple[str, str, Table, str | None]  # title, note, table, the plot's file

INTRODUCTION = """\
# The paper's comparisons, at a scale anyone can rerun

Written by `mixpert reproduce` from its measurements: no number on this page was typed by hand. **The scale is not the
paper's**: an encoder of {parameters:,} parameters on drawn images of {side} pixels, trained for minutes on a CPU, says
how the method behaves where three domains compete for a small encoder. It neither confirms nor refutes the paper's
results, which are of models more than ten thousand times as large.

    {command}

{seeds}; {cpu:,.0f} CPU seconds in processes of one thread, {minutes:.1f} minutes on a machine that may have had other
work; {versions}.

**Data.** Three domains of ten classes, drawn by the program: photographs with a handwritten digit in them (which
digit?), charts (which bar is the highest, what does the line do?), documents (which word?). {train:,} images a domain
to train on, {test:,} to test on; training, calibration and test share no photograph, digit, font, palette or paper.
Two more kinds are for the router alone: a chart inside a document, and a noisy scan; nothing is trained on them.

**Model.** SigLIP architecture with random weights: {layers} layers of width {hidden}, {heads} heads, {tokens} tokens;
a projector of two layers; one linear layer over the union of all 30 labels, frozen after the joint stage except in
the control.

**Methods.** *Joint only*: {joint_steps:,} steps of {batch} images of each domain. All but one of the others start
there and go on for {extra_steps:,} steps with the same images in the same order and the same learning rate: the whole
encoder on all domains (*the control*), a copy of the whole encoder for each domain (*separate*), or the experts made
of the last {cloned} layers and the projector, all at once in one mixed batch under teacher routing (*Mixpert*).
*Task-specific only* trains an encoder on one domain from random weights, with as many images of it as the joint stage
and the extra steps together. *Routed*: the router, trained last, decides instead of the domain label.
"""

FINDINGS = """\
## What was found

Differences are paired: ± is the standard error over test images. One counts as found where it is larger than two of
these and has the same sign with every seed; else it is called undecided.
"""

TOO_FEW = """\
**With fewer than three seeds this shows that the program runs, and nothing else.**
"""


def write(folder: Path, found: dict[str, Any]) -> Path:
    """Write ``report.md`` beside the plots and return its path."""
    path = folder / "report.md"
    path.write_text(text(found), encoding="utf-8")
    return path


def publish(folder: Path, docs: Path, found: dict[str, Any]) -> Path:
    """Write the report as a page: ``docs/reproduce.md``, its plots and numbers beside it; returns the page's path."""
    beside = docs / "reproduce"
    beside.mkdir(parents=True, exist_ok=True)
    for name in (*PLOTS.values(), RESULTS):
        shutil.copyfile(folder / name, beside / name)
    path = docs / "reproduce.md"
    path.write_text(text(found, beside.name), encoding="utf-8")
    return path


def text(found: dict[str, Any], images: str = ".") -> str:
    """The report in markdown; ``images`` is where the plots are, seen from it."""
    parts = [_introduction(found), FINDINGS]
    if found["settings"]["seeds"] < 3:
        parts.append(TOO_FEW)
    parts += [f"- {sentence}" for sentence in sentences(found)]
    for title, note, table, plot in _sections(found):
        parts += [f"\n## {title}\n", note, ""]
        parts += [markdown(table)]
        if plot:
            parts.append(f"\n![{title}]({images}/{plot})")
    return "\n".join(parts) + "\n"


def tables(found: dict[str, Any]) -> str:
    """The tables alone, as the command prints them."""
    sections = _sections(found)
    return "\n\n".join(f"{title}\n{columns(table)}" for title, _, table, _ in sections)


def markdown(rows: Table) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def columns(rows: Table) -> str:
    """The rows in columns of plain text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


def _introduction(found: dict[str, Any]) -> str:
    settings, versions = found["settings"], found["versions"]
    count = settings["seeds"]
    return INTRODUCTION.format(
        parameters=found["cost"]["methods"]["one encoder"]["parameters"],
        side=SIDE,
        command=found["command"],
        seeds=f"{count} seed{'s' * (count != 1)}",
        cpu=found["cpu seconds"],
        minutes=found["seconds"] / 60,
        versions=f"torch {versions['torch']}, {versions['cpu']}",
        tokens=(SIDE // settings["patch"]) ** 2,
        **{k: v for k, v in settings.items() if k != "seeds"},
    )


def _sections(found: dict[str, Any]) -> list[Section]:
    """Title, what the table shows, the table and the plot's file."""
    sections = [
        (
            "Accuracy",
            "Percent of the test images, mean ± standard deviation over seeds.",
            _accuracy(found),
            PLOTS["accuracy"],
        ),
        (
            "Paired differences",
            "Points, mean over seeds ± standard error over test images (paired), and in brackets the standard "
            "deviation over seeds.",
            paired_table(found["differences"], TITLES, DOMAINS),
            None,
        ),
        (
            "On the training images",
            "Percent of a part of the images each was trained on, mean over seeds: how far each has come.",
            _seen(found),
            None,
        ),
        (
            "Number of cloned layers",
            "Teacher-routed; *0* clones the projector alone, *all* is a whole encoder a domain. Parameters are those "
            "that one expert a domain adds to the versatile one, the joint encoder.",
            _depth(found),
            PLOTS["depth"],
        ),
    ]
    return sections + _routing_sections(found) + _pilot_sections(found)


def _routing_sections(found: dict[str, Any]) -> list[Section]:
    return [
        (
            "Routing rules",
            "Percent; thresholds (below) calibrated on held-out images of the three domains. *Fallback*: the versatile "
            "expert although another scored best.",
            _routing(found),
            PLOTS["routing"],
        ),
        (
            "Thresholds",
            "One a seed, by `calibrate`: the smallest at which at most "
            f"{100 * MAX_ERRORS:g} % of the held-out images go to a wrong expert other than the versatile one.",
            _thresholds(found),
            None,
        ),
        (
            "Cost",
            "One thread; medians of interleaved rounds, microseconds an image of a mixed batch.",
            _cost(found),
            PLOTS["cost"],
        ),
    ]


def _pilot_sections(found: dict[str, Any]) -> list[Section]:
    if not found.get("pilot"):
        return []
    note = (
        "`mixpert reproduce --pilot`: one seed, every encoder from random weights for "
        f"{found['pilot'][0]['steps']:,} steps, with as many images of its domain where it has only one. The "
        "width was shrunk from where encoders for one domain reach 90 % until the joint one fell well behind "
        "them. Percent of the test images."
    )
    return [("The pilot that fixed the width", note, pilot_table(found["pilot"]), None)]


def _accuracy(found: dict[str, Any]) -> Table:
    rows = [["", *DOMAINS, OVERALL]]
    for method in METHODS:
        table = found["accuracy"][method]
        rows.append([TITLES[method], *(spread_cell(table[d]) for d in (*DOMAINS, OVERALL))])
    return rows


def paired_table(
    pairs: list[dict[str, Any]], titles: dict[str, str], groups: tuple[str, ...]
) -> Table:
    """A row a difference of two methods, a column a group of images or questions, and all of them."""
    rows = [["", *groups, OVERALL]]
    for pair in pairs:
        title = f"{titles[pair['of']]} − {titles[pair['minus']]}"
        rows.append([title, *(difference_cell(pair[group]) for group in (*groups, OVERALL))])
    return rows


def _seen(found: dict[str, Any]) -> Table:
    rows = [["", *DOMAINS]]
    for method, values in found["train accuracy"].items():
        rows.append([TITLES[method], *(f"{values[domain]:.2f}" for domain in DOMAINS)])
    return rows


def _depth(found: dict[str, Any]) -> Table:
    rows = [["cloned layers", *DOMAINS, OVERALL, "− control", "added parameters", "added FLOPs"]]
    added = {row["cloned"]: row for row in found["cost"]["depth"]}
    for row in found["depth"]:
        table, cost = row["accuracy"], added[row["cloned"]]
        rows.append(
            [
                row["cloned"],
                *(spread_cell(table[d]) for d in (*DOMAINS, OVERALL)),
                difference_cell(row["minus continued"][OVERALL]),
                f"{cost['parameters']:,}",
                f"{cost['flops']:,}",
            ]
        )
    return rows


def _routing(found: dict[str, Any]) -> Table:
    rows = [["images", "rule", "routing accuracy", "fallback", "task accuracy"]]
    for row in found["routing"]:
        cells = (row.get("routing accuracy"), row.get("fallback"), row["accuracy"])
        rows.append(
            [row["kind"], row["rule"], *("" if c is None else spread_cell(c) for c in cells)]
        )
    return rows


def _thresholds(found: dict[str, Any]) -> Table:
    rules = list(found["thresholds"][0])
    values = [[f"{of_seed[rule]:.2f}" for of_seed in found["thresholds"]] for rule in rules]
    return [["rule", "thresholds"]] + [
        [rule, ", ".join(of_rule)] for rule, of_rule in zip(rules, values, strict=True)
    ]


def _cost(found: dict[str, Any]) -> Table:
    times = found["cost"]["times"]
    rows = [["", "parameters", "FLOPs an image", *(f"batch {t['batch']}" for t in times)]]
    for name, counts in found["cost"]["methods"].items():
        each = (f"{1e6 * t['seconds'][name] / t['batch']:.0f}" for t in times)
        rows.append([name, f"{counts['parameters']:,}", f"{counts['flops']:,}", *each])
    return rows


def pilot_table(pilot: list[dict[str, Any]]) -> Table:
    """Accuracy by width and method."""
    rows = [["width", "parameters", "", *DOMAINS, OVERALL]]
    for row in pilot:
        for method in ("specific", "joint"):
            values = [row[method][d] for d in DOMAINS]
            cells = [f"{v:.1f}" for v in (*values, sum(values) / len(values))]
            rows.append([str(row["width"]), f"{row['parameters']:,}", TITLES[method], *cells])
    return rows


def spread_cell(entry: dict[str, Any]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{entry['mean']:.2f} ± {entry['std']:.2f}"


def difference_cell(entry: dict[str, Any]) -> str:
    """A paired difference with its error over images, and its standard deviation over seeds."""
    return f"{entry['mean']:+.2f} ± {entry['error']:.2f} ({entry['std']:.2f})"
