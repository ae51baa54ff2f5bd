"""Block reconstruction: the step between `refit` and `distill`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.data.batches import checked_batches
from convsplit.data.processes import is_over
from convsplit.finetune.blocks import Block, walk_blocks
from convsplit.model.copies import scratch_copy, working_copy
from convsplit.model.guards import plain_arithmetic
from convsplit.model.pairs import check_order
from convsplit.model.running import Forward, is_random, quiet_run, warn_of_noise
from convsplit.precision import widened, widened_weights
from convsplit.progress import track, warn

BATCH = 64  # images per step
WARM_UP = 0.1  # of the steps


@dataclass(frozen=True)
class Reconstructed:
    """One block: relative squared errors of its output on the data, before and after."""

    name: str
    before: float
    after: float


@plain_arithmetic()
def reconstruct(
    converted: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    steps: int = 300,
    lr: float = 2e-3,
    seconds: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Reconstructed, ...]:
    """Train the split layers of `converted`, in place and block by block, to match `original`'s blocks.

    Blocks are taken in the order of execution: on the features that reach a block in the already reconstructed model,
    its split layers take `steps` gradient steps (Adam, cosine schedule) towards the original block's output on the
    original's own features. No labels, and no gradients beyond one block: a few seconds each. Nothing but the split
    layers changes, batch norm runs on its running statistics, and a block that came out worse is restored.

    Args:
        converted: from `convert`, best repaired by `refit` before; changed in place.
        original: the model it was converted from; not changed.
        batches: a few hundred unlabelled inputs, as for `refit`.
        forward: how to run a model on what `batches` yields.
        steps: gradient steps for each block.
        lr: the largest learning rate.
        seconds: begin with no further block after so long; a warning says how many blocks were reached.
        seed: fixes the order of images.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        ValueError: no batches, NaN in one, values that are not finite inside the model, or fewer than one step.

    Copies of the models are run: of `converted` only weights change. Weights in half precision are trained in float32.
    A model that draws random numbers in eval mode is left as it is, with a warning.

    Source: Li et al., "BRECQ", 2021 (2102.05426), which does this for quantisation.

    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    >>> smaller, images = convsplit.convert(model), torch.randn(64, 8, 9, 9)
    >>> blocks = reconstruct(smaller, model, images, steps=20)
    >>> all(block.after <= block.before for block in blocks)
    True
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: want at least 1")
    check_order(converted, original, "reconstruct(converted, original, batches)")
    began, data = time.monotonic(), checked_batches(batches)
    generator = torch.Generator().manual_seed(seed)
    original = scratch_copy(original)
    with working_copy(converted) as working, quiet_run(working, original):
        if is_random(original, data[0], forward):
            warn_of_noise(original, "reconstructed")
            return ()
        count, blocks = walk_blocks(original, working, data, forward)
        done: list[Reconstructed] = []
        for block in track(blocks, "Reconstructing", total=count, progress=progress):
            if is_over(began, seconds):
                warn(f"reconstruct ended after {seconds:g} s: {len(done)} of {count} blocks, others are as they were")
                break
            done.append(_fit(block, steps, lr, generator))
        return tuple(done)


def _fit(block: Block, steps: int, lr: float, generator: torch.Generator) -> Reconstructed:
    """Gradient steps on one block, in float32 at least: steps are smaller than half precision can tell."""
    parameters = [p for layer in block.layers for p in layer.parameters()]
    flags, stored = [p.requires_grad for p in parameters], [p.dtype for p in parameters]
    with widened_weights(block.modules):
        before, kept = error(block), [p.detach().clone() for p in parameters]
        if not math.isfinite(before):
            raise ValueError(
                f"block {block.name!r} gets or gives NaN or infinite values: leave out inputs that do that"
            )
        after = math.inf
        try:
            _train(block, parameters, steps, lr, generator)
            for p, dtype in zip(parameters, stored, strict=True):
                p.data = p.data.to(dtype).to(p.dtype)  # as it will be kept
            after = error(block)
        finally:  # an interrupted block is put back, those before it stay
            for p, flag, value in zip(parameters, flags, kept, strict=True):
                p.grad = None
                p.requires_grad_(flag)
                if not after < before:
                    p.data.copy_(value)
    return Reconstructed(block.name, before, min(before, after))


@torch.enable_grad()
def _train(block: Block, parameters: list[nn.Parameter], steps: int, lr: float, generator: torch.Generator) -> None:
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=fused)
    for p in parameters:
        p.requires_grad_(True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step / steps)
        x, target = _minibatch(block, generator)
        loss = (widened(block.run(x)) - target).square().mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step()


def schedule(share: float) -> float:
    """The learning rate's factor after a share of the steps: linear warm-up, then a cosine down to zero."""
    if share < WARM_UP:
        return (share + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _minibatch(block: Block, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images: from all batches where they are of one size, from one batch otherwise."""
    axes, dimensions = block.layers[0].axes, block.inputs[0].dim()
    batched = dimensions == axes + 2 if axes else dimensions > 1
    if batched and len({x.shape[1:] for x in block.inputs}) == 1:
        sizes = [len(x) for x in block.inputs]
        chosen = torch.randint(sum(sizes), (min(BATCH, sum(sizes)),), generator=generator, device="cpu")
        return _rows(block.inputs, sizes, chosen), _rows(block.targets, sizes, chosen)
    which = int(torch.randint(len(block.inputs), (), generator=generator, device="cpu"))
    return block.inputs[which], block.targets[which]


def _rows(batches: Sequence[Tensor], sizes: Sequence[int], chosen: Tensor) -> Tensor:
    batch = torch.bucketize(chosen, torch.tensor(sizes, device="cpu").cumsum(0), right=True)
    starts = torch.tensor([0, *sizes], device="cpu").cumsum(0)
    return torch.stack(
        [batches[b][i] for b, i in zip(batch.tolist(), (chosen - starts[batch]).tolist(), strict=True)]
    )


@torch.no_grad()
def error(block: Block) -> float:
    """Squared error of a block's output relative to the energy of the original's."""
    missed = energy = 0.0
    for x, target in zip(block.inputs, block.targets, strict=True):
        missed += float((widened(block.run(x)) - target).square().sum())
        energy += float(target.square().sum())
    return missed / max(energy, 1e-30)
