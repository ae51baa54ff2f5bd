"""Every model of torchvision and one of every timm family, converted at full rank and compared with the original.

    python -m benchmarks zoo                # all
    python -m benchmarks zoo resnet18 ...   # some
    python -m benchmarks zoo --repair       # instead: all up to 45 M parameters with rank 1, repaired on two images

Models are built without pretrained weights, in float64 (RAFT and Swin V2, which cast, in float32; for the repair all),
batch-norm statistics and constant parameters drawn at random so that no layer is an identity or zero. Models above
160 M parameters (in the tests: above 45 M), and those for video, are looked at on the meta device only: every
convolution must have numbers and, where it is left alone, a reason.
"""

from __future__ import annotations

import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import convsplit
from benchmarks.clock import timed
from benchmarks.results import Kind, Sheet
from convsplit.model.graphs import trace
from convsplit.model.guards import same_globals
from convsplit.model.running import call
from convsplit.model.sites import find_sites
from convsplit.tables import Table

LARGEST, LARGEST_IN_TESTS = 160e6, 45e6  # parameters of models that are run
META = "on the meta device"


@dataclass(frozen=True)
class Result:
    """What became of one model. `difference` is relative, the largest over its outputs; None where it was not run."""

    name: str
    sites: int
    split: int
    left: Counter[str] = field(default_factory=Counter)
    difference: float | None = None
    seconds: float = 0.0


def examine(name: str, largest: float = LARGEST) -> Result:
    """Convert one model at full rank and run both, or look at its structure where it is large."""
    with same_globals():
        torch.set_default_dtype(precision(name))  # some models make constants in forward
        return _examine(name, largest)


def _examine(name: str, largest: float) -> Result:
    start = time.perf_counter()
    torch.manual_seed(0)
    empty = _empty(name)
    if not _is_run(empty, largest):
        sites = find_sites(empty, trace(empty))
        left = Counter(_kind(site.reason) for site in sites if META not in site.reason)
        assert all(site.reason and (site.spec is not None or "F.conv2d" in site.reason) for site in sites)
        return Result(name, len(sites), sum(META in s.reason for s in sites), left, None, time.perf_counter() - start)
    model = _awakened(build(name)).eval()
    before = {key: (id(t), t._version, t.sum().item()) for key, t in model.state_dict(keep_vars=True).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convsplit.ConversionWarning)  # some models have no Conv2d at all
        plan = convsplit.make_plan(model, exact=True)
        converted = convsplit.apply_plan(model, plan)
    assert {key: (id(t), t._version, t.sum().item()) for key, t in model.state_dict(keep_vars=True).items()} == before
    left = Counter(_kind(layer.reason) for layer in plan.layers if not layer.split)
    assert all(left)
    difference = _difference(model, converted, name)
    return Result(name, len(plan.layers), len(plan.split), left, difference, time.perf_counter() - start)


def repair(name: str) -> tuple[convsplit.repair.Repaired, ...]:
    """Split a model into classical depthwise-separable layers and repair them on two batches of random images."""
    torch.manual_seed(0)
    model = _awakened(build(name)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convsplit.ConversionWarning)
        converted = convsplit.convert(model, rank=1, forms="dw-pw")
    inputs, _ = _first_that_runs(model, name)
    repaired = convsplit.refit(converted, model, [inputs, tree_map(_turned, inputs)])
    assert all(p.isfinite().all() for p in converted.parameters())
    call(converted, inputs)
    return repaired


def _turned(value: Any) -> Any:
    return value.flip(-1) if isinstance(value, Tensor) else value


def _empty(name: str) -> nn.Module:
    """The model on the meta device; some builders compute with tensors and first need real ones."""
    try:
        with torch.device("meta"):
            return build(name)
    except (NotImplementedError, RuntimeError):
        with same_globals():
            torch.set_default_dtype(torch.float32)
            return build(name).to("meta")


def _is_run(model: nn.Module, largest: float) -> bool:
    """Neither too large nor for video."""
    is_for_video = any(isinstance(module, nn.Conv3d) for module in model.modules())
    return not is_for_video and sum(p.numel() for p in model.parameters()) <= largest


def precision(name: str) -> torch.dtype:
    """RAFT and Swin V2 cast to float32 in forward; everything else runs in float64."""
    return torch.float32 if name.startswith(("raft", "swin_v2")) else torch.float64


def _kind(reason: str) -> str:
    """A reason without the names in it, for counting."""
    return reason.split(":")[0].split(";")[0].split("(")[0].strip()


