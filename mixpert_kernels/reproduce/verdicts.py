"""What the numbers say about the paper's claims, in sentences made from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .ambiguous import AMBIGUOUS
from .data import DOMAINS
from .results import DEFAULT
from .statistics import OVERALL

CERTAIN = 2.0  # standard errors
EQUAL = 20.0  # percent of fallback at which rules are compared


def difference(found: dict[str, Any], of: str, minus: str) -> dict[str, Any]:
    """The paired differences of two methods."""
    return next(d for d in found["differences"] if (d["of"], d["minus"]) == (of, minus))


def sign(entry: dict[str, Any]) -> int:
    """1 or -1 where a difference is larger than two standard errors over test images and all seeds agree; else 0."""
    mean, error = entry["mean"], entry["error"]
    alike = all(value * mean > 0 for value in entry["seeds"])
    return 0 if abs(mean) <= CERTAIN * error or not alike else (1 if mean > 0 else -1)


def points(entry: dict[str, Any]) -> str:
    """A difference with its uncertainties, for a sentence."""
    seeds = ", ".join(f"{value:+.1f}" for value in entry["seeds"])
    return f"{entry['mean']:+.2f} ± {entry['error']:.2f} points (seeds: {seeds})"


def sentences(found: dict[str, Any]) -> list[str]:
    """One finding a line, each beginning with what the paper says and whether these numbers agree."""
    return [
        _compete(found),
        _claim(
            found,
            "Experts made of the joint encoder's last layers are better than the joint encoder",
            "mixpert",
            "joint",
        ),
        _claim(
            found,
            "That is more than the same further training of the whole joint encoder brings (the control; the paper "
            "reports none that we know of)",
            "mixpert",
            "continued",
        ),
        _separate(found),
        _claim(
            found,
            "The joint stage helps: experts grown from it are better than encoders trained on one domain alone",
            "mixpert",
            "specific",
        ),
        _routed(found),
        _depth(found),
        _rules(found),
        _cost(found),
    ]


def _claim(found: dict[str, Any], claim: str, of: str, minus: str) -> str:
    entry = difference(found, of, minus)
    word = {1: "Agrees", 0: "Undecided", -1: "Contradicts"}[sign(entry[OVERALL])]
    each = "; ".join(f"{d} {points(entry[d])}" for d in DOMAINS)
    return f"**{claim}.** {word}: {points(entry[OVERALL])} overall; {each}."


def _compete(found: dict[str, Any]) -> str:
    entry = difference(found, "specific", "joint")
    word = {1: "Yes", 0: "Undecided", -1: "No"}[sign(entry[OVERALL])]
    each = "; ".join(f"{d} {points(entry[d])}" for d in DOMAINS)
    return (
        "**Do the domains compete for capacity?** "
        f"{word}: an encoder for one domain alone minus the joint one is {points(entry[OVERALL])} overall; {each}. It "
        "saw as many images of its domain as the joint stage and what follows it together show, and had the whole "
        "encoder to itself."
    )


def _separate(found: dict[str, Any]) -> str:
    entry = difference(found, "mixpert", "separate")[OVERALL]
    cost = found["cost"]["methods"]
    ratio = cost["separate encoders"]["parameters"] / cost["routed tower"]["parameters"]
    word = {1: "better than", 0: "not told apart from", -1: "worse than"}[sign(entry)]
    return (
        "**Against a whole encoder a domain, continued from the joint one**, experts of "
        f"{found['settings']['cloned']} layers are {word} them: {points(entry)} overall. The separate encoders have "
        f"{ratio:.2f} times the parameters of the routed tower."
    )


def _routed(found: dict[str, Any]) -> str:
    entry = difference(found, "mixpert routed", "mixpert")[OVERALL]
    control = difference(found, "mixpert routed", "continued")[OVERALL]
    direct = difference(found, "mixpert routed", "mixpert direct")[OVERALL]
    accuracy = [
        row["routing accuracy"]["mean"]
        for row in found["routing"]
        if row["rule"] == "direct" and row["kind"] in DOMAINS
    ]
    return (
        f"**With the router in the place of the teacher** ({DEFAULT}), {points(entry)} overall against teacher "
        f"routing, and {points(control)} against the control. Taken directly, the router is right on "
        f"{sum(accuracy) / len(accuracy):.2f} % of the clean test images; the fallback to the versatile expert then "
        f"brings {points(direct)}."
    )


def _depth(found: dict[str, Any]) -> str:
    rows = found["depth"]
    listed = ", ".join(
        f"{row['cloned']}: {row['minus continued'][OVERALL]['mean']:+.2f} ± "
        f"{row['minus continued'][OVERALL]['error']:.2f}"
        for row in rows
    )
    best = max(rows, key=lambda row: row["accuracy"][OVERALL]["mean"])
    return (
        "**How many layers to clone?** The paper takes two. Here, by number of cloned layers and in points against "
        f"the control: {listed}. Best is {best['cloned']}. This encoder has {found['settings']['layers']} layers, the "
        "paper's 26: two are not the same share."
    )


def _rules(found: dict[str, Any]) -> str:
    parts = []
    for kind in AMBIGUOUS:
        rows = {row["rule"]: row for row in found["routing"] if row["kind"] == kind}
        rule = rows[DEFAULT]
        parts.append(
            f"{kind}: direct {rows['direct']['accuracy']['mean']:.1f} %, {DEFAULT} "
            f"{points(rule['minus direct'])} at {rule['fallback']['mean']:.1f} % fallback; at an equal fallback "
            f"rate of {EQUAL:.0f} % {_at_equal_fallback(found, kind)}"
        )
    return (
        "**Does the score difference decide best?** The paper says so of its three rules. Task accuracy on ambiguous "
        f"images here: {'. '.join(parts)}. Of one linear router the rules order images much alike."
    )


def _at_equal_fallback(found: dict[str, Any], kind: str) -> str:
    """Task accuracy of each rule where it sends the same share of images to the versatile expert."""
    values = []
    for curve in found["curves"]:
        if curve["kind"] == kind:
            order = np.argsort(curve["fallback"], kind="stable")
            fallback, accuracy = (np.array(curve[k])[order] for k in ("fallback", "accuracy"))
            values.append(f"{curve['rule']} {np.interp(EQUAL, fallback, accuracy):.1f} %")
    return ", ".join(values)


def _cost(found: dict[str, Any]) -> str:
    times = found["cost"]["times"]
    listed = ", ".join(
        f"{row['batch']} images {row['seconds']['routed tower'] / row['seconds']['one encoder']:.2f} and "
        f"{row['seconds']['separate encoders'] / row['seconds']['one encoder']:.2f}"
        for row in times
    )
    counts = found["cost"]["methods"]
    more = counts["routed tower"]["flops"] / counts["one encoder"]["flops"] - 1
    return (
        f"**Cost.** The router adds {100 * more:.2f} % FLOPs an image. Time of a mixed batch relative to one encoder, "
        f"routed tower and separate encoders that are told the domains: {listed}."
    )
