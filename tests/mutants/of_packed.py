"""Mutants of what the Triton kernels do for packed rows."""

from __future__ import annotations

from mutant import Mutant
from of_triton import TRITON

PACKED = "tests/test_triton_packed.py"


def _mutant(name: str, what: str, file: str, old: str, new: str, tests: str) -> Mutant:
    return Mutant(name, what, f"{TRITON}/{file}", old, new, tests)


MUTANTS: list[Mutant] = [
    _mutant(
        "packed-search-off-by-one",
        "the first block of a tile is taken for the last of the tile before",
        "_tiles.py",
        "begun = first_block(middle, tl.load(cu_seqlens_ptr + middle), BLOCK) <= block",
        "begun = first_block(middle, tl.load(cu_seqlens_ptr + middle), BLOCK) < block",
        f"{PACKED} -k 'every_block and 4'",
    ),
    _mutant(
        "packed-last-row-dropped",
        "the last row of a tile of packed rows is left out",
        "_tiles.py",
        "rows = tl.load(cu_seqlens_ptr + tile + 1) - begin",
        "rows = tl.load(cu_seqlens_ptr + tile + 1) - begin - 1",
        f"{PACKED} -k outer",
    ),
    _mutant(
        "packed-box-of-another-tile",
        "descriptors read the first rows of all, not the tile's",
        "_tiles.py",
        "near = begin + row",
        "near = row",
        f"{PACKED} -k 'descriptors and 1'",
    ),
    _mutant(
        "packed-empty-block-stores",
        "a block past a tile's rows is taken for one of the next tile",
        "grouped_linear.py",
        "            rows, columns, NUM_WEIGHTS * columns,",
        "            first_m + BLOCK_M, columns, NUM_WEIGHTS * columns,",
        "tests/compiled/test_packed.py -k 'test_linear and 80'",
    ),
    _mutant(
        "packed-outer-through-descriptors",
        "dW adds the next tile's rows that a box ends in",
        "grouped_outer.py",
        "apart = cu_seqlens is None",
        "apart = True",
        f"{PACKED} -k outer",
    ),
    _mutant(
        "packed-outer-neighbours-row",
        "dW adds the first row of the next tile",
        "grouped_outer.py",
        "in_t = first_t + t < rows",
        "in_t = first_t + t < rows + (cu_seqlens_ptr is not None)",
        f"{PACKED} -k outer",
    ),
    _mutant(
        "packed-sums-chunk-of-another-tile",
        "the sums add the first chunk of the next tile",
        "_reduce.py",
        "inside = (s < count)[:, None] & (c < width)[None, :]",
        "inside = (s <= count)[:, None] & (c < width)[None, :]",
        f"{PACKED} -k 'many_chunks and 40'",
    ),
    _mutant(
        "packed-sums-tiles-past-the-eighth",
        "only the first tiles of an expert are added",
        "_reduce.py",
        "for first_tile in range(start, tl.load(offsets_ptr + e + 1), TILES):",
        "for first_tile in range(start, start + 1, TILES):",
        f"{PACKED} -k 'many_chunks and 40'",
    ),
    _mutant(
        "packed-pool-divides-by-another-length",
        "the mean divides by the rows of all images",
        "route.py",
        "                    image, blocks, rows, partial_ptr",
        "                    image, blocks, tokens, partial_ptr",
        "tests/test_packed.py -k 'triton and float32 and one_length and route and not grouped'",
    ),
    _mutant(
        "packed-image-of-another-base",
        "a tile arrives for the images between those it is the base of",
        "route.py",
        "mine = tl.load(base_tile_ptr + image) == tile",
        "mine = tl.load(base_tile_ptr + image) >= 0",
        f"{PACKED} -k base_of_two",
    ),
    _mutant(
        "packed-empty-image-not-scored",
        "nobody arrives for an image whose base tile has no row",
        "route.py",
        "blocks, block = tl.maximum(tl.cdiv(rows, ROWS), 1), row // ROWS",
        "blocks, block = tl.cdiv(rows, ROWS), row // ROWS",
        "tests/compiled/test_packed.py -k 'hostile and 80'",
    ),
    _mutant(
        "packed-gradient-divides-by-another-length",
        "the features' gradient divides by the rows of the tile with the image's number",
        "_route_backward.py",
        "tile = tl.program_id(0) if base_tile_ptr is None else tl.load(base_tile_ptr + i)",
        "tile = tl.program_id(0)",
        f"{PACKED} -k base_of_two",
    ),
]
