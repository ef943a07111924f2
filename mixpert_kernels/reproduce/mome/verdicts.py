"""What the numbers say about the MoME paper's claims, in sentences made from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..statistics import OVERALL
from ..verdicts import difference, points, sign
from .encoders import ENCODERS
from .tasks import GROUPS

# The paper's averages over its four groups, at its scale.
PAPER = {
    "clip": 56.52,
    "pool+addition": 58.91,
    "adt+addition": 62.88,
    "adt+router": 69.39,
    "mole": 69.94,
}


def sentences(found: dict[str, Any]) -> list[str]:
    """One finding a line, each beginning with what the paper says and whether these numbers agree."""
    return [
        _claim(
            found, "Three encoders, pooled and added, are better than one", "pool+addition", "clip"
        ),
        _claim(
            found,
            "The adaptive deformable transformation is better than average pooling",
            "adt+addition",
            "pool+addition",
        ),
        _claim(
            found,
            "Weights chosen by the instruction are better than addition",
            "adt+router",
            "adt+addition",
        ),
        _claim(found, "Language experts improve on the model without them", "mole", "adt+router"),
        _control(found),
        _wide(found),
        _weights(found),
        _adapters(found),
    ]


def word(entry: dict[str, Any]) -> str:
    """Whether a difference agrees with a claim that it is positive."""
    return {1: "Agrees", 0: "Undecided", -1: "Contradicts"}[sign(entry)]


def _numbers(entry: dict[str, Any]) -> str:
    each = "; ".join(f"{group} {points(entry[group])}" for group in GROUPS)
    return f"{points(entry[OVERALL])} overall; {each}"


def _claim(found: dict[str, Any], claim: str, of: str, minus: str) -> str:
    entry = difference(found, of, minus)
    return f"**{claim}** (the paper: {PAPER[minus]} to {PAPER[of]}). {word(entry[OVERALL])}: {_numbers(entry)}."


def _control(found: dict[str, Any]) -> str:
    entry, more = difference(found, "mole", "one"), difference(found, "one", "adt+router")
    return (
        "**That is more than the same further training of the one adapter brings** (the control; the paper gives both "
        f"stages together). {word(entry[OVERALL])}: {_numbers(entry)}. The further training alone brings "
        f"{points(more[OVERALL])}."
    )


def _wide(found: dict[str, Any]) -> str:
    entry, wide = difference(found, "mole", "wide")[OVERALL], difference(found, "wide", "one")
    than = {1: "better than", 0: "not told apart from", -1: "worse than"}[sign(entry)]
    return (
        f"**Against one adapter of {found['settings']['experts']} times the hidden width**, about as many parameters "
        f"in adapters and more arithmetic a token, the language experts are {than} it: {points(entry)} overall. The "
        f"wide adapter against the narrow one: {points(wide[OVERALL])}."
    )


def _weights(found: dict[str, Any]) -> str:
    weights = found["weights"]["adt+router"]
    parts = []
    for group in GROUPS:
        each = {name: weights[group][name] for name in ENCODERS}
        best = max(each, key=lambda name: each[name]["mean"])
        of_seeds = zip(*(each[name]["seeds"] for name in ENCODERS), strict=True)
        in_all = all(ENCODERS[int(np.argmax(values))] == best for values in of_seeds)
        agreed = "with every seed" if in_all else "but not with every seed"
        parts.append(f"{group} {best} ({each[best]['mean']:.0f} %, {agreed})")
    return f"**What does the router of the encoders weigh most?** {'; '.join(parts)}."


def _adapters(found: dict[str, Any]) -> str:
    layers = [layer for of_seed in found["adapters"] for layer in of_seed]
    bits = np.array([layer["information"] for layer in layers])
    used = [
        sum(max(of_group[k] for of_group in layer["shares"].values()) >= 1 for k in range(experts))
        for layer in layers
        for experts in [len(next(iter(layer["shares"].values())))]
    ]
    return (
        f"**Do groups get adapters of their own?** Of {found['settings']['experts']} adapters a layer, "
        f"{np.mean(used):.1f} get at least a hundredth of some group's questions, mean over layers and seeds (from "
        f"{min(used)} to {max(used)}). The adapter tells {bits.mean():.2f} bits of the group ({bits.min():.2f} to "
        f"{bits.max():.2f}); the most, each group with one of its own, is {np.log2(len(GROUPS)):.0f}. Nothing in the "
        "training asks for a balance."
    )
