"""Models of ultralytics after conversion: predict, val, fuse, train, save, a fresh process, export."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit.layers.separable import SeparableConv
from convsplit.model.running import tensors_in

pytest.importorskip("ultralytics", exc_type=ImportError)

from ultralytics import YOLO
from ultralytics.utils import ROOT, YAML

from convsplit.integrations import ultralytics as at_home

SIZE = 64


def split_names(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, SeparableConv)}


def squares(folder: Path, task: str = "detect") -> None:
    """A data set of a few squares on noise, as ultralytics reads one."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for i in range(4):
            pixels = (60 * torch.rand(64, 64, 3, generator=generator)).to(torch.uint8)
            pixels[16:48, 8 + 4 * i : 40 + 4 * i] = 230
            kind = ("even", "odd")[i % 2]
            images = folder / part / kind if task == "classify" else folder / "images" / part
            labels = folder / "labels" / part
            for each in (images, labels):
                each.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(images / f"{i}.png")
            (labels / f"{i}.txt").write_text(f"{i % 2} {_label(task, (8 + 4 * i) / 64, (40 + 4 * i) / 64)}\n")
    points = {"kpt_shape": [2, 3]} if task == "pose" else {}
    YAML.save(folder / "data.yaml", {"path": str(folder), "train": "images/train", "val": "images/val", "nc": 2,
                                     "names": {0: "even", 1: "odd"}, **points})  # fmt: skip


def _label(task: str, left: float, right: float) -> str:
    box = f"{(left + right) / 2} 0.5 0.5 0.5"
    corners = f"{left} 0.25 {right} 0.25 {right} 0.75 {left} 0.75"
    return {"segment": corners, "obb": corners, "pose": f"{box} {left} 0.25 2 {right} 0.75 2"}.get(task, box)


def small_yaml(folder: Path, name: str = "yolov8.yaml", **numbers: object) -> str:
    """YOLOv8, a quarter as wide as its smallest."""
    found = YAML.load(ROOT / "cfg/models/v8" / name)
    del found["scales"]
    path = folder / "tiny.yaml"
    YAML.save(path, {**found, "depth_multiple": 0.33, "width_multiple": 0.0625, **numbers})
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("squares")
    squares(folder)
    return str(folder / "data.yaml")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_yaml(tmp_path_factory.mktemp("models"), nc=16)  # of more, the head of older versions is wider


@pytest.fixture(scope="module")
def yolo(tiny: str) -> YOLO:
    torch.manual_seed(0)
    made = YOLO(tiny)
    for module in made.model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics worth folding
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def half(yolo: YOLO) -> YOLO:
    converted = at_home.convert(yolo, torch.rand(1, 3, SIZE, SIZE), forms=("dw-pw", "pw-dw"))
    for layer in converted.model.modules():
        if isinstance(layer, SeparableConv):  # a repair gives biases to layers that have none
            nn.init.normal_(layer.add_bias(), std=0.1)
    return converted


def again(yolo: YOLO) -> YOLO:
    """Another YOLO of the same module: what is done to it is not done to the first."""
    other = copy.copy(yolo)
    other._modules = dict(yolo._modules)
    return other


def trained(yolo: YOLO, data: str, folder: Path, **options: object) -> nn.Module:
    settings = {
        "epochs": 1,
        "imgsz": SIZE,
        "batch": 4,
        "optimizer": "SGD",
        "lr0": 1e-4,
        "workers": 0,
        "device": "cpu",
    }
    quiet = {"plots": False, "verbose": False, "val": False, "project": str(folder), "name": "run", "exist_ok": True}
    yolo.train(data=data, **{**settings, **quiet, "warmup_epochs": 0, "close_mosaic": 0, "mosaic": 0.0, **options})
    return yolo.model


def test_convert_leaves_the_yolo_it_was_given(yolo: YOLO, half: YOLO):
    assert type(half) is type(yolo)
    assert split_names(half.model)
    assert not split_names(yolo.model)
    assert half.callbacks is not yolo.callbacks


def test_fuse_and_predict_give_what_the_converted_module_gives(half: YOLO):
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = half.model.eval()(images)[0]
        fused = copy.deepcopy(half.model).fuse(verbose=False)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        assert split_names(fused) == split_names(half.model)
        assert torch.allclose(fused(images)[0], wanted, atol=1e-3)
    assert len(half.predict(images, verbose=False, imgsz=SIZE, device="cpu")) == 2


