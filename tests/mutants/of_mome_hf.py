"""Mutants of MoME around transformers: encoders, where visual tokens go, saving, the original's checkpoints, routes."""

from __future__ import annotations

from mutant import Mutant

MOME = "mixpert_kernels/hf/mome"
BUILD, ENCODERS = "tests/test_mome_build.py", "tests/test_mome_encoders.py"
SAVING, ORIGINAL = "tests/test_mome_saving.py", "tests/test_mome_original.py"
ROUTE = "tests/test_mome_route.py"
PLACE = f"{BUILD} -k placeholder"

MUTANTS: list[Mutant] = [
    Mutant(
        "visual-tokens-one-late",
        "visual tokens come one behind the placeholder",
        f"{MOME}/model.py",
        "taken, first = 1, holders.int().argmax(1)",
        "taken, first = 1, holders.int().argmax(1) + 1",
        PLACE,
    ),
    Mutant(
        "visual-tokens-before-the-padding",
        "without a placeholder the padding at the left is not seen",
        f"{MOME}/model.py",
        "taken, first = 0, mask.bool().int().argmax(1)",
        "taken, first = 0, mask.new_zeros(len(mask))",
        PLACE,
    ),
    Mutant(
        "visual-tokens-are-labels",
        "the loss counts visual tokens",
        f"{MOME}/model.py",
        "labels.new_full(visual.shape[:2], IGNORED)",
        "labels.new_full(visual.shape[:2], 0)",
        PLACE,
    ),
    Mutant(
        "llm-is-not-frozen",
        "build leaves the LLM to train",
        f"{MOME}/build.py",
        "    llm.requires_grad_(False)\n",
        "",
        f"{BUILD} -k gradients",
    ),
    Mutant(
        "registers-are-patches",
        "DINOv2's registers count as patches",
        f"{MOME}/encoders.py",
        'getattr(self.model.config, self.kind.registers or "", 0)',
        "0",
        f"{ENCODERS} -k own_patches",
    ),
    Mutant(
        "padding-is-patches",
        "Pix2Struct's padding counts as patches",
        f"{MOME}/encoders.py",
        "kept = inside.flatten().nonzero().flatten()",
        "kept = torch.arange(int(inside.sum()))",
        f"{ENCODERS} -k own_grid",
    ),
    Mutant(
        "sentences-mean-their-padding",
        "the mean of a text's tokens takes its padding in",
        f"{MOME}/sentence.py",
        "mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)",
        "mean = hidden.mean(1)",
        f"{ENCODERS} -k mean_of",
    ),
    Mutant(
        "unfrozen-are-lost",
        "what was unfrozen of an LLM by reference is not saved",
        f"{MOME}/saving.py",
        "(model.own_parameters() | unfrozen)",
        "model.own_parameters()",
        f"{SAVING} -k unfrozen",
    ),
    Mutant(
        "saved-llm-has-experts-names",
        "the saved LLM is none that transformers knows",
        f"{MOME}/saving.py",
        'state[name + key.removeprefix(f"{name}.ffn")] = tensor',
        "state[key] = tensor",
        f"{SAVING} -k plain_one",
    ),
    Mutant(
        "original-router-in-its-own-order",
        "the original's router is not brought to the order of the model's branches",
        f"{MOME}/original.py",
        "values[last] = values[last][order]",
        "pass",
        f"{ORIGINAL} -k order",
    ),
    Mutant(
        "route-mixes-layers",
        "layers are routed in another order than the model's",
        f"{MOME}/routes.py",
        "sorted(groups, key=_layer)",
        "reversed(groups)",
        f"{ROUTE} -k what_the_model_does",
    ),
]
