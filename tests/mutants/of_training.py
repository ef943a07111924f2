"""Mutants of training: the experts' loss, optimizer, stages, and what is kept for backward."""

from __future__ import annotations

from mutant import Mutant

TRAINING = "mixpert_kernels/training"
CPU = "mixpert_kernels/backends/cpu"
ALONE = "tests/test_expert_optimizer.py -k 'alone or hit'"
RESUMED = "tests/test_train_resume.py -k 'goes_on_bitwise and not random_moments or features_of'"
KEPT = "tests/test_tower_training.py"

MUTANTS: list[Mutant] = [
    Mutant(
        "optimizer-steps-everyone",
        "experts without an image are stepped, too",
        f"{TRAINING}/_parted.py",
        "                if hit:",
        "                if hit or parts[e].steps:",
        ALONE,
    ),
    Mutant(
        "optimizer-keeps-hits",
        "the hits of a step are not forgotten",
        f"{TRAINING}/_parted.py",
        "        self._forget()\n        return loss",
        "        return loss",
        "tests/test_optimizer_hits.py",
    ),
    Mutant(
        "optimizer-counts-dummies",
        "an image run under no_hits counts",
        f"{TRAINING}/_hits.py",
        "or not optimizer.counting or",
        "or",
        "tests/test_optimizer_hits.py",
    ),
    Mutant(
        "optimizer-forgets-state",
        "moments stay with the views of the last step",
        f"{TRAINING}/_part.py",
        "self.inner.state[new] = self.inner.state.pop(old)",
        "self.inner.state.pop(old)",
        ALONE,
    ),
    Mutant(
        "loss-of-the-batch",
        "experts are weighed by their share of the batch",
        f"{TRAINING}/loss.py",
        "return (sums / totals).sum() * processes",
        "return sums.sum() / totals.sum() * processes",
        "tests/test_loss.py",
    ),
    Mutant(
        "stage-trains-the-router",
        "the router trains with the experts",
        f"{TRAINING}/stages.py",
        '    "router": ("router",),',
        '    "router": ("router", "experts"),',
        "tests/test_stages.py",
    ),
    Mutant(
        "clone-of-the-wrong-expert",
        "every expert becomes a copy of the last",
        "mixpert_kernels/modules/expertize.py",
        "stacked(parameter[0], num_experts)",
        "stacked(parameter[-1] * 1.01, num_experts)",
        "tests/test_stages.py",
    ),
    Mutant(
        "trunk-keeps-activations",
        "a frozen trunk runs with autograd",
        "mixpert_kernels/hf/trunk.py",
        "            with torch.no_grad():\n                return run_trunk",
        "            with torch.enable_grad():\n                return run_trunk",
        KEPT,
    ),
    Mutant(
        "segment-keeps-its-output",
        "sorting back keeps a copy for backward",
        "mixpert_kernels/hf/tower.py",
        "return y[order.argsort()]",
        "return torch.empty_like(y).index_copy_(0, order, y)",
        KEPT,
    ),
    Mutant(
        "cpu-dx-of-one-weight",
        "dx of a sequence of weights is that of the last",
        f"{CPU}/grouped_linear.py",
        "beta=min(i, 1)",
        "beta=0",
        "tests/test_grouped_linear.py -k 'cpu and (sequence or accurate)'",
    ),
    Mutant(
        "cpu-last-run-only",
        "an expert's weight gradient is that of its last run of tiles",
        f"{CPU}/grouped_linear.py",
        "dweights[i][e].addmm_(d.T, rows)",
        "dweights[i][e].addmm_(d.T, rows, beta=0)",
        "tests/test_grouped_linear.py -k 'cpu and accurate and float32'",
    ),
    Mutant(
        "resume-from-the-first-image",
        "a resumed stage sees its images from the start",
        f"{TRAINING}/run.py",
        "order.batches(stage.batch, self.step)",
        "order.batches(stage.batch, 0)",
        RESUMED,
    ),
    Mutant(
        "resume-without-moments",
        "a resumed stage starts its optimizer anew",
        f"{TRAINING}/run.py",
        "            optimizer.load_state_dict(self.optimizer_state)",
        "            pass",
        RESUMED,
    ),
    Mutant(
        "features-of-any-trunk",
        "the router's cached features are taken whatever they follow from",
        f"{TRAINING}/output.py",
        'if saved["key"] == key else',
        'if saved["key"] else',
        RESUMED,
    ),
    Mutant(
        "answer-one-token-late",
        "the language model is asked for the token it is given",
        "mixpert_kernels/hf/heads.py",
        "logits[:, prefix.shape[1] - 1 : -1]",
        "logits[:, prefix.shape[1] :]",
        "tests/test_heads.py",
    ),
]
