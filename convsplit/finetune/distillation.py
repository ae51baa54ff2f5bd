"""Distillation: the converted model trained end to end with the original as its teacher, without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from convsplit.data.batches import batches_of, length_of
from convsplit.data.processes import all_reduced, is_shared
from convsplit.files import write_whole
from convsplit.finetune.blocks import find_modules
from convsplit.finetune.groups import parameter_groups
from convsplit.finetune.reconstruction import schedule
from convsplit.layers.separable import SeparableConv
from convsplit.model.copies import scratch_copy, working_copy
from convsplit.model.guards import RandomState, plain_arithmetic, same_globals
from convsplit.model.hooks import Given, hooked
from convsplit.model.layout import channels_last, channels_last_weights
from convsplit.model.pairs import check_order
from convsplit.model.running import Batch, Forward, batches_in, call, is_random, quiet_run, run_or_explain
from convsplit.model.values import class_scores, count_inputs, is_empty, tensors_in
from convsplit.precision import widened

BATCH = 64  # rows of a batch where all inputs came as one tensor
CHECKS = 20  # of the held-out drift in the course of the training
KEPT_BYTES = 256 << 20  # what the teacher's outputs for the held-out inputs may take up
CLIP = 1.0  # norm of all gradients together
RATE, LARGEST_RATE = 2e-3, 1e-3  # the default learning rate is RATE * drift^2, at most LARGEST_RATE


@dataclass(frozen=True)
class Check:
    """A look at the held-out inputs: after `step` steps and `seconds`, the outputs' loss there and their drift."""

    step: int
    seconds: float
    loss: float
    drift: float


@dataclass(frozen=True)
class Distillation:
    """The course of a distillation. The converted model holds the weights of the best check."""

    checks: tuple[Check, ...]
    lr: float  # the largest learning rate
    mixed_precision: bool  # whether it trained in bfloat16

    @property
    def before(self) -> Check:
        """The held-out inputs before the first step."""
        return self.checks[0]

    @property
    def best(self) -> Check:
        """The same with the weights that were kept: those of the smallest loss."""
        return min(self.checks, key=lambda check: check.loss)


