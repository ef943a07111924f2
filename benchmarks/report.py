"""Turn pytest-benchmark's JSON into a Markdown table and a plot.

python benchmarks/report.py results.json --markdown OUT.md --png OUT.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One variant of one scenario; times in milliseconds."""

    bench: str
    scenario: str
    variant: str
    base: str
    median: float
    iqr: float
    rounds: int
    ratio: float
    info: dict[str, Any]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read the machine and the rows; scenarios in the order they ran, variants from fast to slow.

    Raises:
        ValueError: the file is no result of these benchmarks.
    """
    try:
        data = json.loads(path.read_text())
        rows = [_row(entry) for entry in data["benchmarks"]]
        machine = data["machine_info"]["mixpert"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as failure:
        raise ValueError(
            f"report: {path} must be the --benchmark-json of these benchmarks, got {failure!r}"
        ) from failure
    if not rows:
        raise ValueError(f"report: {path} must hold at least one benchmark, got none")
    order = {scenario: i for i, scenario in enumerate(dict.fromkeys(r.scenario for r in rows))}
    return machine, sorted(rows, key=lambda row: (order[row.scenario], row.ratio))


def _row(entry: dict[str, Any]) -> Row:
    info, stats = entry["extra_info"], entry["stats"]
    return Row(
        info["bench"],
        info["scenario"],
        info["variant"],
        info["base"],
        stats["median"] * 1e3,
        stats["iqr"] * 1e3,
        stats["rounds"],
        info["ratio"],
        info,
    )


def machine_line(machine: dict[str, Any]) -> str:
    threads = f", threads: {machine['threads']}" if machine["dtype"] == "float32" else ""
    return (
        f"{machine['device']}{threads}, {machine['dtype']}, PyTorch {machine['torch']}, "
        f"transformers {machine['transformers']}, sizes: {machine['size']}"
    )


def markdown(machine: dict[str, Any], rows: list[Row]) -> str:
    """One table a scenario; README.md says what the columns mean."""
    lines = [machine_line(machine)]
    for scenario in dict.fromkeys(row.scenario for row in rows):
        group = [row for row in rows if row.scenario == scenario]
        rate = "GB/s" if "gbytes_per_s" in group[0].info else "GFLOP/s"
        peak = group[0].info["gemm_peak_gflops"]
        lines += [
            f"\n### {scenario}\n",
            f"{group[0].rounds} rounds; GEMM peak {peak:,.0f} GFLOP/s\n",
            f"| variant | median ms | IQR ms | ÷ {group[0].base} | {rate} | of GEMM peak "
            "| peak MB | kept MB | saved MB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(_line(row) for row in group),
        ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    info = row.info
    name = f"**{row.variant}**" if row.variant.startswith("ours") else row.variant
    rate = info.get("gflops", info.get("gbytes_per_s"))
    cells = [
        f"{row.median:,.2f}",
        f"{row.iqr:,.2f}",
        f"{row.ratio:.3f}",
        _cell(rate, "{:,.1f}"),
        _cell(info.get("share_of_gemm_peak"), "{:.1%}"),
        _cell(info.get("peak_mb"), "{:,.1f}"),
        _cell(info.get("kept_mb"), "{:,.1f}"),
        _cell(info.get("saved_mb"), "{:,.1f}"),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what pytest --benchmark-json=FILE wrote")
    parser.add_argument("--markdown", type=Path, help="write the tables here (default: print them)")
    parser.add_argument("--png", type=Path, help="draw the plot here")
    args = parser.parse_args(argv)
    try:
        machine, rows = load(args.results)
        tables = markdown(machine, rows)
        if args.markdown is None:
            print(tables)
        else:
            args.markdown.write_text(tables)
        if args.png is not None:
            from _plot import plot

            plot(rows, machine_line(machine), args.png)
    except (ValueError, OSError) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
