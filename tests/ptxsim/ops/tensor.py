"""ldmatrix, stmatrix, mma.sync, wmma and wgmma."""
from __future__ import annotations

import re
from typing import Any, Callable, Optional

import numpy as np

from ..errors import ExecutionError, MemoryFault
from ..mma import BYTES, ELEMS, read_tile, tile_addresses, widen, widen_raw
from ..numerics import f32_to_f16
from ..parser import Imm, Instr, Reg, Vec
from ..program import BLOCK, CONV, Decoder, Op
from . import op
from .loadstore import address, note_shared, shared_index, space_of, sstore, track_read

Mask = Optional[np.ndarray]
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")


def _full_warps(g: Any, mask: Mask) -> np.ndarray:
    """Warps executing a warp-wide instruction (all 32 lanes required)."""
    if mask is None:
        return np.arange(g.nw)
    rows = mask.reshape(-1, 32)
    any_, all_ = rows.any(axis=1), rows.all(axis=1)
    if (any_ != all_).any():
        lane = 32 * int(np.flatnonzero(any_ != all_)[0])
        g.fail(ExecutionError, lane, "warp-wide instruction executed by only part of a warp")
    return np.flatnonzero(all_)


def _lanes_of(g: Any, warps: np.ndarray) -> Optional[np.ndarray]:
    """Lane indices for a warp list, None if that is the whole group."""
    if len(warps) == g.nw:
        return None
    return (warps[:, None] * 32 + np.arange(32)).reshape(-1)


# ------------------------------------------------------------ ldmatrix/stmatrix
@op("ldmatrix")
def ldmatrix(d: Decoder, ins: Instr) -> Op:
    count = next(int(m[1]) for m in ins.mods if m in ("x1", "x2", "x4"))
    trans = "trans" in ins.mods
    if "m8n8" not in ins.mods:
        raise d.unsupported(ins)
    items = ins.args[0].items if isinstance(ins.args[0], Vec) else (ins.args[0],)
    keys = [d.dst(x, "u32") for x in items]
    get = address(d, ins.args[1])
    generic = space_of(ins) == ""
    note_shared(d, "shared", 16)
    lane = np.arange(32)

    def run(g: Any, mask: Mask) -> None:
        warps = _full_warps(g, mask)
        addr = get(g.v)
        if generic:
            addr = addr & np.uint64(0xFFFFFFFF)
        used = addr.reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        lanes = (warps[:, None] * 32 + lane[: 8 * count]).reshape(-1)
        idx = shared_index(g, used, 16, "ldmatrix", lanes)
        track_read(g, used, 16, lanes)
        _count_matrix(g, "load", used, count, len(warps))
        rows = g.cta.smem.vec(np.uint32, 4)[idx]
        sel = _lanes_of(g, warps)
        if trans:
            m = rows.view(np.uint16).reshape(-1, count, 8, 8).transpose(0, 1, 3, 2)
            out = np.ascontiguousarray(m).view(np.uint32).reshape(-1, count, 32)
        else:
            out = rows.reshape(-1, count, 32)
        for i, k in enumerate(keys):
            if sel is None:
                g.v[k][...] = out[:, i].reshape(-1)
            else:
                g.v[k][sel] = out[:, i].reshape(-1)
    return d.mem(ins, run, "ldmatrix", CONV, -1)


def _count_matrix(g: Any, kind: str, addr: np.ndarray, count: int, warps: int) -> None:
    launch = g.cta.launch
    if not launch.opts.collect_stats:
        return
    cache = launch.access._banks
    key = (addr.tobytes(), "m")
    hit = cache.get(key)
    if hit is None:
        hit = cache[key] = launch.access.phases(addr, None, 16, 8)
    st = launch.stats
    if kind == "load":
        st.shared_load_requests += warps
        st.shared_load_wavefronts += hit[0]
        st.shared_load_ideal += hit[1]
    else:
        st.shared_store_requests += warps
        st.shared_store_wavefronts += hit[0]
        st.shared_store_ideal += hit[1]


