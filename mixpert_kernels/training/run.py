"""The recipe: the stages in order, then calibration, saving and evaluation, resumed wherever it was stopped."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .batches import Order, Reading, Skipped, derive, seed_everything
from .calibration import calibrate
from .checkpoint import check_finite, clean, save_checkpoint
from .curve import curve_report
from .data import ImageSet, Sample
from .distributed import Group, full_state, process_group, spread
from .evaluation import pooled_features, trunk_key
from .metrics import Clock, Metrics, SkipList
from .output import (
    load_features,
    save_features,
    write_calibration,
    write_nan_batch,
    write_results,
)
from .prepare import RunData, check_output, finished_results, load_saved, load_weights, read_data
from .recipe import Recipe, Stage
from .router import fit_router
from .stages import find_tower, set_stage
from .step import StepReport, run_step
from .system import system_of


def train(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Run a recipe to its end, from its last checkpoint where there is one.

    Started again with the same recipe after being stopped at any point, it ends with the same weights as if it had
    never been stopped: on a CPU bit for bit. Under ``torchrun`` or ``accelerate launch`` every process calls this.

    Args:
        recipe: what to do.
        progress: show progress bars, where stderr is a terminal.

    Returns:
        What ``results.json`` in the output directory holds.

    Raises:
        ValueError: the data, the model or an earlier run in the output directory do not fit the recipe; before any
            training.
        RuntimeError: the loss is not finite, or a checkpoint cannot be written.
    """
    from mixpert_kernels.hf.loading import quiet

    with process_group(recipe.device) as group, quiet(), contextlib.ExitStack() as stack:
        if not group.first:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        check_output(recipe)
        data = read_data(recipe)
        saved = load_saved(recipe, data.train)
        finished = finished_results(recipe, saved)
        if finished is not None:
            print(f"finished  {recipe.output} already; nothing to do")
            return finished
        run = _Run(recipe, data, group, saved, progress)
        stack.callback(run.close)
        return run.all()


