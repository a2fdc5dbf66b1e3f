"""The training loop: batches in, a better model out, resumable at any step with identical weights.

It is told what is learnt from which rows (a `Task`); it knows no network, no data format and no metric.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.atomic import sweep
from steelyard.checkpoint import manifest
from steelyard.data.loader import Loader
from steelyard.data.packing import bins, stacks
from steelyard.errors import TrainingError
from steelyard.kernels.training import accumulate_
from steelyard.runs import Run
from steelyard.train import optimizers, schedules, state
from steelyard.train.averages import Averages
from steelyard.train.config import TrainConfig
from steelyard.train.task import Task

Rounding = Callable[[str, torch.Tensor], torch.Tensor]
BEST_BY = "validation_loss"
ALARM = 2.0
"""A loss above so many times its mean, and so many nats more, is far above it."""
PATIENT_STEPS = 5
"""How many such steps in a row are a divergence."""
LEAST_SCALE = 1 / 8
"""Of the learning rate, at which a run is not rolled back once more."""


class Diverged(Exception):
    """A run goes wrong, from `step` on; whether that ends it is the trainer's to say."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run is."""

    step: int
    steps: int
    epoch: int
    loss: float
    """Mean over the step's trained tokens, in nats."""
    tokens: int
    """Of the step's rows, trained or not."""
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    """All tokens of the rows, trained or not; a mean since the start or the resumption."""
    seconds_left: float


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """What a trained checkpoint says of its origin."""

    parent: str | None
    data: dict[str, str]