def test_a_saved_checkpoint_opens_in_a_fresh_process_and_trains_on_split(half: YOLO, data: str, tmp_path: Path):
    half.save(tmp_path / "split.pt")
    script = tmp_path / "fresh.py"
    script.write_text(f"""
from ultralytics import YOLO
yolo = YOLO({str(tmp_path / "split.pt")!r})
def count(model): return sum(type(m).__name__ == "SeparableConv2d" for m in model.modules())
before, image = count(yolo.model), {str(Path(data).parent / "images" / "val" / "0.png")!r}
yolo.predict(image, imgsz={SIZE}, verbose=False, device="cpu", save=False)
yolo.train(data={data!r}, epochs=1, imgsz={SIZE}, batch=4, workers=0, device="cpu", plots=False, verbose=False,
           val=False, optimizer="SGD", lr0=1e-4, project={str(tmp_path)!r}, name="fresh")
print("layers", before, count(yolo.model), count(YOLO({str(tmp_path / "fresh/weights/last.pt")!r}).model))
""")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = done.stdout.split("layers ")[1].split()[:3]
    assert {int(count) for count in counts} == {len(split_names(half.model))}


@pytest.mark.parametrize("classes", [16, 2])
def test_training_goes_on_from_the_converted_weights(
    yolo: YOLO, half: YOLO, tiny: str, data: str, tmp_path: Path, classes: int
):
    same = again(half)
    if classes == 16:  # as somebody does it who knows nothing of convsplit.integrations
        same = YOLO(tiny)
        same.model = convsplit.convert(yolo.model, forms="dw-pw", skip=["model.22.*"])
    before, names = dict(same.model.state_dict()), split_names(same.model)
    after = trained(same, data, tmp_path)
    assert split_names(after) == names
    for name in names:
        key = f"{name}.depthwise.weight"
        moved = (after.get_submodule(f"{name}.depthwise").weight - before[key]).norm()
        assert moved < 0.05 * before[key].norm(), name


def test_layers_of_another_size_stay_dense_and_are_named(half: YOLO, yolo: YOLO):
    other = copy.deepcopy(yolo.model)
    name = min(split_names(half.model))
    other.set_submodule(name, nn.Conv2d(4, 8, 3, 2, 1, bias=False))
    with pytest.warns(convsplit.ConversionWarning, match=rf"of another size in the new model.*: {name}$"):
        other.load(half.model, verbose=False)
    assert split_names(other) == split_names(half.model) - {name}


def test_training_from_other_weights_is_said_to_be_dense(half: YOLO, data: str, tmp_path: Path):
    with pytest.warns(convsplit.ConversionWarning, match=r"pretrained=") as warned:
        after = trained(again(half), data, tmp_path, pretrained=False)
    assert not split_names(after)
    assert len([each for each in warned if each.category is convsplit.ConversionWarning]) == 1


