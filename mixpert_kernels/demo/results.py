"""Where the images went, and how often that was right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mixpert_kernels.demo.images import DOMAINS, Sample


class Routed(NamedTuple):
    """What became of one image."""

    expert: int
    wanted: int  # -1 where nobody knows
    scores: tuple[float, ...]

    @property
    def correct(self) -> bool | None:
        return None if self.wanted < 0 else self.expert == self.wanted


def accuracy(routed: Sequence[Routed]) -> float | None:
    """Share of images that went to their domain's expert; a fallback to another counts as wrong."""
    right, known = verdict(routed)
    return right / known if known else None


def domain_table(
    samples: Sequence[Sample], routed: Sequence[Routed], names: Sequence[str]
) -> list[list[str]]:
    """One row a domain: how many images, where they went, how many went right."""
    rows = [["domain", "images", *(f"to {name}" for name in names), "right"]]
    for domain in DOMAINS:
        own = [r for s, r in zip(samples, routed, strict=True) if s.domain == domain]
        if not own:
            continue
        counts = [sum(r.expert == k for r in own) for k in range(len(names))]
        rows.append([domain, str(len(own)), *map(str, counts), _share(own)])
    total = [sum(r.expert == k for r in routed) for k in range(len(names))]
    rows.append(["all", str(len(routed)), *map(str, total), _share(routed)])
    return rows


def verdict(routed: Sequence[Routed]) -> tuple[int, int]:
    """How many images went right, of those whose expert is known."""
    known = [result.correct for result in routed if result.correct is not None]
    return sum(known), len(known)


def _share(routed: Sequence[Routed]) -> str:
    share = accuracy(routed)
    return "-" if share is None else f"{share:.1%}"


def mistakes(
    samples: Sequence[Sample], routed: Sequence[Routed], names: Sequence[str]
) -> list[str]:
    """One line for each image that did not go to its domain's expert."""
    return [
        f"{s.name}: is {s.domain}, went to {names[r.expert]}"
        + (" (fallback: the router was unsure)" if r.expert == 0 else "")
        + f", scores {' '.join(f'{score:.2f}' for score in r.scores)}"
        for s, r in zip(samples, routed, strict=True)
        if r.correct is False
    ]
