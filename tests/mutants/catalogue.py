"""Mutants: one fault each, and the tests that must notice it."""

from __future__ import annotations

import of_cuda
import of_grouped_adapter
import of_mome
import of_mome_hf
import of_mome_ops
import of_packed
import of_training
import of_triton
import of_wgmma

MUTANTS = (
    of_triton.MUTANTS
    + of_packed.MUTANTS
    + of_training.MUTANTS
    + of_mome.MUTANTS
    + of_mome_hf.MUTANTS
    + of_grouped_adapter.MUTANTS
    + of_mome_ops.MUTANTS
    + of_cuda.MUTANTS
    + of_wgmma.MUTANTS
)