def test_a_trainer_that_loads_no_weights_is_told_of(half: YOLO, data: str, tmp_path: Path):
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Forgetful(DetectionTrainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            return super().get_model(cfg, None, verbose)

    with pytest.warns(convsplit.ConversionWarning, match=r"built a model of its own"):
        trained(again(half), data, tmp_path, trainer=Forgetful)


def test_validation_runs(half: YOLO, data: str, tmp_path: Path):
    found = half.val(data=data, imgsz=SIZE, batch=4, workers=0, device="cpu", plots=False, verbose=False,
                     project=str(tmp_path))  # fmt: skip
    assert 0 <= found.box.map <= 1


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have OpenVINO compute so; by default it takes bfloat16 where the processor has instructions for it."""
    from openvino import Core

    compiled = Core.compile_model

    def compile_model(core, model, device_name=None, config=None):
        return compiled(core, model, device_name, {**(config or {}), "INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(Core, "compile_model", compile_model)


@pytest.mark.parametrize("kind", ["torchscript", "onnx", "openvino"])
def test_exports_equal_the_converted_module(half: YOLO, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    if kind != "torchscript":
        pytest.importorskip("onnxruntime" if kind == "onnx" else kind)
    monkeypatch.chdir(tmp_path)
    half.save(tmp_path / "split.pt")
    saved = YOLO(tmp_path / "split.pt")  # in half precision, as ultralytics saves
    images = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = saved.model.eval()(images)[0]
    from ultralytics.nn.autobackend import AutoBackend

    if kind == "openvino":
        in_float32(monkeypatch)
    options = {"simplify": False} if kind == "onnx" else {}  # that would take a package more
    exported = saved.export(format=kind, imgsz=SIZE, verbose=False, device="cpu", **options)
    found = AutoBackend(exported, device=torch.device("cpu"))(images)
    found = found[0] if isinstance(found, (list, tuple)) else found
    assert (torch.as_tensor(found) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_merging_takes_leave(half: YOLO):
    assert isinstance(half.model.convsplit, at_home.Settled)
    assert not hasattr(convsplit.merge(half.model), "convsplit")


def test_a_merged_model_gives_its_weights_to_a_new_one_of_its_class(yolo: YOLO):
    split = convsplit.convert(yolo.model, forms="dw-pw", rank=1).eval()
    for layer in split.modules():
        if isinstance(layer, SeparableConv):
            nn.init.normal_(layer.add_bias(), std=0.1)
    merged, other = convsplit.merge(split), copy.deepcopy(yolo.model).eval()
    other.load(merged, verbose=False)  # by name, what has none in the new model is left out
    images = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = split(images)[0]
        assert torch.allclose(merged(images)[0], wanted, atol=1e-3)
        assert torch.allclose(other(images)[0], wanted, atol=1e-3)


def test_images_come_as_the_predictor_reads_them(yolo: YOLO, data: str):
    (batch,) = at_home.images(Path(data).parent / "images" / "train", size=SIZE)
    assert batch.shape == (4, 3, SIZE, SIZE)
    predictor = yolo._smart_load("predictor")(
        overrides={"imgsz": SIZE, "device": "cpu", "save": False, "verbose": False}
    )
    predictor.setup_model(copy.deepcopy(yolo.model), verbose=False)
    predictor.setup_source(str(Path(data).parent / "images" / "train"))
    _, pictures, _ = next(iter(predictor.dataset))
    assert torch.allclose(predictor.preprocess(pictures)[0], batch[0], atol=1e-6)


def test_fusers_that_build_a_dense_layer_are_not_asked(half: YOLO):
    layer = copy.deepcopy(next(layer for layer in half.model.modules() if isinstance(layer, SeparableConv)))
    norm = nn.BatchNorm2d(layer.out_channels).eval()
    nn.init.uniform_(norm.running_mean)
    x = torch.rand(1, layer.in_channels, 8, 8)
    with torch.no_grad():
        wanted = norm(layer(x))
        for fuse in (at_home.tasks.fuse_conv_and_bn, at_home._absorbing(lambda conv, bn: nn.Conv2d(1, 1, 1))):
            fused = fuse(copy.deepcopy(layer), norm)
            assert isinstance(fused, SeparableConv)
            assert torch.allclose(fused(x), wanted, atol=1e-5)


TASKS = {"segment": "yolov8-seg.yaml", "classify": "yolov8-cls.yaml", "pose": "yolov8-pose.yaml",
         "obb": "yolov8-obb.yaml"}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_stay_split_through_fuse_predict_train_and_save(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    made = YOLO(
        small_yaml(tmp_path, TASKS[task], nc=2, **({"kpt_shape": [2, 3]} if task == "pose" else {})), task=task
    )
    images = torch.rand(2, 3, SIZE, SIZE)
    converted = at_home.convert(made, forms="dw-pw", rank=1)
    names = split_names(converted.model)
    assert names
    for name in names:  # as a repair does
        nn.init.normal_(converted.model.get_submodule(name).add_bias(), std=0.1)
    with torch.no_grad():
        wanted = first(converted.model.eval()(images))
        fused = copy.deepcopy(converted.model).fuse(verbose=False)
        assert split_names(fused) == names
        assert torch.allclose(first(fused(images)), wanted, rtol=1e-4, atol=1e-4)
    before = converted.model.state_dict()
    squares(tmp_path / "data", task)
    after = trained(converted, str(tmp_path / "data" / ("" if task == "classify" else "data.yaml")), tmp_path)
    assert split_names(after) == names
    for name in names:
        key = f"{name}.depthwise.weight"
        assert (after.state_dict()[key] - before[key]).norm() < 0.05 * before[key].norm(), name
    loaded = YOLO(tmp_path / "run/weights/last.pt")
    assert split_names(loaded.model) == names
    assert len(loaded.predict(images, verbose=False, imgsz=SIZE, device="cpu", save=False)) == 2


def first(outputs: object) -> torch.Tensor:
    """The first tensor of outputs, which tasks nest in ways of their own."""
    return next(tensors_in(outputs))


def test_what_is_no_yolo_of_weights_is_refused():
    with pytest.raises(TypeError, match=r"modules go to convsplit\.convert"):
        at_home.convert(nn.Conv2d(3, 8, 3))