@torch.no_grad()
def _awakened(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if (parameter == parameter.flatten()[0]).all():  # zeros and tiny scales would hide what comes before them
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def _difference(model: nn.Module, converted: nn.Module, name: str) -> float:
    inputs, expected = _first_that_runs(model, name)
    got = call(converted, inputs)
    if _detects(name):  # boxes may all be suppressed: compare the features too
        image = inputs[0][0].unsqueeze(0)
        expected, got = [expected, model.backbone(image)], [got, converted.backbone(image)]
    pairs = zip(tree_leaves(expected), tree_leaves(got), strict=True)
    return max((_relative(a, b) for a, b in pairs), default=0.0)


def _relative(expected: Any, got: Any) -> float:
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return float(not torch.equal(torch.as_tensor(expected), torch.as_tensor(got)))
    assert expected.shape == got.shape
    scale = expected.norm().item()
    return (got - expected).norm().item() / scale if scale else (got - expected).norm().item()


def _first_that_runs(model: nn.Module, name: str) -> tuple[Any, Any]:
    """The smallest usual input that the model takes, and its output."""
    errors = []
    for size in _sizes(model, name):
        inputs = _inputs(name, size)
        try:
            torch.manual_seed(0)
            return inputs, call(model, inputs)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            errors.append(f"{size}: {error}")
    raise RuntimeError(f"{name} runs on no input: {errors}")


def _sizes(model: nn.Module, name: str) -> list[int]:
    if "ssd300" in name:  # its backbone is compared on the image as it is
        return [300]
    if not name.startswith("timm/"):
        return [128] if name.startswith("raft") else [64, 96, 224]
    channels_height_width = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return sorted({64, 96, 128, 224, channels_height_width[-1]})


def _inputs(name: str, size: int) -> Any:
    generator = torch.Generator().manual_seed(size)

    def image(*leading: int) -> Tensor:
        return torch.rand(*leading, 3, size, size, generator=generator)

    if name.startswith("raft"):
        return image(1), image(1)
    return ([image()],) if _detects(name) else (image(1),)


def _detects(name: str) -> bool:
    return any(part in name for part in ("rcnn", "retinanet", "fcos_", "ssd"))


def build(name: str) -> nn.Module:
    """A model by name, `timm/...` for timm's, without pretrained weights and with small detection inputs."""
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name.removeprefix("timm/"), pretrained=False)
    from torchvision import models

    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if _detects(name) or name.startswith(("deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
    if _detects(name) and "ssd" not in name:
        options |= {"min_size": 96, "max_size": 96}
    if _detects(name):  # all boxes, or there is nothing to compare
        options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False
    return builder(**options)


def torchvision_names() -> list[str]:
    """Everything `torchvision.models` can build."""
    from torchvision import models

    return [str(name) for name in models.list_models()]


def names() -> list[str]:
    """All models of the zoo."""
    return torchvision_names() + [f"timm/{name}" for name in TIMM.split()]


def table(results: list[Result]) -> Table:
    """One row per model."""
    rows = [
        [
            r.name, str(r.sites), str(r.split), ", ".join(f"{n} {reason}" for reason, n in r.left.most_common()),
            "not run" if r.difference is None else f"{r.difference:.0e}", f"{r.seconds:.1f}",
        ]
        for r in results
    ]  # fmt: skip
    return Table(["model", "convolutions", "split", "left alone", "worst relative difference", "s"], rows,
                 frozenset({"model", "left alone"}))  # fmt: skip


def summary(results: list[Result]) -> str:
    """The totals in words."""
    run = [r.difference for r in results if r.difference is not None and precision(r.name) == torch.float64]
    single = [r.difference for r in results if r.difference is not None and precision(r.name) != torch.float64]
    left: Counter[str] = sum((r.left for r in results), Counter())
    return (
        f"{len(results)} models with {sum(r.sites for r in results)} convolutions, "
        f"{sum(r.split for r in results)} split at full rank. "
        f"{len(run)} models were run in float64: worst relative difference {max(run, default=0):.1e}. "
        f"{len(single)} cast to float32: {max(single, default=0):.1e}. "
        f"{len(results) - len(run) - len(single)} were looked at on the meta device. "
        f"{sum(r.seconds for r in results):.0f} s in all.\n\n"
        "Left alone: " + ", ".join(f"{n} {reason}" for reason, n in left.most_common()) + "."
    )


def is_repaired(name: str, largest: float) -> bool:
    """Whether a model is neither too large for its repair nor for video."""
    return _is_run(_empty(name), largest)


def repaired(wanted: list[str]) -> Iterator[list[str]]:
    """Repair each of the models that are not too large."""
    for name in wanted:
        if is_repaired(name, LARGEST_IN_TESTS):
            work = timed(lambda: repair(name))  # noqa: B023
            better = sum(layer.after < layer.before for layer in work.result)
            yield [name, str(better), str(len(work.result)), f"{work.seconds:.1f}"]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", help="default: all of them")
    parser.add_argument("--repair", action="store_true")


QUICK = {"models": ["resnet18", "googlenet", "mobilenet_v3_small"]}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    wanted = arguments.models or names()
    if arguments.repair:
        rows = [_shown(row) for row in repaired(wanted)]
        yield Sheet("repaired", Table(["model", "layers better", "of", "s"], rows, frozenset({"model"})), ["model"])
        return
    results = []
    for name in wanted:
        results.append(examine(name))
        _shown(table(results[-1:]).rows[0])
    yield Sheet("the zoo at full rank", table(results), ["model"], {"split": Kind("higher")}, summary(results))


def _shown(row: Sequence[str]) -> Sequence[str]:
    print(" | ".join(row), file=sys.stderr, flush=True)
    return row


# One of every family of timm 1.0.31: the smallest of some, with convolutions to split where the family has any.
TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto cpubone_nano
crossvit_tiny_240 cs3darknet_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
densenet121 dla34 dpn48b eca_botnext26ts_256 edgenext_small efficientformer_l1 efficientformerv2_s0
efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m gernet_s ghostnet_050 gmlp_ti16_224 hardcorenas_a
hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception levit_128 lowformer_b0 mambaout_femto
maxvit_pico_rw_256 mobilenet_edgetpu_v2_xs mobilenetv5_base mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 pnasnet5large
poolformer_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_004_tv repghostnet_050 repvit_m1_0 res2net50_14w_8s
resnest14d resnet14t resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16 selecsls42 sequencer2d_s
shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window16_256 tf_mobilenetv3_large_minimal_100 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_svt_small vgg11 visformer_tiny vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
"""
