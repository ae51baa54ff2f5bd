"""Batch-norm statistics measured anew: the cheapest repair, and on its own seldom the best one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsplit.data.batches import checked_batches
from convsplit.data.processes import all_reduced
from convsplit.model.copies import working_copy
from convsplit.model.guards import plain_arithmetic
from convsplit.model.running import Forward, quiet_run, run_or_explain
from convsplit.progress import track


@plain_arithmetic()
def recalibrate(
    converted: nn.Module, batches: Any, *, forward: Forward | None = None, progress: bool | None = None
) -> None:
    """Replace the running statistics of every batch norm, in place, by their means over some unlabelled inputs.

    On trained networks `refit` keeps more (docs/calibration.md has figures): use it instead, or after fine-tuning.
    Batches should be large enough to tell a variance, 32 images or more. Where several processes share the work, each
    reads its own batches and the means are taken over all of them.

    Raises:
        ValueError: no batches, or NaN or infinite values in one.

    Source: Ioffe and Szegedy, "Batch normalization", 2015 (1502.03167, section 3.1).

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> recalibrate(model, torch.randn(32, 3, 8, 8) + 5)
    >>> bool((model[1].running_mean != 0).all())
    True
    """
    data = checked_batches(batches)
    with working_copy(converted) as working, quiet_run(working):
        norms = [
            module for module in working.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        momenta = [norm.momentum for norm in norms]
        before = [{key: value.clone() for key, value in norm.named_buffers()} for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over batches
                norm.train()
            for batch in track(data, "Batch norm", progress=progress):
                run_or_explain(working, batch, forward)
        except BaseException:  # interrupted or failed half-way: as it was
            for norm, buffers in zip(norms, before, strict=True):
                norm.load_state_dict(buffers, strict=False)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        for norm, buffers in zip(norms, before, strict=True):
            if not int(norm.num_batches_tracked or 0):  # never reached
                norm.load_state_dict(buffers, strict=False)
                continue
            count = all_reduced(torch.ones((), device="cpu"))
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None:
                    statistic.copy_(all_reduced(statistic.clone()) / count.to(statistic))
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(buffers["num_batches_tracked"])