@plain_arithmetic()
def distill(
    converted: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    epochs: int = 10,
    seconds: float | None = None,
    lr: float | None = None,
    weight_decay: float = 1e-4,
    temperature: float = 2.0,
    features: float = 0.0,
    train: str = "all",
    freeze_norms: bool = True,
    mixed_precision: bool | None = None,
    augment: Callable[[Any], Any] | None = None,
    held_out: Any = 0.1,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Distillation:
    """Train `converted`, in place, to answer what `original` answers: no labels needed.

    The loss is the distance of the outputs (for class scores [N, classes] the Kullback-Leibler divergence at a
    temperature, for everything else the relative squared error) plus `features` times that of the outputs of the
    modules around split layers. Adam with a warm-up and a cosine schedule; the weights with the smallest loss on
    held-out inputs are kept, also when the training is interrupted. Copies of the models are run, in eval mode but for
    dropout: of `converted` only weights and, if asked for, statistics of batch norm change.

    Args:
        converted: from `convert`, best repaired by `refit` before; changed in place.
        original: the model it was converted from, which is the teacher; not changed.
        batches: unlabelled inputs: a tensor, or an iterable of what `convert` takes as `calibration`. A `DataLoader`
            is read again in every epoch; a generator is read once and kept.
        forward: how to run a model on what `batches` yields, such as `lambda model, batch: model(batch[0])`.
        criterion: `(output, batch) -> loss`, added to the loss: with labels, for instance
            `lambda output, batch: F.cross_entropy(output, batch[1])`.
        epochs: passes over the inputs.
        seconds: ends sooner, the schedule with it; results then depend on the machine's speed.
        lr: the largest learning rate; by default 0.002 times the squared drift on the held-out inputs, 0.001 at most. A
            repaired model is close already, and larger steps lose what the repair gained.
        weight_decay: of weights that are not factors, see `parameter_groups`.
        temperature: of the softmax, for logits.
        features: weight of the features' relative squared error, for instance 1; 0 leaves it out, which is faster and
            was at least as good (benchmarks/results/finetuning.md).
        train: "all" parameters that require gradients, or those of "split" layers only.
        freeze_norms: batch norm runs on its running statistics and keeps them.
        mixed_precision: train in bfloat16, parameters and checks in float32; by default where the device has
            instructions for it (NVIDIA GPUs from Ampere on; CPUs with AVX512-BF16 or AMX: a step takes a quarter less).
        augment: applied to every batch before both models see it, such as a random flip.
        held_out: a share of the inputs, or batches of their own.
        patience: stop after that many of the 20 checks without a new best.
        checkpoint: a file written at every check, from which the same call resumes. It is read with `weights_only`.
        seed: fixes the order of inputs.
        progress: show a progress bar; by default only on a terminal.

    Under `torch.distributed`, each process gives its own share of inputs; gradients are averaged.

    Raises:
        ValueError: no inputs, an unknown `train`, models that do not run on the inputs, a loss that is not finite.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015 (1503.02531); features as in Romero et
    al., "FitNets", 2014 (1412.6550).

    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()).eval()
    >>> smaller, images = convsplit.convert(model), torch.randn(128, 8, 9, 9)
    >>> course = distill(smaller, model, images, epochs=3)
    >>> course.best.loss < course.before.loss
    True
    """
    if train not in ("all", "split"):
        raise ValueError(f'train={train!r}; want "all" or "split"')
    check_order(converted, original, "distill(converted, original, batches)")
    data = _Inputs.of(batches, held_out)
    teacher = scratch_copy(original)
    with same_globals(), working_copy(converted) as student, _training(student, teacher, train, freeze_norms):
        torch.manual_seed(seed)
        first = data.held_out[0]
        run_or_explain(teacher, first, forward)
        loss = _Loss(student, teacher, first, forward, criterion, temperature, features)
        run = _Run(student, loss, data, lr, weight_decay, epochs, seconds, mixed_precision, augment, seed)
        if checkpoint is not None:
            run.resume(Path(checkpoint))
        try:
            with channels_last_weights(student, teacher), loss.watching(), _bar(progress) as show:
                run.to_the_end(patience, None if checkpoint is None else Path(checkpoint), show)
        finally:
            run.restore_best()
    return Distillation(tuple(run.checks), run.rate, run.mixed_precision)


Show = Callable[[float, Check, Check], None]  # how much is done, the first check and the last


class _Inputs:
    """Training batches, read again or kept, and held-out ones."""

    def __init__(self, source: Iterable[Batch], held_out: list[Batch]) -> None:
        self.source, self.held_out = source, held_out
        kept = list(source) if isinstance(source, Sequence) else []
        plain = bool(kept) and all(isinstance(b, Tensor) and b.shape[1:] == kept[0].shape[1:] for b in kept)
        self.rows = torch.cat(kept) if plain else None
        self.size = len(kept[0]) if plain else 0

    @classmethod
    def of(cls, batches: Any, held_out: Any) -> _Inputs:
        source: Any = list(torch.split(batches, BATCH)) if isinstance(batches, Tensor) else batches_in(batches)
        if isinstance(source, Sequence | Iterator) or length_of(source) is None:
            source = list(batches_of(source))
        if not isinstance(held_out, float | int):
            return cls(source, _held_out(batches_of(held_out)))
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out}: want a share of the inputs between 0 and 1, or batches")
        count = max(1, round(held_out * len(source)))
        if isinstance(source, Sequence):
            if len(source) < 2:
                raise ValueError(
                    f"{len(source)} batches that hold an input: want at least 2, one to train on and one to hold out"
                )
            return cls(source[:-count], list(source[-count:]))
        # A loader may shuffle, so nothing can be kept from the training; without labels that is no great harm.
        return cls(source, _held_out(islice(batches_of(source), count)))

    def __len__(self) -> int:
        if self.rows is not None:
            return math.ceil(len(self.rows) / self.size)
        return len(cast("Sequence[Batch]", self.source))

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """All batches in a new order; rows are mixed where batches are plain tensors."""
        if self.rows is not None:
            order = torch.randperm(len(self.rows), generator=generator, device="cpu")
            for rows in torch.split(order, self.size):
                yield self.rows[rows]
        elif isinstance(self.source, Sequence):
            for index in torch.randperm(len(self.source), generator=generator, device="cpu").tolist():
                yield self.source[index]
        else:
            yield from self.source


