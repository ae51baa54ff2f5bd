"""Diffusers: `save_pretrained` and `from_pretrained` of split models and of pipelines that hold them.

As for transformers (see there), a split model says in its config that its weights are stored in a way of their own, and
the library's own loader finds the quantiser of this file. Where this file is not imported
(`import convsplit.integrations.diffusers`), `from_pretrained` says "Unknown quantization type, got convsplit".
"""

from __future__ import annotations

from enum import Enum
from typing import Any, cast

import torch
from diffusers import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor

from convsplit.integrations.folders import METHOD, is_split, make_plain, shapes_in, split_as_in
from convsplit.layers.stages import ChannelIndex

ROOT = ModelMixin


class Method(str, Enum):
    """The name under which the library looks the two classes below up."""

    SPLIT = METHOD


class SplitConfig(QuantizationConfigMixin):
    """What a config says of a split model: that it is one. How, its weight files tell."""

    def __init__(self, quant_method: str = METHOD, **_: Any) -> None:
        self.quant_method = Method(quant_method)

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        return {"quant_method": self.quant_method.value}

    to_diff_dict = to_dict  # what printing it asks for


class SplitLoader(DiffusersQuantizer):
    """Has `from_pretrained` load a split model."""

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str] | None) -> list[str]:
        self._shapes = shapes_in(checkpoint_files or ())
        return loaded_keys

    def _process_model_before_weight_loading(self, model: ModelMixin, **_: Any) -> None:
        split_as_in(model, self._shapes)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, *_: Any, **__: Any
    ) -> bool:
        """Whether these are the channels of a layer, which are neither parameter nor buffer: see `ChannelIndex`."""
        owner = model.get_submodule(param_name.rpartition(".")[0])
        return param_name.endswith(".channels") and isinstance(owner, ChannelIndex)

    def create_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, target_device: torch.device, *_: Any, **__: Any
    ) -> None:
        """Put the channels of a layer in their place."""
        owner = cast(ChannelIndex, model.get_submodule(param_name.rpartition(".")[0]))
        owner.channels = param_value.to(target_device)

    def _process_model_after_weight_loading(self, model: ModelMixin, **_: Any) -> None:
        model.is_quantized = False  # it may be cast and trained like any other
        del self._shapes

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SplitConfig
AUTO_QUANTIZER_MAPPING[METHOD] = SplitLoader


def settle(converted: Any) -> None:
    """Have a split model saved as one; called for every model that was converted, and every one that was merged."""
    config = dict(converted._internal_dict)
    said: Any = config.get("quantization_config") or {}
    if is_split(converted):
        config["quantization_config"] = SplitConfig()
    elif (said if isinstance(said, dict) else vars(said)).get("quant_method") == METHOD:
        del config["quantization_config"]
        vars(converted).pop("hf_quantizer", None)
        with torch.device("meta"):
            built = type(converted).from_config(config)
        make_plain(converted, built)
    converted._internal_dict = type(converted._internal_dict)(config)