@op("stmatrix")
def stmatrix(d: Decoder, ins: Instr) -> Op:
    count = next(int(m[1]) for m in ins.mods if m in ("x1", "x2", "x4"))
    trans = "trans" in ins.mods
    if "m8n8" not in ins.mods:
        raise d.unsupported(ins)
    items = ins.args[1].items if isinstance(ins.args[1], Vec) else (ins.args[1],)
    keys = [d.src(x, "u32") for x in items]
    get = address(d, ins.args[0])
    generic = space_of(ins) == ""
    note_shared(d, "shared", 16)
    lane = np.arange(32)

    def run(g: Any, mask: Mask) -> None:
        warps = _full_warps(g, mask)
        addr = get(g.v)
        if generic:
            addr = addr & np.uint64(0xFFFFFFFF)
        used = addr.reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        lanes = (warps[:, None] * 32 + lane[: 8 * count]).reshape(-1)
        _count_matrix(g, "store", used, count, len(warps))
        m = np.empty((len(warps), count, 32), np.uint32)
        for i, k in enumerate(keys):
            m[:, i] = g.v[k].reshape(-1, 32)[warps]
        if trans:
            m = np.ascontiguousarray(m.view(np.uint16).reshape(-1, count, 8, 8).transpose(0, 1, 3, 2)).view(np.uint32)
        sstore(g, used, 16, np.uint32, 4, m.reshape(-1, 4), lanes)
    return d.mem(ins, run, "stmatrix", CONV, -1)


@op("movmatrix")
def movmatrix(d: Decoder, ins: Instr) -> Op:
    dk, a = d.dst(ins.args[0], "u32"), d.src(ins.args[1], "u32")

    def run(g: Any, mask: Mask) -> None:
        warps = _full_warps(g, mask)
        m = np.ascontiguousarray(g.v[a]).view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
        out = np.ascontiguousarray(m).view(np.uint32).reshape(-1, 32)
        sel = _lanes_of(g, warps)
        if sel is None:
            g.v[dk][...] = out.reshape(-1)
        else:
            g.v[dk][sel] = out[warps].reshape(-1)
    return d.mem(ins, run, "shuffle", CONV, -1)


# ---------------------------------------------------------------------- mma.sync
@op("mma")
def mma(d: Decoder, ins: Instr) -> Op:
    shape = next(m for m in (_SHAPE.match(x) for x in ins.mods) if m)
    rows, cols, depth = (int(x) for x in shape.groups())
    after = ins.mods[ins.mods.index(shape.group(0)) + 1:]
    if "sp" in ins.mods or after[:2] != ("row", "col") or any("block_scale" in m for m in ins.mods):
        raise d.unsupported(ins)
    types = [m for m in after[2:] if m not in ("satfinite",)]
    dt, at, bt, ct = types[:4]
    if rows != 16 or cols != 8:
        if (rows, cols, depth) == (8, 8, 4) and at == "f64":
            return _mma_f64(d, ins)
        raise d.unsupported(ins)
    if at not in BYTES or bt not in BYTES:
        raise d.unsupported(ins)
    e = ELEMS[at]
    halves = depth // (4 * e)                       # number of 4*e-wide slices of K
    akeys = [d.src(x, "u32") for x in ins.args[1].items]
    bkeys = [d.src(x, "u32") for x in ins.args[2].items]
    if len(akeys) != 2 * halves or len(bkeys) != halves:
        raise d.unsupported(ins, "unexpected fragment size")
    f16_out = dt == "f16"
    view = "f32" if dt == "f32" else "s32"
    if f16_out:
        ckeys = [d.src(x, "f16x2") for x in ins.args[3].items]
        dkeys = [d.dst(x, "f16x2") for x in ins.args[0].items]
    else:
        ckeys = [d.src(x, view) for x in ins.args[3].items]
        dkeys = [d.dst(x, view) for x in ins.args[0].items]
    aw, bw = widen(at), widen(bt)
    integer = dt == "s32"
    flops = 2 * rows * cols * depth

    def run(g: Any, mask: Mask) -> None:
        V = g.v
        n = g.n
        if mask is not None:
            _full_warps(g, mask)
        # A as [row half, warp, row, (t, slice, elem)], B^T as [warp, col, same K order]
        abuf = np.empty((2, n, halves), np.uint32)
        for i, k in enumerate(akeys):
            abuf[i & 1, :, i >> 1] = V[k]
        bbuf = np.empty((n, halves), np.uint32)
        for i, k in enumerate(bkeys):
            bbuf[:, i] = V[k]
        a = aw(abuf).reshape(2, g.nw, 8, depth)
        b = bw(bbuf).reshape(g.nw, 8, depth).transpose(0, 2, 1)
        out = np.matmul(a, b).reshape(2, n, 2)
        st = g.cta.launch.stats
        warps = g.nw if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
        st.mma_instructions += warps
        st.mma_flops += flops * warps
        if f16_out:
            for h in range(2):
                value = (out[h].reshape(-1) + V[ckeys[h]]).astype(np.float16)
                if mask is None:
                    V[dkeys[h]][...] = value
                else:
                    np.copyto(V[dkeys[h]], value, where=np.repeat(mask, 2))
            return
        values = []
        for i in range(4):
            part = out[i >> 1, :, i & 1]
            if integer:
                values.append(part.astype(np.int64).astype(np.int32) + V[ckeys[i]])
            elif mask is None and dkeys[i] == ckeys[i]:
                np.add(part, V[ckeys[i]], V[dkeys[i]])
            else:
                values.append(part + V[ckeys[i]])
        if values:
            for k, value in zip(dkeys if len(values) == 4 else
                                [x for x, c in zip(dkeys, ckeys) if x != c], values):
                if mask is None:
                    V[k][...] = value
                else:
                    np.copyto(V[k], value, where=mask)
    return d.mem(ins, run, "mma", CONV, -1)