def _held_out(batches: Iterable[Batch]) -> list[Batch]:
    kept = list(batches)
    if not kept:
        raise ValueError("no batches hold an input: give some unlabelled inputs to train on, and to hold out")
    return kept


class _Loss:
    """The distance between a student's and a teacher's outputs for a batch."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, example: Batch, forward: Forward | None,
        criterion: Callable[[Any, Any], Tensor] | None, temperature: float, features: float,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.forward, self.criterion = student, teacher, forward or call, criterion
        self.temperature, self.features = temperature, features
        split = {name for name, m in student.named_modules() if isinstance(m, SeparableConv)}
        self.watched = list(find_modules(student, split, [example], forward)) if features else []
        self.seen: dict[int, dict[str, Tensor]] = {id(student): {}, id(teacher): {}}
        self.energies: dict[str, Tensor] = {}
        with torch.no_grad():
            self.random = is_random(teacher, example, forward)  # both models are then given the same random numbers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the features of both models, while inside."""
        with self._noted(self.student), self._noted(self.teacher):
            yield

    @contextmanager
    def _noted(self, model: nn.Module) -> Iterator[None]:
        def note(name: str, given: Given, output: Any) -> None:
            feature = next(tensors_in(output), None)
            if feature is not None:
                self.seen[id(model)][name] = feature

        with hooked({name: model.get_submodule(name) for name in self.watched}, after=note):
            yield

    def __call__(self, batch: Batch) -> Tensor:
        state = RandomState.now() if self.random else None
        with torch.no_grad():
            wanted = self.forward(self.teacher, batch)
        if state is not None:
            state.restore()
        answer = self.forward(self.student, batch)
        loss = self.of_outputs(answer, wanted, batch)
        theirs, own = self.seen[id(self.teacher)], self.seen[id(self.student)]
        if own:
            missed = [F.mse_loss(own[name], theirs[name]) / self.energies[name] for name in own]
            loss = loss + self.features * torch.stack(missed).mean()
        return loss if self.criterion is None else loss + self.criterion(answer, batch)

    @torch.no_grad()
    def measure_energies(self, batch: Batch) -> None:
        """The mean square of each feature, on one batch for all that follow: a pass over memory less in each step."""
        self.forward(self.teacher, batch)
        for name, feature in self.seen[id(self.teacher)].items():
            self.energies[name] = feature.square().mean().clamp_min(1e-12)

    def of_outputs(self, answer: Any, wanted: Any, batch: Batch) -> Tensor:
        """The distance of outputs of any nesting."""
        pairs = _floating_pairs(answer, wanted)
        if not pairs:
            raise ValueError("the models' outputs hold no floating-point tensor to learn from")
        scores = class_scores(wanted, count_inputs(batch))
        return torch.stack([self._of_one(widened(a), widened(w), w is scores) for a, w in pairs]).sum()

    def _of_one(self, answer: Tensor, wanted: Tensor, scores: bool) -> Tensor:
        finite = wanted.isfinite()
        if not bool(finite.all()):  # masked scores: nothing is to be learnt there
            return relative(answer[finite], wanted[finite])
        if not scores:
            return relative(answer, wanted)
        T = self.temperature
        student, teacher = F.log_softmax(answer / T, 1), F.log_softmax(wanted / T, 1)
        return T * T * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _floating_pairs(answer: Any, wanted: Any) -> list[tuple[Tensor, Tensor]]:
    """What can be compared of two outputs of the same nesting.

    Raises:
        ValueError: the models answer with another number of tensors, or with other shapes.
    """
    own, theirs = list(tensors_in(answer)), list(tensors_in(wanted))
    if [a.shape for a in own] != [w.shape for w in theirs]:
        raise ValueError(
            f"converted answers with shapes {[tuple(a.shape) for a in own]}, original with "
            f"{[tuple(w.shape) for w in theirs]}, both in eval mode: there is nothing to learn from"
        )
    return [(a, w) for a, w in zip(own, theirs, strict=True) if w.is_floating_point()]


