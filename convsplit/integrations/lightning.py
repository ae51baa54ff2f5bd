"""Lightning: a callback that converts before a fit, and checkpoints that come back split.

Importing this file makes a `LightningModule` that loads a state_dict of a split model take its structure first, so that
`load_from_checkpoint` and `fit(ckpt_path=...)` work; where it is not imported, loading names the keys without a place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from convsplit.checkpoints.names import STAGES
from convsplit.choose.plan import Plan
from convsplit.integrations.folders import is_split, split_as_in
from convsplit.studies import Study

ROOT = LightningModule


class ConvertBeforeFit(Callback):
    """Converts a part of a `LightningModule` when `fit` begins, before its optimisers are made.

    Args:
        part: the attribute that holds the network.
        example_inputs: as for `convsplit.convert`.
        choice: which of `budget`, `rank`, `exact`, `prefer` and `stopwatch`; half the parameters by default.
        **options: as for `convsplit.study`, such as `calibration` and `forms`.

    A part that is split already stays as it is; where `fit` is given a checkpoint, its structure replaces what was
    converted (with `trainer.ckpt_path = ...` set before, nothing is converted in the first place). `plan` says what
    became of every convolution; checkpoints hold it beside the weights.

    >>> from torch import nn
    >>> callback = ConvertBeforeFit("network", choice={"budget": convsplit.Budget(params=0.4)}, forms="dw-pw")
    >>> callback.plan is None
    True
    """

    def __init__(
        self, part: str = "model", example_inputs: Any = None, *, choice: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.part, self.example_inputs, self.choice, self.options = part, example_inputs, dict(choice or {}), options
        self.plan: Plan | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert, where there is something to do."""
        network = getattr(pl_module, self.part)
        if stage != "fit" or is_split(network) or trainer.ckpt_path is not None:
            return
        known: Study[Any] = Study(network, self.example_inputs, **self.options)
        self.plan = known.plan(**self.choice)
        setattr(pl_module, self.part, known.apply(self.plan))

    def state_dict(self) -> dict[str, Any]:
        """The plan, as JSON."""
        return {} if self.plan is None else {"plan": self.plan.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the plan of a checkpoint."""
        if "plan" in state_dict:
            self.plan = Plan.from_json(state_dict["plan"])


def settle(converted: LightningModule) -> None:
    """Nothing: that this file is imported is all it takes."""


def _with_structure(load: Any) -> Any:
    @functools.wraps(load)
    def loads(self: LightningModule, state_dict: Mapping[str, Tensor], *args: Any, **options: Any) -> Any:
        if any(key.endswith(STAGES) for key in state_dict):
            split_as_in(self, state_dict)
        return load(self, state_dict, *args, **options)

    return loads


if "load_state_dict" not in vars(LightningModule):
    cast(Any, LightningModule).load_state_dict = _with_structure(LightningModule.load_state_dict)
