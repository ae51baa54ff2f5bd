"""Models of other libraries on the command line: `timm:resnet50`, `ultralytics:yolov8n.pt`; and ONNX files.

Weights come from where each library keeps them on this disk. Nothing is fetched unless --download says so.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from convsplit.cli.parser import did_you_mean

Build = Callable[[Any, str, dict[str, Any], bool], nn.Module]


@dataclass(frozen=True)
class Source:
    """A library: how to import and install it, how it builds a model of a name, and how it keeps one.

    `suffix` is what its own checkpoints end in: "" for folders, None where it has none but a state_dict.
    """

    module: str
    package: str
    build: Build
    suffix: str | None = None
    keep: Callable[[Any, Path, str, Any], object] = lambda model, path, name, example_inputs: model.save_pretrained(
        path
    )

    def library(self) -> Any:
        """The library, with what convsplit does for it.

        Raises:
            ImportError: it is not installed; says how to.
        """
        try:
            found = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} is not installed: pip install {self.package}") from error
        if self.suffix is not None:
            importlib.import_module(f"convsplit.integrations.{self.module}")
        return found


def source_of(where: str) -> tuple[Source, str] | None:
    """The library and the name in it that `library:name` or FILE.onnx means; None for `package.module:callable`."""
    if where.endswith(".onnx"):
        return ONNX, where
    prefix, colon, name = where.partition(":")
    return (SOURCES[prefix], name) if colon and prefix in SOURCES else None


def build_from(where: str, arguments: Mapping[str, Any], download: bool) -> nn.Module:
    """The model that `library:name` means.

    Raises:
        ImportError: the library is not installed.
        FileNotFoundError: no such file or folder.
        ValueError: the library does not know the name, or fails; also where it would have to download.
    """
    found = source_of(where)
    assert found is not None
    source, name = found
    library = source.library()
    if not name:
        raise ValueError(f"{where} names no model: want such as {EXAMPLES[where.partition(':')[0]]}")
    try:
        return source.build(library, name, dict(arguments), download)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # whatever a library raises of a name or an argument that it does not know
        raise ValueError(f"{where} failed with {type(error).__name__}: {error}") from error


def _timm(timm: Any, name: str, arguments: dict[str, Any], download: bool) -> nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, **{"pretrained": download, **arguments})
    return model


def _torchvision(torchvision: Any, name: str, arguments: dict[str, Any], download: bool) -> nn.Module:
    models = torchvision.models
    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}{did_you_mean(name, models.list_models())}")
    takes = inspect.signature(models.get_model_builder(name)).parameters
    # Of detectors the backbone's weights are fetched unless they are refused, too.
    weights = {key: "DEFAULT" if download and key == "weights" else None for key in ("weights", "weights_backbone")}
    known = {key: value for key, value in weights.items() if key in takes}
    model: nn.Module = models.get_model(name, **{**known, **arguments})
    return model


def _smp(smp: Any, name: str, arguments: dict[str, Any], download: bool) -> nn.Module:
    if Path(name).is_dir():
        return smp.from_pretrained(name, **arguments)  # type: ignore[no-any-return]
    kind = getattr(smp, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        near = did_you_mean(name, [each for each in dir(smp) if each[0].isupper()])
        raise ValueError(f"segmentation_models_pytorch has no model {name!r}, and there is no such folder{near}")
    return kind(**{"encoder_weights": "imagenet" if download else None, **arguments})


def _ultralytics(ultralytics: Any, name: str, arguments: dict[str, Any], download: bool) -> nn.Module:
    kept = Path(ultralytics.settings["weights_dir"]) / name
    if name.endswith(".pt") and not (download or Path(name).exists() or kept.exists()):
        raise FileNotFoundError(f"no file {name}, nor {kept}; with --download ultralytics may fetch it")
    model: nn.Module = ultralytics.YOLO(name, **arguments).model
    return model.float()


def _keep_yolo(converted: nn.Module, path: Path, name: str, example_inputs: Any) -> None:
    import ultralytics

    yolo = ultralytics.YOLO(name)
    yolo.model = converted
    yolo.save(path)


def _diffusers(diffusers: Any, name: str, arguments: dict[str, Any], download: bool) -> nn.Module:
    folder = Path(name)
    if (folder / "model_index.json").exists():
        parts = sorted(each.parent.name for each in folder.glob("*/config.json"))
        raise ValueError(
            f"{name} is a pipeline: say which of its models, diffusers:{name}/{parts[0] if parts else '...'}"
        )
    model: nn.Module = diffusers.AutoModel.from_pretrained(name, local_files_only=not download, **arguments)
    return model


def _transformers(transformers: Any, name: str, arguments: dict[str, Any], download: bool) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=not download)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    model: nn.Module = kind.from_pretrained(name, local_files_only=not download, **arguments)
    return model


def _onnx(onnx: Any, name: str, arguments: dict[str, Any], download: bool) -> nn.Module:
    network: nn.Module = importlib.import_module("convsplit.integrations.onnx").read(name)
    return network


def _keep_onnx(converted: nn.Module, path: Path, name: str, example_inputs: Any) -> None:
    done = importlib.import_module("convsplit.integrations.onnx").write(converted, path, example_inputs)
    for node, reason in cast(Any, converted).left_alone.items():
        print(f"{node} is left alone: {reason}", file=sys.stderr)
    print(f"{path} run in ONNX Runtime: outputs differ from the converted module's by {done:.1g}", file=sys.stderr)


SOURCES: dict[str, Source] = {
    "torchvision": Source("torchvision", "torchvision", _torchvision),
    "timm": Source("timm", "timm", _timm),
    "ultralytics": Source("ultralytics", "ultralytics", _ultralytics, ".pt", _keep_yolo),
    "transformers": Source("transformers", "transformers", _transformers, ""),
    "diffusers": Source("diffusers", "diffusers", _diffusers, ""),
    "smp": Source("segmentation_models_pytorch", "segmentation-models-pytorch", _smp, ""),
}
ONNX = Source("onnx", "onnx onnxruntime", _onnx, ".onnx", _keep_onnx)
EXAMPLES = {
    "torchvision": "torchvision:resnet18", "timm": "timm:resnet50", "ultralytics": "ultralytics:yolov8n.pt",
    "transformers": "transformers:FOLDER", "diffusers": "diffusers:FOLDER",
    "smp": "smp:Unet --model-arg encoder_name=resnet18",
}  # fmt: skip
