"""The life of a converted model in other libraries, stage by stage, on small configurations with random weights.

    python -m benchmarks libraries [--only ultralytics timm]

A cell says "works", "as dense" (fails, and so does the dense model), or why it does not work.

    convert     half the MACs
    exact       an exact rewriting equals the model to 1e-4 of the largest value
    repair      16 images: the drift of the outputs is smaller than without
    predict     by the library's own call where it has one
    fuse        batch norm folded by the library's own call (else for_inference): split as before, outputs to 1e-3
    train       one epoch by the library's own trainer where it has one: still split, the layers have moved
    keep        saved by the library's own call, loaded by it in a fresh process: outputs to 1e-5 (half precision: 1e-2)
    export      by the library's own exporter where it has one, to ONNX: outputs to 1e-4
    eight bits  ONNX Runtime's static quantisation of that file: cosine similarity to it 0.9, or no worse than dense
"""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from benchmarks.results import Sheet
from convsplit import Budget
from convsplit.finetune import parameter_groups
from convsplit.layers.separable import SeparableConv
from convsplit.tables import Table

CHECKOUT = Path(__file__).parents[2]
FORMS = ("dw-pw", "pw-dw")
SIZE = 64


def first(output: Any) -> Tensor:
    """The first tensor of whatever a model gives."""
    while not isinstance(output, Tensor):
        output = output.to_tuple() if hasattr(output, "to_tuple") else output
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return first(model.eval()(images))


def split(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, SeparableConv)}


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def require(holds: bool, why: str) -> None:
    if not holds:
        raise AssertionError(why)


class Library:
    """What users of a library do with a network; each stage but `build` may be overridden by the library's own way."""

    package = ""
    channels = 3
    loads = ""  # the lines that load the model of FOLDER in a fresh process into `model`
    keeps_half = False

    def build(self) -> nn.Module:
        raise NotImplementedError

    def images(self, count: int = 16) -> Tensor:
        return torch.rand(count, self.channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))

    def predict(self, model: nn.Module, folder: Path) -> None:
        require(bool(run(model, self.images(2)).isfinite().all()), "outputs are not finite")

    def fuse(self, model: nn.Module) -> nn.Module:
        return convsplit.for_inference(model, self.images(1))

    def train(self, model: nn.Module, folder: Path) -> nn.Module:
        model = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))
        for batch in self.images().split(8):
            loss = first(model(batch)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    def keep(self, model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "net.pt")

    def export(self, model: nn.Module, folder: Path) -> Path:
        return convsplit.export(model, folder / "net.onnx", self.images(1), seconds=0.05).path


class Restored(Library):
    """A library whose checkpoints are state_dicts: `convsplit.restore` reads them."""

    built = ""

    def build(self) -> nn.Module:
        names: dict[str, Any] = {}
        exec(self.built, names)
        return names["model"]

    @property
    def loads(self) -> str:  # type: ignore[override]
        return f"{self.built}\nimport convsplit\nmodel = convsplit.restore(model, FOLDER + '/net.pt')"


class Torchvision(Restored):
    package = "torchvision"
    built = "import torchvision; model = torchvision.models.resnet18(num_classes=10).eval()"

    def fuse(self, model: nn.Module) -> nn.Module:
        return fused_by_torch(model, "conv", "bn")


class Timm(Restored):
    package = "timm"
    built = "import timm; model = timm.create_model('resnet10t', num_classes=10).eval()"

    def keep(self, model: nn.Module, folder: Path) -> None:
        from timm.utils import CheckpointSaver

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        CheckpointSaver(model, optimizer, checkpoint_dir=str(folder)).save_checkpoint(0, 0.5)
        os.replace(folder / "last.pth.tar", folder / "net.pt")


class Monai(Restored):
    package = "monai"
    channels = 1
    built = (
        "from monai.networks.nets import UNet\n"
        "model = UNet(2, 1, 2, channels=(16, 24, 32), strides=(2, 2), num_res_units=1, norm='batch').eval()"
    )

    def keep(self, model: nn.Module, folder: Path) -> None:
        from monai.networks import save_state

        save_state(model, str(folder / "net.pt"))


class Smp(Library):
    package = "segmentation-models-pytorch"
    loads = (
        "import segmentation_models_pytorch as smp, convsplit.integrations.segmentation_models_pytorch\n"
        "model = smp.from_pretrained(FOLDER)"
    )

    def build(self) -> nn.Module:
        import segmentation_models_pytorch as smp

        return smp.Unet("tu-test_resnet", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)).eval()

    def keep(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]


