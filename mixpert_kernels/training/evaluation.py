"""Passes over a data set without a gradient: features for the router, and accuracy by domain and route."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixpert_kernels.cli.tables import print_table

from .batches import Batch, Reading, Skipped
from .confusion import Routes
from .data import ImageSet
from .stages import find_tower

if TYPE_CHECKING:
    from mixpert_kernels.hf.heads import Classifier, PrefixLM

BATCH = 32
COLUMNS = ("teacher", "router", "versatile", "routed_right", "fell_back")


def batches_once(
    images: ImageSet, reading: Reading, skip: Callable[[Sequence[Skipped]], None], title: str
) -> Iterator[Batch]:
    """Yield this process's share of a data set, without batches of which no image could be read.

    ``skip`` is told, at the end, of the images that no process could read.
    """
    every = list(range(len(images)))
    chunks = reading.group.share([every[i : i + BATCH] for i in range(0, len(every), BATCH)])
    skipped: list[Skipped] = []
    for batch in reading.bar(reading.batches(images, chunks), title, len(chunks)):
        skipped += batch.skipped
        if batch.samples:
            yield batch
    skip([image for some in reading.group.gather(skipped) for image in some])


@torch.no_grad()
def pooled_features(
    model: nn.Module,
    images: ImageSet,
    reading: Reading,
    skip: Callable[[Sequence[Skipped]], None],
    title: str,
) -> tuple[Tensor, Tensor]:
    """Return what the router scores (N, D) and each image's expert (N,), in the data's order, in every process."""
    tower = find_tower(model)
    rows: dict[int, tuple[Tensor, int]] = {}
    for batch in batches_once(images, reading, skip, title):
        with reading.autocast():
            pooled = tower.router_features(batch.pixels.to(reading.group.device)).cpu()
        domains = reading.domains(batch.samples).tolist()
        rows |= dict(zip(batch.indices, zip(pooled, domains, strict=True), strict=True))
    rows = {i: row for part in reading.group.gather(rows) for i, row in part.items()}
    if not rows:
        raise ValueError("train: data must hold at least one readable image, got none")
    ordered = [rows[index] for index in sorted(rows)]
    return torch.stack([row[0] for row in ordered]), torch.tensor([row[1] for row in ordered])


def trunk_key(model: nn.Module, data: ImageSet, precision: str) -> str:
    """A hash of what pooled features follow from: the trunk's weights, the samples and the precision."""
    digest = hashlib.sha256((data.fingerprint + precision).encode())
    for name, tensor in find_tower(model).trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def evaluate(
    model: Classifier | PrefixLM,
    images: ImageSet,
    reading: Reading,
    skip: Callable[[Sequence[Skipped]], None],
    *,
    routed: bool,
) -> tuple[dict[str, dict[str, float]], Routes]:
    """Return, for each domain, the share of right answers by route, and the share of images that went to each expert.

    Routes: ``versatile``, expert 0 for all; ``teacher``, the domain's expert, where the tower has several; and with
    ``routed`` also ``router``, the router's choice, of which ``routed_right`` is the share sent to the domain's
    expert and ``fell_back`` the share sent to expert 0. ``images`` is the number of images. The second is empty where
    no router chose.
    """
    experts = reading.experts
    several = find_tower(model).config.num_experts > 1
    counts = torch.zeros(len(experts), 1 + len(COLUMNS), dtype=torch.float64)
    went = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for batch in batches_once(images, reading, skip, "evaluation"):
        device = reading.group.device
        domain = reading.domains(batch.samples)
        pixels = batch.pixels.to(device)
        targets = {k: v.to(device) for k, v in model.targets(batch.samples).items()}
        routes: dict[str, Tensor | None] = {"versatile": torch.zeros_like(domain)}
        if several:
            routes |= {"teacher": domain, **({"router": None} if routed else {})}
        counts[:, 0].index_add_(0, domain, torch.ones(len(domain), dtype=torch.float64))
        for name, expert in routes.items():
            with reading.autocast():
                out = model(pixels, **targets, expert=expert)
            found = {name: out.correct.cpu()}
            if name == "router":
                chosen = out.expert.cpu()
                found |= {"routed_right": chosen == domain, "fell_back": chosen == 0}
                one = torch.ones(len(domain), dtype=torch.float64)
                went.index_put_((domain, chosen), one, accumulate=True)
            for column, hits in found.items():
                counts[:, 1 + COLUMNS.index(column)].index_add_(0, domain, hits.double())
    counts, went = (torch.stack(reading.group.gather(part)).sum(0) for part in (counts, went))
    shown = [c for c in COLUMNS if c == "versatile" or (several and (routed or c == "teacher"))]
    table = {
        name: {"images": int(row[0])}
        | {column: float(row[1 + COLUMNS.index(column)] / row[0]) for column in shown}
        for name, row in zip(experts, counts, strict=True)
        if row[0]
    }
    routes = {
        name: dict(zip(experts, (row / row.sum()).tolist(), strict=True))
        for name, row in zip(experts, went, strict=True)
        if row.sum()
    }
    return table, routes


def print_evaluation(table: dict[str, dict[str, float]]) -> None:
    """Print a row a domain."""
    columns = list(next(iter(table.values())))
    rows = [["domain", *(column.replace("_", " ") for column in columns)]]
    for name, row in table.items():
        rows.append([name, str(row["images"]), *(f"{row[c]:.1%}" for c in columns[1:])])
    print_table(rows)


def mean_over_domains(table: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The mean of each share over the domains, each counting the same."""
    columns = [column for column in next(iter(table.values())) if column != "images"]
    return {c: sum(row[c] for row in table.values()) / len(table) for c in columns}