class Trainer:
    """One run.

    Args:
        task: what is learnt, from which rows.
        config: how.
        run: the run's folder.
        lineage: for the manifests.
        rounding: what becomes of a master on its way into the forward pass, by its name.
    """

    def __init__(
        self, task: Task, config: TrainConfig, run: Run, lineage: Lineage, rounding: Rounding | None = None
    ) -> None:
        self._rounding = rounding
        self.task, self.config, self.run, self.lineage = task, config, run, lineage
        self.loader = Loader(task.rows, config.batch_size, config.seed)
        self.steps = config.epochs * self.loader.batches_per_epoch
        self.step, self.best, self.stopping = 0, math.inf, False
        self.parameters = {name: tensor.requires_grad_(True) for name, tensor in task.parameters.items()}
        self.masters = {name: tensor.detach().float().clone() for name, tensor in self.parameters.items()}
        self._left = {
            name: master != 0 for name, master in self.masters.items() if config.keep_zeros and master.dim() > 1
        }
        """What is learnt of a pruned network, where that is not all."""
        self.optimizer = optimizers.build(self.masters, config.optimizer)
        self.averages = Averages(self.masters, self.optimizer, config.ema)
        self._worse = 0
        """Evaluations since the best one."""
        self.scale = 1.0
        """Of the learning rate: halved whenever the run was rolled back."""
        self._usual: float | None = None
        """A running mean of the loss."""
        self._high = 0
        """Steps in a row whose loss was far above it."""
        self._seconds, self._tokens = 0.0, 0
        self.first = 0  # steps that were done before this call

    def fit(self, report: Callable[[Progress], None] = lambda progress: None) -> bool:
        """Train to the end, or until `stopping` is set; True at the end.

        Raises:
            TrainingError: loss or gradient are no longer finite, or the base or the data changed since the run began.
        """
        with _deterministic(self.config.seed):
            self._resume()
            while not self.finished and not self.stopping:
                started = time.perf_counter()
                batch = self.loader.next()
                try:
                    loss, norm = self.gradient(batch), self.clip()
                    self._demand_steady(loss)
                except Diverged as error:
                    self._roll_back(error)
                    continue
                rate = self._set_learning_rate()
                self.optimizer.step()
                self._keep_zeros()
                self.step += 1
                self.averages.update(self.step)
                self.publish()
                self._record(batch, loss, norm, rate, time.perf_counter() - started, report)
                if self._due(self.config.evaluate_every or self.loader.batches_per_epoch):
                    self._evaluate()
                if self._due(self.config.checkpoint_every) and not self._high:  # a good one to go back to
                    self._save_state()
            if self.step < self.steps:
                self._save_state()
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or so many evaluations were no better that the run ends early."""
        return self.step == self.steps or 0 < self.config.patience <= self._worse

    def gradient(self, batch: Sequence[int]) -> float:
        """Gradient of the mean loss over the targets of a batch's rows, into the masters; returns that loss.

        Forward passes take `micro_batch_tokens` at most; their sums are added in float32, so that how a batch is cut
        changes nothing but rounding.
        """
        targets, total = self.task.targets(batch), 0.0
        grouped = partial(stacks, whole=self.task.whole) if self.task.padded else bins
        for group in grouped([self.task.size(row) for row in batch], self.config.micro_batch_tokens):
            loss = self.task.loss([batch[place] for place in group]) / targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    master = self.masters[name]
                    if master.grad is None:
                        master.grad = parameter.grad.float()
                    else:
                        accumulate_(master.grad, parameter.grad)
                    parameter.grad = None
        for name, left in self._left.items():
            if (gradient := self.masters[name].grad) is not None:
                gradient.mul_(left)
        self._demand_finite("loss", total)
        return total

    def clip(self) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters.values(), self.config.clip or math.inf))
        self._demand_finite("norm of the gradient", norm)
        return norm

    def _demand_finite(self, what: str, value: float) -> None:
        """Before a step: what is not finite never reaches the weights, nor a state."""
        if not math.isfinite(value):
            raise Diverged(f"the {what} is {value}", self.step + 1)

    def _demand_steady(self, loss: float) -> None:
        """A loss that stays far above what it was is no noise any more."""
        high = self._usual is not None and loss > ALARM * self._usual + ALARM
        self._high = self._high + 1 if high else 0
        if self._high >= PATIENT_STEPS:
            usual, began = self._usual, self.step + 2 - self._high
            raise Diverged(f"the loss is {loss:.3g} after {usual:.3g}, for {self._high} steps", began)
        if not high:
            self._usual = loss if self._usual is None else 0.9 * self._usual + 0.1 * loss

    def _roll_back(self, error: Diverged) -> None:
        """Go back to the last state before it went wrong, with half of the learning rate.

        Raises:
            TrainingError: there is none, or it was tried often enough.
        """
        advice = "lower optimizer.learning_rate or clip, and rerun with --fresh"
        found = state.load(self.run.folder / "state", before=error.step) if self.scale > LEAST_SCALE else None
        if found is None:
            raise TrainingError(f"{error} at step {error.step}: {advice}")
        for master in self.masters.values():
            master.grad = None
        self._restore(*found)
        self.first = min(self.first, self.step)
        self.scale /= 2
        self.run.log(
            f"{error} at step {error.step}: back to step {self.step}, "
            f"from now on with {self.scale:g} of the learning rate"
        )
        self.run.rewind(self.step)
        self._save_state()

    def _set_learning_rate(self) -> float:
        factor = schedules.factor(self.config.schedule, self.step, self.steps)
        rate = optimizers.rate(self.config.optimizer) * factor * self.scale
        epochs = self.step / self.loader.batches_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
            if group["scale"] == 0 or epochs < group["start"]:  # it does not learn, or not yet
                for master in group["params"]:
                    master.grad = None
        return rate

    @torch.no_grad()
    def _keep_zeros(self) -> None:
        """Without a gradient most optimizers leave a 0 alone; those that mix the weights of a matrix do not."""
        for name, left in self._left.items():
            self.masters[name].mul_(left)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights that the forward pass uses."""
        for name, master in self.masters.items():
            self.parameters[name].copy_(master if self._rounding is None else self._rounding(name, master))
            master.grad = None

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    def _record(
        self,
        batch: Sequence[int],
        loss: float,
        norm: float,
        rate: float,
        seconds: float,
        report: Callable[[Progress], None],
    ) -> None:
        tokens = sum(map(self.task.size, batch))
        self._seconds += seconds
        self._tokens += tokens
        done = self.step - self.first
        progress = Progress(
            step=self.step,
            steps=self.steps,
            epoch=self.loader.epoch,
            loss=loss,
            tokens=tokens,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=self._tokens / self._seconds,
            seconds_left=self._seconds / done * (self.steps - self.step),
        )
        self.run.measure(**{key: value for key, value in msgspec.structs.asdict(progress).items() if key != "steps"})
        report(progress)

    def _evaluate(self) -> None:
        """Measure, keep the last checkpoint, and the best one if this is it."""
        with self.averages.worn() as different:
            if different:
                self.publish()
            found = self._measure()
            if found:
                self.run.measure(step=self.step, **found)
                self.run.log(f"step {self.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
            self.write_checkpoint(self.run.folder / "last", found)
            if self.config.keep_checkpoints:
                self._keep_checkpoint(found)
            score = found.get(BEST_BY, -self.step)  # without validation the last one is the best
            self._worse = 0 if score < self.best else self._worse + 1
            if score <= self.best:
                self.best = score
                self.write_checkpoint(self.run.folder / "best", found)
        if different:
            self.publish()
        if self.finished and self.step < self.steps:
            self.run.log(f"step {self.step}: no better for {self._worse} evaluations: the run ends")

    def _measure(self) -> dict[str, float]:
        self.task.train(False)
        with torch.no_grad():
            found = dict(self.task.evaluate())
        self.task.train(True)
        return found

    def _keep_checkpoint(self, metrics: Mapping[str, float]) -> None:
        folder = self.run.folder / "checkpoints"
        self.write_checkpoint(folder / f"step-{self.step:08d}", metrics)
        for old in sorted(folder.glob("step-*"))[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def write_checkpoint(self, path: Path, metrics: Mapping[str, float]) -> None:
        """Write what was learnt so far, with its lineage."""
        recipe: dict[str, Any] = msgspec.to_builtins(self.config)
        lineage = self.lineage
        with manifest.writing(
            path,
            parent=lineage.parent,
            data=lineage.data,
            recipe={"train": recipe},
            metrics={"step": self.step, **metrics},
        ) as folder:
            self.task.save(folder)

    def _save_state(self) -> None:
        tensors = {f"master.{name}": master for name, master in self.masters.items()}
        tensors |= {f"average.{name}": average for name, average in self.averages.values.items()}
        tensors |= state.flatten(self.optimizer)
        tensors["random"] = torch.get_rng_state()
        best = None if math.isinf(self.best) else self.best
        info = {
            "loader": self.loader.state(),
            "best": best,
            "worse": self._worse,
            "scale": self.scale,
            "usual": self._usual,
            "high": self._high,
            "lineage": self._origin(),
        }
        state.save(self.run.folder / "state", self.step, tensors, info)

    def _resume(self) -> None:
        """Go on from the newest undamaged state, if there is one."""
        sweep(self.run.folder)
        found = state.load(self.run.folder / "state")
        if found is not None:
            self._restore(*found)
            self.run.log(f"resumed at step {self.step} of {self.steps}")
        elif self._rounding is not None:
            self.publish()
        self.run.rewind(self.step)
        self.first = self.step
        self.task.train(True)

    def _restore(self, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        if info["lineage"] != self._origin():
            raise TrainingError(
                f"the base model or the data changed since the run in '{self.run.folder}' began: "
                "put them back, or --fresh to start over"
            )
        if int(info["step"]) > self.steps:
            raise TrainingError(
                f"the run in '{self.run.folder}' has done more steps than these rows give: another version read them "
                "otherwise; --fresh starts over"
            )
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master.{name}"])
        for name, average in self.averages.values.items():
            average.copy_(tensors[f"average.{name}"])
        state.restore(self.optimizer, tensors.items())
        torch.set_rng_state(tensors["random"])
        self.loader.restore(info["loader"])
        self.scale, self._usual, self._high = float(info.get("scale", 1)), info.get("usual"), int(info.get("high", 0))
        self._worse = int(info.get("worse", 0))
        self.step, self.best = int(info["step"]), math.inf if info["best"] is None else float(info["best"])
        self.publish()

    def _origin(self) -> dict[str, Any]:
        return {"parent": self.lineage.parent, "data": self.lineage.data}


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """The same run gives the same weights: seeded, and no operator whose order of sums is left to chance."""
    switches: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filled