def relative(answer: Tensor, wanted: Tensor) -> Tensor:
    """Squared error relative to the energy of what is wanted."""
    return (answer - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)


class _Run:
    """A training under way: what has to be stored for resuming it."""

    def __init__(
        self, model: nn.Module, loss: _Loss, data: _Inputs, lr: float | None, weight_decay: float, epochs: int,
        seconds: float | None, mixed_precision: bool | None, augment: Callable[[Any], Any] | None, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.data, self.augment = model, loss, data, augment
        self.device = next(model.parameters()).device
        self.mixed_precision = has_bfloat16(self.device) if mixed_precision is None else mixed_precision
        self.may_widen = mixed_precision is None
        groups = parameter_groups(model, weight_decay=weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type in ("cpu", "cuda"))
        self.lr = lr
        self.steps, self.seconds = max(1, epochs * len(data)), seconds
        self.epochs, self.seed = epochs, seed
        self.step, self.spent = 0, 0.0
        self.checks: list[Check] = []
        self.best: dict[str, Tensor] = {}
        self.answers: dict[int, Any] = {}

    @property
    def share(self) -> float:
        """How much of the training is done."""
        by_time = 0.0 if self.seconds is None else self.spent / self.seconds
        return max(self.step / self.steps, by_time)

    @property
    def rate(self) -> float:
        """The largest learning rate, known from the first check on."""
        return min(RATE * self.checks[0].drift ** 2, LARGEST_RATE) if self.lr is None else self.lr

    def to_the_end(self, patience: int | None, checkpoint: Path | None, show: Show) -> None:
        """Train and look at the held-out inputs now and then."""
        self.loss.measure_energies(self.data.held_out[0])
        if not self.checks:
            self.check()
        since = time.perf_counter() - self.spent
        for epoch in range(self.step // len(self.data), self.epochs):
            generator = torch.Generator().manual_seed(self.seed + epoch)
            for index, batch in enumerate(self.data.epoch(generator)):
                if index < self.step - epoch * len(self.data):  # resumed within an epoch
                    continue
                if is_empty(batch):
                    self.step += 1
                    continue
                self.advance(channels_last(batch if self.augment is None else self.augment(batch)))
                self.spent = _slowest(time.perf_counter() - since)
                if self.share >= len(self.checks) / CHECKS or self.share >= 1:
                    self.check()
                    show(self.share, self.checks[0], self.checks[-1])
                    if checkpoint is not None:
                        self.store(checkpoint)
                    if self.share >= 1 or self.exhausted(patience):
                        return
        if self.checks[-1].step < self.step:  # a loader may hold fewer batches than it says
            self.check()

    def exhausted(self, patience: int | None) -> bool:
        losses = [check.loss for check in self.checks]
        return patience is not None and len(losses) - 1 - losses.index(min(losses)) >= patience

    def advance(self, batch: Batch) -> None:
        """One step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * schedule(min(self.share, 1.0))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            gradients = self.gradients(batch, parameters)
        except (RuntimeError, TypeError):  # some models mix dtypes by hand, which only float32 forgives
            if not (self.mixed_precision and self.may_widen):
                raise
            self.mixed_precision = False
            gradients = self.gradients(batch, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else _averaged(gradient)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        self.step += 1

    def gradients(self, batch: Batch, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """Those of the loss on one batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision):
            loss = self.loss(batch)
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} after {self.step} steps: lower lr= or look at the inputs")
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    def check(self) -> None:
        """Measure loss and drift on the held-out inputs; keep the weights if the loss is the smallest yet."""
        with quiet_run(self.model):
            missed, energy, total, count = all_reduced(self.differences()).tolist()
        drift = math.sqrt(missed / max(energy, 1e-30))
        self.checks.append(Check(self.step, self.spent, total / count, drift))
        if total / count <= min(check.loss for check in self.checks):
            self.best = {key: value.clone() for key, value in self.model.state_dict().items()}

    def differences(self) -> Tensor:
        """Sums over the held-out inputs: squared differences, squares, losses; and the number of batches."""
        sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        for index, batch in enumerate(map(channels_last, self.data.held_out)):
            state = RandomState.now()
            wanted = self.taught(index, batch)
            state.restore()
            answer = self.loss.forward(self.model, batch)
            loss = self.loss.of_outputs(answer, wanted, batch)
            if self.loss.criterion is not None:
                loss = loss + self.loss.criterion(answer, batch)
            sums[2:] += torch.tensor([float(loss), 1.0], device="cpu")
            for a, w in _floating_pairs(answer, wanted):
                sums[:2] += torch.tensor([float((a - w).square().sum()), float(w.square().sum())], device="cpu")
        return sums

    def taught(self, index: int, batch: Batch) -> Any:
        """The teacher's output for a held-out batch, kept from the first check on unless it is large."""
        if index in self.answers:
            return self.answers[index]
        answer = self.loss.forward(self.loss.teacher, batch)
        size = sum(t.numel() * t.element_size() for t in tensors_in(answer))
        if not self.loss.random and size * len(self.data.held_out) < KEPT_BYTES:
            self.answers[index] = answer
        return answer

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best weights back, into the same tensors."""
        for key, value in self.model.state_dict().items():
            if key in self.best:
                value.copy_(self.best[key])

    def store(self, path: Path) -> None:
        """Write all there is to a file, as a whole."""
        state = {
            "model": self.model.state_dict(), "best": self.best, "optimizer": self.optimizer.state_dict(),
            "step": self.step, "spent": self.spent, "checks": [tuple(vars(c).values()) for c in self.checks],
        }  # fmt: skip
        if not is_shared() or distributed.get_rank() == 0:
            write_whole(path, lambda temporary: torch.save(state, temporary))

    def resume(self, path: Path) -> None:
        """Go on from a file, if there is one."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a checkpoint of this training: {str(error).splitlines()[0]}") from error
        self.best, self.step, self.spent = state["best"], int(state["step"]), float(state["spent"])
        self.checks = [Check(*check) for check in state["checks"]]


