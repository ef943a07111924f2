"""Read the machine code that ``cuobjdump -sass`` prints: spills, and what the main loop of a product is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"(?:^|[\s,(`])0x([0-9a-f]+)\)?\s*$")
# What multiplies matrices, best first: the loop is that of the first kind there is.
PRODUCTS = ("HGMMA", "HMMA", "FFMA")
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
SPILLS = ("LDL", "STL")
ENDS = ("EXIT", "RET", "BRX", "JMX", "JMP", "BPT")


class Instruction(NamedTuple):
    """One line: ``@!P0 BRA 0x17c0`` at its address."""

    address: int
    predicate: str
    opcode: str  # BRA.U.ANY
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        found = TARGET.search(self.operands)
        return int(found[1], 16) if found else None


class Loop(NamedTuple):
    """What one turn of the innermost loop with the most products is made of, by static count."""

    product: str  # HMMA.16816.F32.BF16; in float32 FFMA
    operands: (
        str  # of HGMMA: "shared" where A and B are both read from shared memory, else "registers"
    )
    mma: int
    ldmatrix: int  # in float32: loads from shared memory
    cp_async: int
    other: int

    @property
    def other_per_mma(self) -> float:
        """Instructions that are no product, loads of operands too, for each product."""
        return (self.ldmatrix + self.cp_async + self.other) / self.mma


def functions(text: str) -> dict[str, list[Instruction]]:
    """Split the output of ``cuobjdump -sass`` by function."""
    parts = FUNCTION.split(text)[1:]
    return {
        name: [Instruction(int(m[1], 16), m[2] or "", m[3], m[4].strip()) for m in _lines(body)]
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def _lines(body: str) -> Iterable[re.Match[str]]:
    return INSTRUCTION.finditer(body)


def spills(code: list[Instruction]) -> int:
    """Loads from and stores to local memory."""
    return sum(line.name in SPILLS for line in code)


def main_loop(code: list[Instruction]) -> Loop | None:
    """The innermost loop with the most products; None where no loop multiplies."""
    for product in PRODUCTS:
        found = _busiest(code, product)
        if found:
            return _count(found, product)
    return None


def _count(body: list[Instruction], product: str) -> Loop:
    products = [line for line in body if line.name.startswith(product)]
    loads = "LDS" if product == "FFMA" else "LDSM"
    counts = {
        "mma": len(products),
        "ldmatrix": sum(line.name == loads for line in body),
        "cp_async": sum(line.name in COPIES for line in body),
    }
    operands = ""
    if product == "HGMMA":
        # HGMMA d, gdesc[a and b], c; with A in registers: HGMMA d, a, gdesc[b], c
        second = [line.operands.split(",")[1].strip() for line in products]
        operands = "shared" if all(text.startswith("gdesc") for text in second) else "registers"
    other = len(body) - sum(counts.values())
    return Loop(products[0].opcode, operands, **counts, other=other)


def _busiest(code: list[Instruction], product: str) -> list[Instruction] | None:
    """The loop with the most products among those without an inner loop that has any."""

    def products(body: set[int]) -> int:
        return sum(code[i].name.startswith(product) for i in body)

    bodies = [body for body in loops(code) if products(body)]
    inner = [body for body in bodies if not any(other < body for other in bodies)]
    best = max(inner, key=lambda body: (products(body), -len(body)), default=None)
    return [code[i] for i in sorted(best)] if best else None


def loops(code: list[Instruction]) -> list[set[int]]:
    """The natural loops, as the numbers of their instructions.

    A jump backwards is a loop only where its target dominates it: the compiler puts what is rarely run, such as another
    try to pass a barrier, behind the function's end, and jumps back from there.
    """
    starts, follows = _blocks(code)
    if not starts:
        return []
    ends = [*starts[1:], len(code)]
    precedes: list[set[int]] = [set() for _ in starts]
    for block, targets in enumerate(follows):
        for target in targets:
            precedes[target].add(block)
    dominators = _dominators(follows, precedes)
    found: dict[int, set[int]] = {}
    for block, targets in enumerate(follows):
        for head in targets & dominators[block]:
            body, ahead = found.setdefault(head, {head}), [block]
            while ahead:
                at = ahead.pop()
                if at not in body:
                    body.add(at)
                    ahead += precedes[at]
    return [{i for b in body for i in range(starts[b], ends[b])} for body in found.values()]


def _blocks(code: list[Instruction]) -> tuple[list[int], list[set[int]]]:
    """Where basic blocks start, and which blocks follow each."""
    index = {line.address: i for i, line in enumerate(code)}
    leads, goes = {0}, {}
    joins: dict[str, int] = {}  # BSSY B0, 0x100 ... BSYNC B0: threads go on together at 0x100
    for i, line in enumerate(code):
        barrier = line.operands.split(",")[0]
        if line.name == "BSSY" and line.target in index:
            joins[barrier] = index[line.target]
        where = joins.get(barrier) if line.name == "BSYNC" else None
        if line.name == "BRA" and line.target in index:
            where = index[line.target]
        # A jump has a condition before it (@P0) or as an operand (BRA.U UP0, 0x100; BRA.DIV UR4, 0x100).
        always = not line.predicate and (line.name in (*ENDS, "BSYNC") or "," not in line.operands)
        if where is not None:
            goes[i] = {where} if always else {where, i + 1}
        elif line.name in ENDS:
            goes[i] = set() if always else {i + 1}
        if i in goes:
            leads |= goes[i] | {i + 1}
    starts = sorted(i for i in leads if i < len(code)) if code else []
    block = {start: n for n, start in enumerate(starts)}
    follows = []
    for end in [*starts[1:], len(code)]:
        targets = goes.get(end - 1, {end})
        follows.append({block[t] for t in targets if t < len(code)})
    return starts, follows


def _dominators(follows: list[set[int]], precedes: list[set[int]]) -> list[set[int]]:
    """Of each block, those that every way from the entry to it passes; for unreachable blocks itself alone."""
    order, seen, ahead = [], {0}, [0]
    while ahead:
        order.append(ahead.pop())
        new = follows[order[-1]] - seen
        seen |= new
        ahead += sorted(new)
    all_blocks = set(order)
    found = [{b} if b not in all_blocks or b == 0 else set(all_blocks) for b in range(len(follows))]
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            before = [found[p] for p in precedes[block] if p in all_blocks]
            new = set.intersection(*before) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found
