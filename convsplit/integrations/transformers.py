"""Transformers: `save_pretrained` and `from_pretrained` of split models, in the library's own folders.

Weights that are stored in another way than a class builds them are what transformers has quantisers for, and lets
others register some: a converted model says in its config that its weights are stored split, `from_pretrained` finds
the quantiser of this file, which splits the layers of the new model as the files hold them, and loads as ever. So do
checkpoints of its Trainer. Where this file is not imported (`import convsplit.integrations.transformers`; converting
does), loading stops at a tensor of no elements under the name of a kernel, instead of giving layers random numbers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from convsplit.finetune import parameter_groups
from convsplit.integrations.folders import METHOD, guard, is_split, make_plain, shapes_in, split_as_in

ROOT = PreTrainedModel


@register_quantization_config(METHOD)
class SplitConfig(QuantizationConfigMixin):
    """What a config says of a split model: that it is one. How, its weight files tell."""

    def __init__(self, quant_method: str = METHOD, **_: Any) -> None:
        super().__init__(quant_method=quant_method)


@register_quantizer(METHOD)
class SplitLoader(HfQuantizer):
    """Has `from_pretrained` load a split model, and `save_pretrained` write one."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        shapes = shapes_in(checkpoint_files or ())
        split_as_in(model, shapes)
        guards = {name.replace(".", r"\.") for name, tensor in shapes.items() if not tensor.numel()}
        known = model._keys_to_ignore_on_load_unexpected  # None or a list in transformers 5.0, a set in later ones
        kind = set if isinstance(known, set) else list
        model._keys_to_ignore_on_load_unexpected = kind([*(known or ()), *guards])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        model.is_quantized = False  # it may be cast and trained like any other
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        return {**model.state_dict(), **guard(model)}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def settle(converted: PreTrainedModel) -> None:
    """Have a split model saved as one; called for every model that was converted, and every one that was merged."""
    if is_split(converted):
        converted.config.quantization_config = SplitConfig()
        converted.hf_quantizer = SplitLoader(converted.config.quantization_config)
        # Names go to files as they are: some classes are saved under names of old, which have no place for stages.
        converted._weight_conversions = []
    elif isinstance(getattr(converted, "hf_quantizer", None), SplitLoader):
        del converted.hf_quantizer, converted.config.quantization_config
        vars(converted).pop("_weight_conversions", None)
        with torch.device("meta"):
            built = type(converted)(copy.deepcopy(converted.config))
        make_plain(converted, built, _pictures_for(converted))


def _pictures_for(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Noise of the size that a model of pictures was made for; None for other models."""
    if model.main_input_name != "pixel_values" or model.device.type == "meta":
        return None
    channels, size = getattr(model.config, "num_channels", 3), getattr(model.config, "image_size", 224)
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    noise = torch.rand(1, channels, *sides, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": noise.to(model.device, model.dtype)}


def optimizer_of(converted: PreTrainedModel, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW with the learning rate and the weight decay of a Trainer's arguments, which does not decay factors.

    The Trainer's own optimiser decays every weight that is no bias and no norm; of factors that lowers the rank (see
    `convsplit.finetune.parameter_groups`). Give this one as `Trainer(..., optimizers=(optimizer, None))`.

    >>> import tempfile
    >>> from transformers import ResNetConfig, ResNetModel
    >>> model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    >>> arguments = TrainingArguments(tempfile.mkdtemp(), weight_decay=0.1, use_cpu=True)
    >>> optimizer = optimizer_of(convsplit.convert(model, forms="dw-pw", rank=1), arguments)
    >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    [('factors', 0.0), ('weights', 0.1), ('undecayed', 0.0)]
    """
    groups = parameter_groups(converted, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    return torch.optim.AdamW(groups, betas=(arguments.adam_beta1, arguments.adam_beta2), eps=arguments.adam_epsilon)