def _mma_f64(d: Decoder, ins: Instr) -> Op:
    """m8n8k4 double precision."""
    a, b = d.src(_one(ins.args[1]), "f64"), d.src(_one(ins.args[2]), "f64")
    ck = [d.src(x, "f64") for x in ins.args[3].items]
    dk = [d.dst(x, "f64") for x in ins.args[0].items]

    def run(g: Any, mask: Mask) -> None:
        _full_warps(g, mask)
        x = g.v[a].reshape(-1, 8, 4)
        y = g.v[b].reshape(-1, 8, 4).transpose(0, 2, 1)
        out = np.matmul(x, y).reshape(g.n, 2)
        st = g.cta.launch.stats
        st.mma_instructions += g.nw
        st.mma_flops += 512 * g.nw
        values = [out[:, i] + g.v[ck[i]] for i in range(2)]
        for k, value in zip(dk, values):
            if mask is None:
                g.v[k][...] = value
            else:
                np.copyto(g.v[k], value, where=mask)
    return d.mem(ins, run, "mma", CONV, -1)


def _one(arg: Any) -> Any:
    return arg.items[0] if isinstance(arg, Vec) else arg


# -------------------------------------------------------------------------- wmma
# Fragment layout is opaque in PTX; here lane l holds consecutive elements of the
# row-major matrix, starting at (l * per_lane) modulo the matrix size.
def _wmma_map(total: int, per_lane: int) -> np.ndarray:
    return (np.arange(32)[:, None] * per_lane + np.arange(per_lane)) % total


def _wmma_info(ins: Instr) -> tuple[int, int, int]:
    shape = next(m for m in (_SHAPE.match(x) for x in ins.mods) if m)
    return tuple(int(x) for x in shape.groups())                            # type: ignore[return-value]


def _wmma_elem(t: str) -> tuple[int, Any]:
    return {"f16": (2, np.uint16), "bf16": (2, np.uint16), "tf32": (4, np.uint32), "f32": (4, np.uint32),
            "s32": (4, np.uint32), "s8": (1, np.uint8), "u8": (1, np.uint8)}[t]


