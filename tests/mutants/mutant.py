"""What a mutant is."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: of the mutant.
        what: the fault, for people.
        file: where, from the root of the repository.
        old: what stands there, exactly once.
        new: what the mutant has instead.
        tests: arguments of pytest that must make it fail; they pass without the mutant.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str