class Lightning(Smp):
    """The same network in a LightningModule, converted by the callback as training begins."""

    package = "lightning"
    loads = (
        "import sys; sys.path.insert(0, FOLDER); from lit_net import Lit; import convsplit.integrations.lightning\n"
        "model = Lit.load_from_checkpoint(FOLDER + '/net.ckpt', weights_only=True).net"
    )
    source = """
import lightning, torch, segmentation_models_pytorch as smp
class Lit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = smp.Unet("tu-test_resnet", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)).eval()
    def training_step(self, batch):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=1e-4)
"""

    def module(self, folder: Path) -> Any:
        (folder / "lit_net.py").write_text(self.source)
        sys.path.insert(0, str(folder))
        sys.modules.pop("lit_net", None)
        import lit_net

        sys.path.remove(str(folder))
        return lit_net.Lit()

    def trainer(self, folder: Path, *callbacks: Any) -> Any:
        import lightning

        return lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=list(callbacks), default_root_dir=folder,
        )  # fmt: skip

    def train(self, model: nn.Module, folder: Path) -> nn.Module:
        from torch.utils.data import DataLoader, TensorDataset

        from convsplit.integrations.lightning import ConvertBeforeFit

        module = self.module(folder)
        callback = ConvertBeforeFit("net", choice={"rank": 1}, forms="dw-pw")
        self.trainer(folder, callback).fit(module, DataLoader(TensorDataset(self.images()), batch_size=8))
        require(bool(split(module.net)), "the callback converted nothing")
        module.net = copy.deepcopy(model)
        self.trainer(folder).fit(module, DataLoader(TensorDataset(self.images()), batch_size=8))
        return module.net

    def keep(self, model: nn.Module, folder: Path) -> None:
        module = self.module(folder)
        module.net = model
        trainer = self.trainer(folder)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / "net.ckpt")


class Diffusers(Library):
    package = "diffusers"
    loads = (
        "from diffusers import AutoencoderKL; import convsplit.integrations.diffusers\n"
        "model = AutoencoderKL.from_pretrained(FOLDER)"
    )

    def build(self) -> nn.Module:
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        ).eval()  # fmt: skip

    def keep(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]


class Transformers(Library):
    package = "transformers"
    loads = (
        "from transformers import ResNetForImageClassification; import convsplit.integrations.transformers\n"
        "model = ResNetForImageClassification.from_pretrained(FOLDER)"
    )

    def build(self) -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        numbers = {"embedding_size": 16, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_labels": 4}
        return ResNetForImageClassification(ResNetConfig(**numbers, layer_type="basic")).eval()

    def train(self, model: nn.Module, folder: Path) -> nn.Module:
        from transformers import Trainer, TrainingArguments

        from convsplit.integrations.transformers import optimizer_of

        arguments = TrainingArguments(
            str(folder / "runs"), num_train_epochs=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
            logging_strategy="no",
        )  # fmt: skip
        model = copy.deepcopy(model)
        data = [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(self.images())]
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer_of(model, arguments), None)).train()
        return model

    def keep(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]