@op("wmma.load", "wmma.store")
def wmma_move(d: Decoder, ins: Instr) -> Op:
    """wmma.load.{a,b,c} and wmma.store.d"""
    from .loadstore import count_any, generic_load, generic_store, gload, gstore, sload, sstore
    load = ins.mods[0] == "load"
    which = ins.mods[1]
    m, n, k = _wmma_info(ins)
    t = [x for x in ins.mods if x in ("f16", "bf16", "tf32", "f32", "s32", "s8", "u8")][-1]
    size, dtype = _wmma_elem(t)
    rows, cols = {"a": (m, k), "b": (k, n), "c": (m, n), "d": (m, n)}[which]
    row_major = "row" in ins.mods
    frag, where = (ins.args[0], ins.args[1]) if load else (ins.args[1], ins.args[0])
    ld_arg = ins.args[2] if len(ins.args) > 2 else Imm(cols if row_major else rows)
    stride_key = d.src(ld_arg, "u32")
    keys = [(d.dst if load else d.src)(x, "u32") for x in frag.items]
    get = address(d, where)
    space = space_of(ins)
    note_shared(d, space, size)
    loader = {"": generic_load, "global": gload, "shared": sload}[space]
    storer = {"": generic_store, "global": gstore, "shared": sstore}[space]
    per_lane = len(keys) * 4 // size
    spots = _wmma_map(rows * cols, per_lane)
    r, c = spots // cols, spots % cols
    if not load:
        once = np.zeros((32, per_lane), bool)
        seen: set = set()
        for i in range(32):
            for j in range(per_lane):
                if int(spots[i, j]) not in seen:
                    seen.add(int(spots[i, j]))
                    once[i, j] = True

    def run(g: Any, mask: Mask) -> None:
        V = g.v
        warps = _full_warps(g, mask)
        sel = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
        base = get(V)[sel].astype(np.uint64)
        stride = V[stride_key][sel].astype(np.int64).reshape(-1, 32, 1)
        off = (r * stride + c if row_major else c * stride + r) * size
        addr = (base.reshape(-1, 32, 1) + off.view(np.uint64)).reshape(-1)
        lanes = np.repeat(sel, per_lane)
        first = addr.reshape(-1, per_lane)
        full = np.empty(g.n, np.uint64)
        full[...] = first[0, 0]
        st_mask = None if len(warps) == g.nw else np.repeat(np.isin(np.arange(g.nw), warps), 32)
        for j in range(per_lane):
            full[sel] = first[:, j]
            count_any(g, space, "load" if load else "store", full, st_mask, size)
        if load:
            values = loader(g, addr, size, dtype, 1, lanes).reshape(len(sel), per_lane)
            words = np.ascontiguousarray(values).view(np.uint32)
            for i, key in enumerate(keys):
                V[key][sel] = words[:, i]
        else:
            words = np.stack([V[key][sel] for key in keys], axis=1)
            values = np.ascontiguousarray(words).view(dtype).reshape(-1)
            keep = np.broadcast_to(once, (len(warps), 32, per_lane)).reshape(-1)
            storer(g, addr[keep], size, dtype, 1, values[keep], lanes[keep])
    return d.mem(ins, run, "wmma", CONV, -1)