class _Run:
    """One process's part of a run: its data, its model, and how far it has come."""

    def __init__(
        self,
        recipe: Recipe,
        data: RunData,
        group: Group,
        saved: dict[str, Any] | None,
        progress: bool,
    ) -> None:
        self.recipe, self.data, self.group = recipe, data, group
        self.system = system_of(recipe, data.train)
        self.stage, self.step = 0, 0  # the stage under way, and its steps done
        self.optimizer_state: dict[str, Any] | None = None
        self._build(saved, progress)
        if saved is not None:
            self.stage, self.step = saved["stage"], saved["step"]
            self.optimizer_state = saved["optimizer"]
            print(f"resuming  {recipe.output} after {self._where()}")
        group.wait()  # all have read the checkpoint before one writes the next
        self.metrics, self.skips = None, SkipList(None)
        if group.first:
            recipe.output.mkdir(parents=True, exist_ok=True)
            clean(recipe.output)
            self.metrics = Metrics(recipe.output, self.stage, self.step, self._total())
            self.skips = SkipList(recipe.output)

    def all(self) -> dict[str, Any]:
        """Run what is left of the stages, and finish."""
        for index in range(self.stage, len(self.recipe.stages)):
            stage = self.recipe.stages[index]
            seed_everything(self.recipe.seed, "stage", index)
            if stage.name == "clone":
                self._clone()
            elif stage.name == "router":
                self._fit_router(stage)
            else:
                self._train(stage)
            self.stage, self.step, self.optimizer_state = index + 1, 0, None
            self._save()
        return self._finish()

    def _clone(self) -> None:
        self.system.clone(self.model)

    def _train(self, stage: Stage) -> None:
        recipe, group, model = self.recipe, self.group, self.model
        self.system.set_stage(model, stage)
        runner = spread(model.train(), group, recipe.parallel)
        optimizer = self.system.optimizer(model, stage)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        order = Order(recipe.seed, self.stage, len(self.data.train))
        wanted = itertools.islice(order.batches(stage.batch, self.step), stage.steps - self.step)
        batches = self.reading.batches(self.data.train, map(group.share, wanted))
        with self.reading.bar(batches, stage.name, stage.steps, self.step) as bar:
            clock = Clock()
            for step, batch in enumerate(bar, start=self.step + 1):
                seed_everything(recipe.seed, "step", self.stage, step, group.rank)
                optimizer.zero_grad()
                dummy = self.data.train.samples[0]
                report = run_step(model, runner, optimizer, batch, self.reading, dummy)
                self._skip(report.skipped)
                if not report.finite:
                    self._stop_at_nan(order.batch(stage.batch, step - 1), step, report)
                if report.images:
                    optimizer.step()
                self.step = step
                self._log(stage, optimizer, report, batch.samples, clock)
                bar.set_postfix(loss=f"{report.loss:.4g}", refresh=False)
                if step % recipe.checkpoint_every == 0 and step < stage.steps:
                    self._save(optimizer)
        if recipe.parallel == "fsdp" and group.world > 1:
            self._gather_model()
        self.model.eval()

    def _fit_router(self, stage: Stage) -> None:
        set_stage(self.model, "router")
        tower = find_tower(self.model)
        features, domains = self._router_features()
        device = self.group.device
        accuracy = fit_router(
            tower,
            features.to(device),
            domains.to(device),
            steps=stage.steps,
            lr=stage.lr,
            weight_decay=stage.weight_decay,
            seed=derive(self.recipe.seed, "router", self.stage),
            progress=self.reading.progress and self.group.first,
        )
        self.group.same(list(tower.router.parameters()))
        self.step = stage.steps
        print(
            f"router    {accuracy:.1%} of {len(features)} training images to their domain's expert"
        )
        self._write_row({"images": len(features), "accuracy": accuracy, "lr": stage.lr})

    def _router_features(self) -> tuple[Tensor, Tensor]:
        """What the router learns from, read from its file where that is of this trunk and data."""
        key = trunk_key(self.model, self.data.train, self.recipe.precision)
        there = load_features(self.recipe.output, key)
        if all(self.group.gather(there is not None)) and there is not None:
            return there
        found = self._features(self.data.train)
        if self.group.first:
            save_features(self.recipe.output, key, *found)
        return found

    def _features(self, images: ImageSet | None) -> tuple[Tensor, Tensor]:
        assert images is not None  # a recipe that calibrates has held-out data
        return pooled_features(self.model, images, self.reading, self._skip, "features")

    def _finish(self) -> dict[str, Any]:
        """Calibrate, save what was trained, evaluate; all of it follows from the last checkpoint."""
        recipe = self.recipe
        results: dict[str, Any] = {"recipe": recipe.to_dict(), **self.system.describe()}
        if recipe.calibrate is not None:
            results["calibration"] = self._calibrate(recipe.calibrate.max_errors)
        if self.group.first:
            saved = self.system.save(self.model)
            print(f"saved     {' and '.join(str(recipe.output / name) for name in saved)}")
        if self.data.test is not None:
            results |= self.system.evaluate(self.model, self.data.test, self.reading, self._skip)
        results["skipped"] = self.group.gather(len(self.skips.seen))[0]
        if self.group.first:
            if self.skips.seen:
                print(f"skipped   {len(self.skips.seen)} unreadable, listed in {self.skips.path}")
            write_results(recipe.output, results)
        self.group.wait()
        return results

    def _calibrate(self, max_errors: float) -> dict[str, Any]:
        features, domains = self._features(self.data.held_out)
        device = self.group.device
        tower = find_tower(self.model)
        result = calibrate(tower, features.to(device), domains.to(device), max_errors=max_errors)
        report = {"max_errors": max_errors, **curve_report(result, len(features))}
        if self.group.first:
            write_calibration(self.recipe.output, result, report, self.system.names[0])
        return {key: value for key, value in report.items() if key != "curve"}

    def _skip(self, skipped: Sequence[Skipped]) -> None:
        """Note images that could not be read, the same in every process, or stop."""
        if skipped and self.recipe.data.on_bad_image == "fail":
            path, reason = skipped[0]
            raise ValueError(f"train: {path} must be a readable image, got: {reason}")
        self.skips.add(skipped)

    def _stop_at_nan(self, indices: list[int], step: int, report: StepReport) -> None:
        stage = self.recipe.stages[self.stage].name
        if self.group.first:
            samples = [self.data.train.samples[i] for i in indices]
            path = write_nan_batch(self.recipe.output, stage, step, report.loss, samples)
            print(f"stopped   {path}")
        raise RuntimeError(
            f"train: loss must be finite, got {report.loss} at step {step} of stage {stage}; nan-batch.json names the "
            "batch's images, and the last checkpoint is as it was"
        )

    def _log(
        self,
        stage: Stage,
        optimizer: Any,
        report: StepReport,
        samples: list[Sample],
        clock: Clock,
    ) -> None:
        clock.images += report.images
        if self.step % self.recipe.log_every and self.step < stage.steps:
            return
        own = self.system.row(self.model, stage, optimizer, samples, self.reading)
        self._write_row(
            {
                "loss": report.loss,
                "loss_of": report.by_domain,
                "share": report.share,
                "norm": optimizer.last_norms,
                **own,
                "images": report.images,
                "images_per_s": clock.rate(),
                "skipped": len(report.skipped),
            }
        )

    def _write_row(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            name = self.recipe.stages[self.stage].name
            place = {"stage_index": self.stage, "stage": name, "step": self.step}
            self.metrics.write({**place, "total_step": self._total(), **values})

    def _total(self) -> int:
        """Steps done, over all stages."""
        return self.step + sum(stage.steps or 0 for stage in self.recipe.stages[: self.stage])

    def _where(self) -> str:
        if self.stage == len(self.recipe.stages):
            return "the last stage"
        stage = self.recipe.stages[self.stage]
        return f"step {self.step} of {stage.steps or 0} of stage {stage.name}"

    def _save(self, optimizer: Any = None) -> None:
        """Save a checkpoint. Every process calls this; the first one writes, and if it cannot, all stop."""
        state = {
            "recipe": json.dumps(self.recipe.to_dict()),
            "data": self.data.train.fingerprint,
            "stage": self.stage,
            "step": self.step,
            "experts": self.system.experts(self.model),
            "model": full_state(self.model, self.group.first, self.system.frozen(self.model)),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }
        failure = None
        if self.metrics is not None:
            try:
                check_finite(self.model, state["model"], self._where())
                self.metrics.sync()
                save_checkpoint(self.recipe.output, state)
            except (OSError, RuntimeError) as error:
                failure = str(error)
        failure = self.group.gather(failure)[0]
        if failure is not None:
            raise RuntimeError(failure)

    def _build(self, saved: dict[str, Any] | None, progress: bool) -> None:
        """Build the model, of one expert or as many as the checkpoint's, and load its weights."""
        recipe = self.recipe
        seed_everything(recipe.seed, "model")
        self.model, preprocess = self.system.build(self.data.train.labels())
        if saved is not None:
            if saved["experts"] > 1:
                with contextlib.redirect_stdout(io.StringIO()):
                    self._clone()
            load_weights(self.model, saved["model"], self.system.frozen(self.model))
        self.model.to(self.group.device)
        data = recipe.data
        names = self.system.names
        self.reading = Reading(
            names, preprocess, self.group, data.workers, recipe.precision, progress
        )

    def _gather_model(self) -> None:
        """Give every process a whole model again, from the parts that FSDP left in each."""
        state = {
            "model": full_state(self.model, keep=True),
            "experts": self.system.experts(self.model),
        }
        self._build(state, self.reading.progress)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