class Ultralytics(Library):
    package = "ultralytics"
    keeps_half = True
    loads = "from ultralytics import YOLO\nmodel = YOLO(FOLDER + '/net.pt').model"

    def build(self) -> nn.Module:
        from ultralytics import YOLO

        return YOLO("yolov8n.yaml").model.eval()

    def yolo(self, model: nn.Module) -> Any:
        from ultralytics import YOLO

        made = YOLO("yolov8n.yaml")
        made.model = copy.deepcopy(model)
        return made

    def predict(self, model: nn.Module, folder: Path) -> None:
        found = self.yolo(model).predict(self.images(2), imgsz=SIZE, verbose=False, device="cpu")
        require(len(found) == 2, "no results")

    def fuse(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).fuse(verbose=False)  # type: ignore[operator]

    def train(self, model: nn.Module, folder: Path) -> nn.Module:
        from PIL import Image

        for part in ("train", "val"):
            for kind in ("images", "labels"):
                (folder / kind / part).mkdir(parents=True)
            for i, image in enumerate(self.images(4)):
                pixels = (255 * image.permute(1, 2, 0)).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
                (folder / "labels" / part / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
        names = "\n".join(f"  {i}: class{i}" for i in range(80))
        (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
        yolo = self.yolo(model)
        settings = {"imgsz": SIZE, "batch": 4, "workers": 0, "device": "cpu", "optimizer": "SGD", "lr0": 1e-3}
        quiet = {"plots": False, "verbose": False, "val": False, "project": str(folder)}
        yolo.train(data=str(folder / "data.yaml"), epochs=1, weight_decay=0, **settings, **quiet)
        return yolo.model

    def keep(self, model: nn.Module, folder: Path) -> None:
        self.yolo(model).save(folder / "net.pt")

    def export(self, model: nn.Module, folder: Path) -> Path:
        yolo = self.yolo(model)
        os.chdir(folder)
        return (
            folder / yolo.export(format="onnx", imgsz=SIZE, simplify=False, device="cpu", verbose=False)
        ).resolve()


def fused_by_torch(model: nn.Module, conv: str, norm: str) -> nn.Module:
    """Each convolution with the batch norm that is named after it, by torch's own function."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = copy.deepcopy(model).eval()
    for name, module in list(model.named_modules()):
        partner = name.replace(conv, norm) if conv in name.rpartition(".")[2] else ""
        if partner and partner in dict(model.named_modules()):
            model.set_submodule(name, fuse_conv_bn_eval(module, model.get_submodule(partner)))
            model.set_submodule(partner, nn.Identity())
    return model


def from_file(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]))


def eight_bits(path: Path, images: Tensor) -> float:
    """Cosine similarity between a file and its static quantisation."""
    from onnxruntime import InferenceSession, quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    given = InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{given: image.numpy()} for image in images.split(1)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    ready, small = path.with_suffix(".ready.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(path, ready)
    quantization.quantize_static(ready, small, Reader(), per_channel=True)
    pairs = [[from_file(each, image).flatten() for each in (path, small)] for image in images[:4].split(1)]
    return min(float(F.cosine_similarity(*pair, dim=0)) for pair in pairs)


class Life:
    """One library's stages, in their order; each is a method of that name."""

    def __init__(self, library: Library, folder: Path) -> None:
        self.library, self.folder = library, folder
        torch.manual_seed(0)
        self.dense = library.build()
        for module in self.dense.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics worth folding
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        self.images = library.images()
        self.model = self.dense

    def convert(self) -> None:
        self.model = convsplit.convert(
            self.dense, self.images[:1], budget=Budget(macs=0.5), forms=FORMS, progress=False
        )
        require(bool(split(self.model)), "nothing was split")

    def exact(self) -> None:
        same = convsplit.convert(self.dense, self.images[:1], exact=True, forms="dw-pw", progress=False)
        moved = apart(run(same, self.images[:2]), run(self.dense, self.images[:2]))
        require(moved < 1e-4, f"outputs differ by {moved:.1g}")

    def repair(self) -> None:
        wanted = run(self.dense, self.images)
        before = float((run(self.model, self.images) - wanted).norm())
        repaired = copy.deepcopy(self.model)
        convsplit.refit(repaired, self.dense, list(self.images.split(8)), progress=False)
        after = float((run(repaired, self.images) - wanted).norm())
        require(after < before, f"drift {before:.2g} -> {after:.2g}")
        self.model = repaired

    def predict(self) -> None:
        self.library.predict(copy.deepcopy(self.model), self.fresh())

    def fuse(self) -> None:
        fused = self.library.fuse(self.model)
        require(split(fused) == split(self.model), "is dense again")
        before, after = (sum(isinstance(m, nn.BatchNorm2d) for m in each.modules()) for each in (self.model, fused))
        require(before > 0, "no batch norm in it")
        require(after < before, "folds none")
        moved = apart(run(fused, self.images[:2]), run(self.model, self.images[:2]))
        require(moved < 1e-3, f"outputs differ by {moved:.1g}")

    def train(self) -> None:
        trained = self.library.train(self.model, self.fresh())
        require(split(trained) == split(self.model), "is dense again")
        before, after = self.model.state_dict(), trained.state_dict()
        stages = [key for key in after if key.endswith("depthwise.weight")]
        require(any(not torch.equal(after[key], before[key]) for key in stages), "the layers have not moved")
        require(all(apart(after[key], before[key]) < 0.5 for key in stages), "the layers started anew")

    def keep(self) -> None:
        folder = self.fresh()
        self.library.keep(copy.deepcopy(self.model), folder)
        torch.save(self.images[:2], folder / "images.pt")
        code = f"""
import sys, torch
FOLDER = {str(folder)!r}
{self.library.loads}
sys.path.insert(0, {str(CHECKOUT)!r})
from benchmarks.suites.libraries import run, split
torch.save((len(split(model)), run(model.float(), torch.load(FOLDER + "/images.pt"))), FOLDER + "/found.pt")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        require(done.returncode == 0, done.stderr.strip().splitlines()[-1] if done.stderr else "the process failed")
        layers, found = torch.load(folder / "found.pt")
        require(layers == len(split(self.model)), "is dense again")
        moved = apart(found, run(self.model, self.images[:2]))
        require(moved < (1e-2 if self.library.keeps_half else 1e-5), f"outputs differ by {moved:.1g}")

    def export(self) -> None:
        self.file = self.library.export(self.model, self.fresh())
        moved = apart(from_file(self.file, self.images[:1]), run(self.model, self.images[:1]))
        require(moved < 1e-4, f"outputs differ by {moved:.1g}")

    def eight_bits(self) -> None:
        alike = eight_bits(self.file, self.images)
        if alike < 0.9:
            dense = eight_bits(self.library.export(self.dense, self.fresh()), self.images)
            require(alike > dense - 0.01, f"similarity {alike:.3f}, dense {dense:.3f}")

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def cell(self, stage: str) -> str:
        """What becomes of a stage: of the converted model, and where that fails of the dense one."""
        found = self.attempt(stage)
        if found == "works" or stage in ("convert", "exact", "repair"):
            return found
        split_one, self.model = self.model, self.dense
        dense = self.attempt(stage)
        self.model = split_one
        return found if dense == "works" else f"as dense: {dense}"

    def attempt(self, stage: str) -> str:
        try:
            getattr(self, stage.replace(" ", "_"))()
        except AssertionError as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
        return "works"


LIBRARIES: dict[str, Callable[[], Library]] = {
    "transformers": Transformers, "monai": Monai, "diffusers": Diffusers, "ultralytics": Ultralytics,
    "torchvision": Torchvision, "timm": Timm, "smp": Smp, "lightning": Lightning,
}  # fmt: skip
STAGES = ("convert", "exact", "repair", "predict", "fuse", "train", "keep", "export", "eight bits")


QUICK = {"only": ["torchvision"]}


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))


def measure(args: Namespace) -> Iterator[Sheet]:
    logging.disable(logging.WARNING)
    rows: list[list[str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (each for each in LIBRARIES if each in args.only):
            with tempfile.TemporaryDirectory() as folder:
                life = Life(LIBRARIES[name](), Path(folder))
                package = life.library.package
                rows.append([name, f"{package} {version(package)}", *(life.cell(stage) for stage in STAGES)])
                os.chdir(CHECKOUT)
    yield Sheet(
        "life", Table(["library", "version", *STAGES], rows, frozenset({"library", "version", *STAGES})), ["library"]
    )