@op("wmma.mma")
def wmma_mma(d: Decoder, ins: Instr) -> Op:
    m, n, k = _wmma_info(ins)
    kinds = [x for x in ins.mods if x in ("f16", "bf16", "tf32", "f32", "s32", "s8", "u8")]
    if len(kinds) == 2:                       # f16: only d and c types are written
        dt, ct, at, bt = kinds[0], kinds[1], "f16", "f16"
    else:
        dt, at, bt, ct = kinds
    akeys = [d.src(x, "u32") for x in ins.args[1].items]
    bkeys = [d.src(x, "u32") for x in ins.args[2].items]
    ckeys = [d.src(x, "u32") for x in ins.args[3].items]
    dkeys = [d.dst(x, "u32") for x in ins.args[0].items]

    def fetch(V: list, sel: np.ndarray, keys: list, t: str, total: int) -> np.ndarray:
        size, dtype = _wmma_elem(t)
        words = np.stack([V[x][sel] for x in keys], axis=1)
        values = np.ascontiguousarray(words).view(dtype).reshape(-1, 32 * len(keys) * 4 // size)[:, :total]
        if t == "f32":
            return values.view(np.float32)
        if t == "s32":
            return values.view(np.int32).astype(np.float64)
        return widen_raw(t)(np.ascontiguousarray(values))

    def run(g: Any, mask: Mask) -> None:
        V = g.v
        warps = _full_warps(g, mask)
        sel = (warps[:, None] * 32 + np.arange(32)).reshape(-1)
        a = fetch(V, sel, akeys, at, m * k).reshape(-1, m, k)
        b = fetch(V, sel, bkeys, bt, k * n).reshape(-1, k, n)
        c = fetch(V, sel, ckeys, ct, m * n).reshape(-1, m, n)
        out = np.matmul(a, b) + c
        size, dtype = _wmma_elem(dt)
        if dt == "f16":
            raw = out.astype(np.float16).view(np.uint16)
        elif dt == "s32":
            raw = out.astype(np.int64).astype(np.int32).view(np.uint32)
        else:
            raw = out.astype(np.float32).view(np.uint32)
        per_lane = len(dkeys) * 4 // size
        spots = _wmma_map(m * n, per_lane)
        words = np.ascontiguousarray(raw.reshape(len(warps), m * n)[:, spots]).view(np.uint32).reshape(len(sel), -1)
        for i, key in enumerate(dkeys):
            V[key][sel] = words[:, i]
        st = g.cta.launch.stats
        st.mma_instructions += len(warps)
        st.mma_flops += 2 * m * n * k * len(warps)
    return d.mem(ins, run, "mma", CONV, -1)


# ------------------------------------------------------------------------- wgmma
@op("wgmma.fence")
def wgmma_fence(d: Decoder, ins: Instr) -> Op:
    def run(g: Any, mask: Mask) -> None:
        g.cta.wgmma_fenced[g.wlo:g.whi] = True
    return d.mem(ins, run, "fence", CONV, -1)


@op("wgmma.commit_group")
def wgmma_commit(d: Decoder, ins: Instr) -> Op:
    def run(g: Any, mask: Mask) -> None:
        g.cta.wgmma_count[g.wlo:g.whi] += 1
    return d.mem(ins, run, "wgmma.sync", CONV, -1)


@op("wgmma.wait_group")
def wgmma_wait(d: Decoder, ins: Instr) -> Op:
    """Blocks until the whole warpgroup has issued what is being waited for."""
    keep = ins.args[0].value

    def run(g: Any, mask: Mask) -> bool:
        cta = g.cta
        _full_warps(g, mask)
        limits = cta.wgmma_count[g.wlo:g.whi] - keep
        for w, limit in zip(range(g.wlo, g.whi), limits.tolist()):
            first = w // 4 * 4
            if limit > 0 and int(cta.wgmma_count[first:first + 4].min()) < limit:
                return True
        for w, limit in zip(range(g.wlo, g.whi), limits.tolist()):
            _retire(cta, w, limit)
        return False
    return d.mem(ins, run, "wgmma.sync", BLOCK)


def _retire(cta: Any, warp: int, before: int) -> None:
    """Warp observes completion of all wgmmas committed before group number `before`."""
    rest = []
    for item in cta.wgmma_pending:
        if item.wlo // 4 == warp // 4 and item.group < before:
            item.finish(warp)
            if item.wlo == warp:
                item.publish()
                continue
        rest.append(item)
    cta.wgmma_pending = rest
    if not any(item.wlo == warp for item in rest):
        cta.wgmma_fenced[warp] = False                   # the registers may be used otherwise now


def wgmma_complete_some(cta: Any) -> None:
    """Let a prefix of some warp's pending operations execute early."""
    rng = cta.launch.rng
    warp = cta.wgmma_pending[int(rng.random() * len(cta.wgmma_pending))].wlo
    for item in cta.wgmma_pending:
        if item.wlo == warp and not item.done:
            item.run()
            return


class PendingWgmma:
    """An issued wgmma of one warp: reads shared memory when it runs, not at issue."""

    __slots__ = ("cta", "wlo", "group", "fn", "done", "reads", "publish", "seen")

    def __init__(self, cta: Any, warp: int, group: int, fn: Callable, reads: Optional[np.ndarray], publish: Callable):
        self.cta, self.wlo, self.group, self.fn = cta, warp, group, fn
        self.done = False
        self.reads = reads
        self.publish = publish
        self.seen: Optional[tuple[int, int]] = None      # first waiter and its clock

    def run(self) -> None:
        """Compute; results stay invisible until published by the issuing warp's wait."""
        self.fn()
        self.done = True

    def finish(self, waiter: int) -> None:
        """A warp of the warpgroup waited: the operands are no longer being read."""
        if not self.done:
            self.run()
        races = self.cta.races
        if races is None or self.reads is None:
            return
        if self.seen is None:
            races.settle_read(self.reads, self.wlo, waiter)
            self.seen = waiter, int(races.vc[waiter, waiter])
        else:                       # later waits of the warpgroup observe the same completion
            first, clock = self.seen
            races.vc[waiter, first] = max(int(races.vc[waiter, first]), clock)


@op("wgmma.mma_async")
def wgmma(d: Decoder, ins: Instr) -> Op:
    if "sp" in ins.mods:
        raise d.unsupported(ins)
    shape = next(m for m in (_SHAPE.match(x) for x in ins.mods) if m)
    _, cols, depth = (int(x) for x in shape.groups())
    types = ins.mods[ins.mods.index(shape.group(0)) + 1:]
    types = [t for t in types if t != "satfinite"]
    dt, at, bt = types[:3]
    args = ins.args
    f16_out = dt == "f16"
    accs = args[0].items
    base = "f16x2" if f16_out else "f32" if dt == "f32" else "s32"
    dkeys = [d.dst(x, base) for x in accs]
    rawkeys = [d.dst(x, "u32") for x in accs]
    a_regs = [d.src(x, "u32") for x in args[1].items] if isinstance(args[1], Vec) else None
    adesc = d.src(args[1], "u64") if a_regs is None else None
    bdesc = d.src(args[2], "u64")
    scale = args[3]
    if isinstance(scale, Imm):
        scale_key, scale_neg, scale_imm = None, False, bool(scale.value)
    else:
        scale_key, scale_neg, scale_imm = d.src(Reg(scale.name), "pred"), scale.neg, True
    imms = [a.value for a in args[4:]]
    sa, sb = (imms[0], imms[1]) if len(imms) >= 2 else (1, 1)
    tail = imms[2:]
    ta = bool(tail[0]) if a_regs is None and len(tail) > 1 else False
    tb = bool(tail[-1]) if tail else False
    d.prog.uses_shared = True
    e = ELEMS[at]
    size = BYTES[at]
    integer = dt == "s32"
    flops = 2 * 16 * cols * depth                     # per warp
    aw = widen(at)
    halves = depth // (4 * e)

    def run(g: Any, mask: Mask) -> None:
        _full_warps(g, mask)
        cta, V = g.cta, g.v
        st = cta.launch.stats
        if not cta.wgmma_fenced[g.wlo:g.whi].all():
            g.fail(ExecutionError, 0, "wgmma without a wgmma.fence since the start or the wait for all earlier ones")
        for i in range(g.nw):
            issue(g, cta, V, i)
        st.wgmma_instructions += g.nw
        st.mma_flops += flops * g.nw

    def issue(g: Any, cta: Any, V: list, i: int) -> None:
        warp = g.wlo + i
        s = slice(32 * i, 32 * i + 32)
        db = int(V[bdesc][s.start])
        b_chunks = tile_addresses(db, cols, depth, size, tb)
        spans = [b_chunks]
        if a_regs is None:
            da = int(V[adesc][s.start])
            a_all = tile_addresses(da, 64, depth, size, ta)
            quarter = slice(16 * (warp % 4), 16 * (warp % 4) + 16)
            if ta:
                per = 16 // size
                a_chunks = a_all[:, quarter.start // per: quarter.stop // per]
            else:
                a_chunks = a_all[quarter]
            spans.append(a_chunks)
            a_frag = None
        else:
            buf = np.empty((2, 32, halves), np.uint32)
            for j, k in enumerate(a_regs):
                buf[j & 1, :, j >> 1] = V[k][s]
            # [half, row, t, slice, elem] -> [row, slice, t, elem]
            x = aw(buf).reshape(2, 8, 4, halves, e).transpose(0, 1, 3, 2, 4)
            a_frag = np.ascontiguousarray(x).reshape(16, depth)
            a_chunks = None
        sm = cta.smem
        top = max(int(x.max()) for x in spans) + 16
        low = min(int(x.min()) for x in spans)
        if top > sm.size or low < sm.base:
            g.fail(MemoryFault, s.start, f"wgmma descriptor reaches shared addresses {low:#x}..{top:#x}, "
                   f"CTA has {sm.base:#x}..{sm.size:#x}")
        use_c = scale_imm if scale_key is None else bool(V[scale_key][s.start]) != scale_neg
        reads = None
        if cta.races is not None or sm.init is not None:
            flat = np.concatenate([x.reshape(-1) for x in spans])
            lanes = np.full(len(flat), s.start)
            g_warps = np.full(len(flat), warp, np.int32)
            gran = sm.granules(flat, 16)
            if sm.init is not None:
                bad = sm.check_init(gran)
                if bad is not None:
                    from ..errors import UninitializedRead
                    g.fail(UninitializedRead, s.start, f"wgmma reads shared memory never written at {int(flat[bad]):#x}")
            if cta.races is not None:
                rows = gran.reshape(-1)
                w = np.repeat(g_warps, gran.shape[1])
                hit = cta.races.read(rows[:, None], w, g.pc, pending=True)
                if hit:
                    cta.race(g, hit, rows[:, None], np.repeat(lanes, gran.shape[1]))
                reads = rows
        acc = _accumulator(cta, warp, tuple(rawkeys), V, dkeys, s, f16_out, integer)
        state = {"acc": acc}

        def compute() -> None:
            bm = read_tile(sm.raw, b_chunks, bt, tb)                          # [N, K]
            am = a_frag if a_frag is not None else read_tile(sm.raw, a_chunks, at, ta)
            out = am @ bm.T
            if sa * sb < 0:
                out = -out
            holder = state["acc"]
            if use_c:
                out = out + holder["m"]
            holder["m"] = np.asarray(out, np.float64 if integer else np.float32)
            if f16_out:
                holder["m"] = f32_to_f16(holder["m"]).astype(np.float32)

        def publish() -> None:
            holder = state["acc"]
            holder["users"] -= 1
            m = holder["m"].reshape(2, 8, cols // 8, 4, 2)                   # half, g, j, t, elem
            if holder["users"] > 0:
                return
            cta.wgmma_acc.pop((warp, tuple(rawkeys)), None)
            if f16_out:
                packed = m.astype(np.float16)
                for idx, k in enumerate(dkeys):
                    j, h = idx >> 1, idx & 1
                    V[k][2 * s.start: 2 * s.stop] = packed[h, :, j].reshape(-1)
                return
            for idx, k in enumerate(dkeys):
                j, h, x = idx >> 2, (idx >> 1) & 1, idx & 1
                V[k][s] = m[h, :, j, :, x].reshape(-1)
        item = PendingWgmma(cta, warp, int(cta.wgmma_count[warp]), compute, reads, publish)
        cta.wgmma_pending.append(item)
        if not cta.launch.opts.strict_wgmma:
            item.run()
            item.publish()
            item.publish = lambda: None
            return
        poison = np.uint32(0xFFFFFFFF)
        for k in rawkeys:
            V[k][s] = poison
    return d.mem(ins, run, "wgmma", CONV, -1)


def _accumulator(cta: Any, warp: int, ident: tuple, V: list, keys: list, s: slice, f16_out: bool, integer: bool) -> dict:
    """Accumulator tile in flight: shared by chained wgmmas on the same registers."""
    table = cta.__dict__.setdefault("wgmma_acc", {})
    holder = table.get((warp, ident))
    if holder is not None:
        holder["users"] += 1
        return holder
    if f16_out:
        parts = np.stack([V[k][2 * s.start: 2 * s.stop] for k in keys])        # [regs, 64]
        m = parts.reshape(-1, 2, 8, 4, 2).transpose(1, 2, 0, 3, 4)
    else:
        parts = np.stack([V[k][s] for k in keys])                            # [regs, 32]
        m = parts.reshape(-1, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2)
    m = np.ascontiguousarray(m).reshape(16, -1).astype(np.float64 if integer else np.float32)
    holder = table[warp, ident] = {"m": m, "users": 1}
    return holder

