"""Where the images of each domain went, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixpert_kernels.cli.tables import print_table

Routes = dict[str, dict[str, float]]  # of each domain: the share of its images by expert


def print_routes(routes: Routes) -> None:
    """Print a row a domain."""
    experts = list(next(iter(routes.values())))
    rows = [["domain", *(f"to {name}" for name in experts)]]
    rows += [[domain, *(f"{row[e]:.1%}" for e in experts)] for domain, row in routes.items()]
    print_table(rows)


def draw_routes(path: Path, routes: Routes) -> None:
    """Draw a cell for each domain and expert into a PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    domains, experts = list(routes), list(next(iter(routes.values())))
    letters = max(map(len, experts))
    size = (1 + 0.08 * letters + 0.9 * len(experts), 0.8 + 0.05 * letters + 0.5 * len(domains))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    ax = figure.add_subplot()
    shares = [[routes[d][e] for e in experts] for d in domains]
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, domain in enumerate(domains):
        for k, expert in enumerate(experts):
            share = shares[i][k]
            style: dict[str, Any] = {"color": "white" if share > 0.5 else "black"}
            style["weight"] = "bold" if domain == expert else "normal"
            ax.text(k, i, f"{share:.0%}", ha="center", va="center", fontsize=9, **style)
    ax.set_xticks(range(len(experts)), experts, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(domains)), domains)
    ax.set(xlabel="expert that the router chose", ylabel="domain")
    figure.savefig(path)
