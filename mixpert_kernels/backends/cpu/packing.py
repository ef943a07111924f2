"""Weights in oneDNN's blocked layout, made once and made again when the weights change.

A packed copy belongs to the storage of its sources, not to a tensor object: torch.compile and autograd hand the same
parameter over as ever new objects. It is used only while every source still has the storage, version counter and
sampled values it was packed from. The version counter sees in-place updates and load_state_dict. Updates through
``param.data`` do not count there; the sample sees them when they touch the whole weight, as an optimiser's do. Who
edits a few values of ``param.data`` by hand calls ``clear()``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SAMPLES = 32


class Packed(NamedTuple):
    weight: Tensor  # (N, K) in oneDNN's layout
    bias: Tensor | None  # (N,)
    nbytes: int  # of the weight; an opaque tensor does not tell


class _Entry(NamedTuple):
    packed: Packed
    storages: tuple[StorageWeakRef, ...]
    state: tuple


_entries: dict[tuple, _Entry] = {}


def packed(
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    scale: Tensor | None,  # (E, N), folded in
    expert: int,
    dtype: torch.dtype,
    factors: tuple[float, float] = (1.0, 1.0),  # of the weights and of the biases, folded in
) -> Packed | None:
    """Return expert ``expert``'s layer packed in ``dtype``; None where the sources cannot be watched."""
    sources = [*weights, *biases] if scale is None else [*weights, *biases, scale]
    if not watched(*sources):
        return None
    counts = (len(weights), len(biases))
    key = (expert, dtype, factors, *counts, *(t.data_ptr() for t in sources))
    state = tuple(_state(t, expert) for t in sources)
    entry = _entries.get(key)
    if entry is not None and entry.state == state and not _expired(entry):
        return entry.packed
    _drop_expired()
    storages = tuple(StorageWeakRef(t.untyped_storage()) for t in sources)
    entry = _Entry(_pack(weights, biases, scale, expert, dtype, factors), storages, state)
    _entries[key] = entry
    return entry.packed


def watched(*sources: Tensor | None) -> bool:
    """Whether a change of these would be seen: inference tensors have no version counter."""
    return not any(t is not None and t.is_inference() for t in sources)


def packed_bytes() -> int:
    """Bytes held in packed copies of weights that are still alive; copies of dead ones are dropped."""
    _drop_expired()
    return sum(entry.packed.nbytes for entry in list(_entries.values()))


def clear() -> None:
    """Drop every packed copy; they are made again when needed."""
    _entries.clear()


def _pack(weights, biases, scale, expert, dtype, factors) -> Packed:
    weight = torch.cat([w[expert] for w in weights])
    bias = torch.cat([b[expert] for b in biases]) if biases else None
    if factors != (1.0, 1.0):
        weight = weight.float() * factors[0]
        bias = None if bias is None else bias.float() * factors[1]
    if scale is not None:
        weight = weight.float() * scale[expert].float()[:, None]
        bias = None if bias is None else bias.float() * scale[expert].float()
    weight = weight.to(dtype).contiguous()
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return Packed(reordered, None if bias is None else bias.to(dtype), weight.nbytes)


def _state(source: Tensor, expert: int) -> tuple:
    values = source[expert].flatten()
    sample = tuple(values[:: max(1, values.numel() // SAMPLES)].tolist())
    return (source.untyped_storage()._cdata, source._version, source.shape, source.stride(), sample)


def _drop_expired() -> None:
    for key in [k for k, entry in list(_entries.items()) if _expired(entry)]:
        _entries.pop(key, None)


def _expired(entry: _Entry) -> bool:
    return any(storage.expired() for storage in entry.storages)