@contextmanager
def _training(student: nn.Module, teacher: nn.Module, train: str, freeze_norms: bool) -> Iterator[None]:
    """Modes and gradient flags as the training wants them; as before afterwards.

    The student stays in eval mode, in which both models answer alike (heads of detectors want targets in train mode,
    others answer more), but for dropout and, if they are to follow, batch norms.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in (*student.parameters(), *teacher.parameters())]
    try:
        teacher.eval()
        student.eval()
        teacher.requires_grad_(False)
        for module in student.modules():
            if _drops(module) or (isinstance(module, _BatchNorm) and not freeze_norms):
                module.training = True
        if train == "split":
            split = (layer for layer in student.modules() if isinstance(layer, SeparableConv))
            own = {id(parameter) for layer in split for parameter in layer.parameters()}
            for parameter in student.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _drops(module: nn.Module) -> bool:
    """Whether a module leaves out parts at random in training: torch's dropouts, and those of blocks and paths."""
    return isinstance(module, _DropoutNd) or type(module).__name__ in ("DropPath", "StochasticDepth", "DropBlock2d")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, so that it is faster there and not only smaller."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12 cannot say
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _averaged(gradient: Tensor) -> Tensor:
    return all_reduced(gradient) / distributed.get_world_size() if is_shared() else gradient


def _slowest(seconds: float) -> float:
    """The time that counts: the same in all processes, so that they end together."""
    return float(all_reduced(torch.tensor(seconds, device="cpu"), "MAX")) if is_shared() else seconds


@contextmanager
def _bar(progress: bool | None) -> Iterator[Show]:
    """A progress bar that shows loss and drift on the held-out inputs."""
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    with Progress(
        TextColumn("Distilling"), BarColumn(), TextColumn("{task.fields[course]}"), TimeRemainingColumn(),
        console=console, transient=True, disable=not shown,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=1.0, course="")

        def show(share: float, first: Check, last: Check) -> None:
            course = f"loss {first.loss:.3g} -> {last.loss:.3g}, drift {first.drift:.3g} -> {last.drift:.3g}"
            bar.update(task, completed=min(share, 1.0), course=course)

        yield show
