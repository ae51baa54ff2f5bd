"""segmentation_models_pytorch: its `save_pretrained` writes split models as they are; `from_pretrained` reads them.

It stores the arguments that build a model, and the weights. Importing this file makes it look into the weights before
it loads them, and split the new model as they are. Converting such a model imports it; in a process of its own say
`import convsplit.integrations.segmentation_models_pytorch`, or loading stops and names the missing weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from segmentation_models_pytorch.base.hub_mixin import SMPHubMixin
from torch import nn

from convsplit.integrations.folders import is_split, make_plain, shapes_in, split_as_in
from convsplit.model.guards import same_globals

ROOT = SMPHubMixin

_load = SMPHubMixin._load_as_safetensor.__func__


def _load_split(cls: type[SMPHubMixin], model: nn.Module, model_file: str, *args: Any, **options: Any) -> nn.Module:
    split_as_in(model, shapes_in([model_file]))
    return cast(nn.Module, _load(cls, model, model_file, *args, **options))


@same_globals()
def settle(converted: Any) -> None:
    """Have a merged model hold what its class builds; of split ones, that this file is imported is all it takes."""
    if is_split(converted):
        return
    arguments = {key: value for key, value in converted.config.items() if not key.startswith("_")}
    built = type(converted)(**{**arguments, "encoder_weights": None})
    noise = torch.rand(1, arguments.get("in_channels", 3), 64, 64, generator=torch.Generator().manual_seed(0))
    first = next(converted.parameters())
    make_plain(converted, built, None if first.is_meta else noise.to(first))


if not hasattr(_load, "__wrapped__"):
    _load_split.__wrapped__ = _load  # type: ignore[attr-defined]
    cast(Any, SMPHubMixin)._load_as_safetensor = classmethod(_load_split)
