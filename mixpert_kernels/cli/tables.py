"""Plain text tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in columns: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(widths))]
    for row in rows:
        cells = [
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())


def write_page(
    docs: Path, name: str, rows: Sequence[dict[str, Any]], tables: dict[str, str]
) -> None:
    """Write the rows to a JSON file and the tables into kernels.md beside it, each between its marks."""
    lines = (json.dumps(row) for row in rows)
    (docs / name).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    page = (docs / "kernels.md").read_text(encoding="utf-8")
    for mark, text in tables.items():
        before, _, rest = page.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition(f"<!-- end of {mark} -->")
        page = f"{before}<!-- {mark} -->\n```text\n{text}```\n{end}{after}"
    (docs / "kernels.md").write_text(page, encoding="utf-8")


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%x"))
    except ValueError:
        return False
    return True
