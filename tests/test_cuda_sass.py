"""The reader of machine code: what is a loop, what it is made of, what spills; and facts out of a cubin."""

from __future__ import annotations

import pytest

from mixpert_kernels.backends.cuda import _resources, _sass

# A pipeline on mma.sync: a prologue, the loop over k with a wait that is tried again far behind the end, an outer loop
# over tiles, and in it a short loop of stores.
PIPELINE = """
\t\tFunction : product
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;       /* 0x000 */
        /*0010*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x000 */
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/               @P1 BRA 0x110 ;
        /*0060*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0070*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0080*/              @!P0 BRA 0x20 ;
        /*0090*/                   STG.E.128 [R2.64], R8 ;
        /*00a0*/               @P2 BRA 0x90 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*00c0*/               @P3 BRA 0x10 ;
        /*00d0*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*00e0*/                   EXIT ;
        /*0110*/                   YIELD ;
        /*0120*/                   BRA 0x60 ;
        /*0130*/                   BRA 0x130;
"""
WARPGROUP = """
\t\tFunction : wgmma
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, {second}, R24, !UPT ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0020*/                   BRA.U UP0, 0x0 ;
        /*0030*/                   EXIT ;
"""
SPILLING = """
\t\tFunction : one
        /*0000*/                   STL.64 [R1+0x10], R4 ;
        /*0010*/               @P0 LDL R4, [R1] ;
        /*0020*/                   LDC R1, c[0x0][0x28] ;
        /*0030*/                   EXIT ;
\t\tFunction : other
        /*0000*/                   EXIT ;
"""


def test_the_main_loop_is_the_inner_one_with_what_is_rarely_run() -> None:
    code = _sass.functions(PIPELINE)["product"]
    assert len(code) == 18
    loop = _sass.main_loop(code)
    # 0x20 to 0x80 and the two lines from 0x110 on. The jump at 0x120 is no loop: it would span 3 products.
    assert loop == _sass.Loop("HMMA.16816.F32.BF16", "", 2, 1, 1, other=5)
    assert loop.other_per_mma == 3.5
    addresses = sorted(sorted({code[i].address for i in body})[0] for body in _sass.loops(code))
    assert addresses == [0x10, 0x20, 0x90, 0x130]


def test_without_a_product_there_is_no_main_loop() -> None:
    code = _sass.functions(PIPELINE.replace("HMMA", "IMAD"))["product"]
    assert _sass.main_loop(code) is None
    assert _sass.loops([]) == []


@pytest.mark.parametrize(
    ("second", "operands"),
    [("gdesc[UR8]", "shared"), ("R4", "registers"), ("R4, gdesc[UR8]", "registers")],
)
def test_where_wgmma_reads_its_operands(second: str, operands: str) -> None:
    loop = _sass.main_loop(_sass.functions(WARPGROUP.format(second=second))["wgmma"])
    assert (loop.mma, loop.other, loop.operands) == (2, 1, operands)
    assert loop.product == "HGMMA.64x128x16.F32.BF16"


def test_spills_are_loads_and_stores_of_local_memory() -> None:
    found = _sass.functions(SPILLING)
    assert {name: _sass.spills(code) for name, code in found.items()} == {"one": 2, "other": 0}


def test_float32_products_are_fused_multiply_adds() -> None:
    text = WARPGROUP.format(second="R5").replace("HGMMA.64x128x16.F32.BF16", "FFMA")
    loop = _sass.main_loop(_sass.functions(text)["wgmma"])
    assert (loop.product, loop.mma, loop.other) == ("FFMA", 2, 1)


def test_threads_that_meet_again_go_on_behind_the_barrier() -> None:
    """BSYNC continues where its BSSY says; a jump with a condition as its operand may not be taken."""
    text = """
\t\tFunction : meet
        /*0000*/                   BRA.U UP1, 0x60 ;
        /*0010*/                   BSSY B0, 0x40 ;
        /*0020*/               @P0 BRA 0x80 ;
        /*0030*/                   BSYNC B0 ;
        /*0040*/                   FFMA R1, R2, R3, R1 ;
        /*0050*/                   BRA.U UP0, 0x10 ;
        /*0060*/                   EXIT ;
        /*0080*/                   YIELD ;
        /*0090*/                   BSYNC B0 ;
        /*00a0*/                   EXIT ;
"""
    code = _sass.functions(text)["meet"]
    assert [sorted(body) for body in _sass.loops(code)] == [[1, 2, 3, 4, 5, 7, 8]]


def test_a_folder_without_a_tool_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="cuobjdump is found neither"):
        _resources.cuobjdump()
