"""Batches: an iterable of what a model is called with, read and checked once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from convsplit.data.processes import reduced_numbers
from convsplit.model.running import Batch, batches_in
from convsplit.model.values import IMAGE_DIMENSIONS, count_inputs, is_empty, main_tensor, tensors_in
from convsplit.progress import warn

MOST_INPUTS = 10_000  # read of an iterable that does not tell its length, and may have no end


def length_of(batches: Iterable[Any]) -> int | None:
    """How many batches there are; None where that is not told (a loader may have `__len__` and not know either)."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def batches_of(batches: Any) -> Iterator[Batch]:
    """The batches one by one, empty ones left out; no more than `MOST_INPUTS` inputs where there may be no end.

    Warns:
        ConversionWarning: an iterable that does not tell its length was not read to its end.
    """
    source = batches_in(batches)
    endless, read = length_of(source) is None, 0
    for batch in source:
        if endless and read >= MOST_INPUTS:
            warn(
                f"read {read} inputs of an iterable that does not tell its length, and stopped there: give a list, or "
                "something that has a length, to use more"
            )
            return
        if not is_empty(batch):
            read += count_inputs(batch)
            yield batch


class Checked(list[Batch]):
    """Batches that were read and checked before."""


def checked_batches(batches: Any) -> Checked:
    """All batches, read once, empty ones left out, no NaN in any. Infinite values may be masks, and are let through.

    Raises:
        ValueError: no batches, batches without any input, or one that holds NaN (says which).

    Warns:
        ConversionWarning: all inputs are equal numbers throughout, and so carry nothing; or more than could be read.
    """
    if isinstance(batches, Checked):
        return batches
    data = list(batches_of(batches))
    counts = reduced_numbers(len(data), -len(data), operation="MAX")
    if counts[0] and not counts[1]:
        raise ValueError("one of the processes has no batches: deal them out so that each has some")
    if counts[0] != -counts[1]:
        span = f"from {-counts[1]:.0f} to {counts[0]:.0f} batches"
        warn(f"processes have {span}: each position counts the same, whoever has it")
    if not data:
        held = "no batches" if not length_of(batches_in(batches)) else "the batches are empty, none holds an input"
        raise ValueError(f"{held}: give some unlabelled inputs to calibrate on")
    for index, batch in enumerate(data):
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors_in(batch)):
            raise ValueError(f"batch {index} holds NaN: leave it out")
    if all(_is_constant(batch) for batch in data):
        warn(
            "the calibration inputs have no variance (images of one colour?): they tell nothing about what layers see"
        )
    return Checked(
        data if torch.is_inference_mode_enabled() else (tree_map(_outside_inference, each) for each in data)
    )


def _is_constant(batch: Batch) -> bool:
    """Whether the images of a batch are one number each channel throughout; one of a single pixel cannot be told."""
    images = main_tensor(batch)
    if images is None or images.dim() < 3 or not images.is_floating_point() or images.shape[-2:].numel() == 1:
        return False
    return bool((images.amax((-2, -1)) == images.amin((-2, -1))).all())


def _outside_inference(value: Any) -> Any:
    """Tensors made in inference mode cannot be part of a graph outside of it, their copies can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def hold_out(batches: Checked, share: float) -> tuple[Checked, Checked]:
    """Inputs to work with and a share of them, evenly spread, to measure on afterwards.

    Single inputs are held out where all tensors of a batch have one row for each, whole batches otherwise.

    Raises:
        ValueError: a share outside (0, 1), or too few inputs to have some on both sides.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out={share!r}: want a share of the inputs between 0 and 1, or batches")
    if all(map(_has_rows, batches)):
        kept, held = Checked(), Checked()
        seen = 0
        for batch in batches:
            count = count_inputs(batch)
            out = torch.tensor([_is_held_out(seen + row, share) for row in range(count)], device="cpu")
            seen += count
            for rows, side in ((~out, kept), (out, held)):
                if rows.any():
                    side.append(tree_map(partial(_rows_of, rows), batch))
    else:
        kept = Checked(batch for index, batch in enumerate(batches) if not _is_held_out(index, share))
        held = Checked(batch for index, batch in enumerate(batches) if _is_held_out(index, share))
    if not kept or not held:
        raise ValueError(f"held_out={share:g} leaves nothing to work with or to measure on: give more inputs")
    return kept, held


def _is_held_out(index: int, share: float) -> bool:
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


def _has_rows(batch: Batch) -> bool:
    """Whether all tensors of a batch have one row for each input, for sure (three axes may be an image by itself)."""
    main = main_tensor(batch)
    rows = {t.shape[0] for t in tensors_in(batch) if t.dim()}
    return main is not None and main.dim() >= IMAGE_DIMENSIONS and rows == {main.shape[0]}


def _rows_of(rows: Tensor, value: Any) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() else value
