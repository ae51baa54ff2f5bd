"""ONNX files in and out: what is split, what stays, and that ONNX Runtime computes what the module does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convsplit
from convsplit import Budget
from convsplit.cli import main
from convsplit.layers.separable import SeparableConv

pytest.importorskip("onnx", exc_type=ImportError)
pytest.importorskip("onnxruntime", exc_type=ImportError)

import onnx
from onnx import TensorProto, helper, numpy_helper

from convsplit.integrations import onnx as files
from convsplit.integrations.onnx_network import OnnxNetwork

IMAGES = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Branches, a shortcut, a softmax: more than convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, (3, 1), padding=(1, 0))
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.sigmoid(self.left(x)) * self.right(x)
        return self.head(torch.relu(self.down(x)).mean((2, 3))).softmax(1)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module", params=["recorded", "traced"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    if request.param == "recorded":
        program = torch.onnx.export(net(), (IMAGES[:2],), dynamo=True, verbose=False, dynamic_shapes=({0: "n"},))
        program.save(path)
    else:
        axes = {"x": {0: "n"}}
        torch.onnx.export(net(), (IMAGES[:2],), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    model = onnx.load(path)
    helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, path)
    return path


def outputs(path: Path, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return files.run_file(path, images)[0]


def test_the_module_computes_what_the_file_does(file: Path):
    network = files.read(file)
    assert len(network.nodes) == 4
    with torch.no_grad():
        assert torch.allclose(network(IMAGES), outputs(file), atol=1e-6)


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
def test_an_exact_conversion_gives_the_original_s_outputs(file: Path, tmp_path: Path, form: str):
    written = files.convert(file, tmp_path / "same.onnx", IMAGES, exact=True, forms=form)
    assert written.plan.split
    assert written.drift < 1e-4
    assert torch.allclose(outputs(tmp_path / "same.onnx"), outputs(file), atol=1e-5)


def test_names_metadata_and_opset_stay_and_the_old_weights_go(file: Path, tmp_path: Path):
    written = files.convert(file, tmp_path / "half.onnx", forms=("dw-pw", "pw-dw"), calibration=IMAGES)
    before, after = onnx.load(file), onnx.load(tmp_path / "half.onnx")
    assert after.opset_import == before.opset_import
    assert after.ir_version == before.ir_version
    assert after.metadata_props == before.metadata_props
    assert [each.name for each in after.graph.input] == [each.name for each in before.graph.input]
    assert [each.name for each in after.graph.output] == [each.name for each in before.graph.output]
    kept = {node.name: list(node.output) for node in after.graph.node}
    assert all(kept[node.name] == list(node.output) for node in before.graph.node)
    assert (tmp_path / "half.onnx").stat().st_size < file.stat().st_size
    sizes = [sum(int(np.prod(t.dims)) for t in model.graph.initializer) for model in (before, after)]
    totals = written.plan.totals()
    channels = sum(int(np.prod(t.dims)) for t in after.graph.initializer if t.data_type == TensorProto.INT64)
    added = sum(np.prod(t.dims) for t in after.graph.initializer if t.name.endswith(".bias"))
    assert sizes[1] - channels <= sizes[0] - totals["params_before"] + totals["params_after"] + added


def test_repair_brings_the_outputs_nearer(file: Path, tmp_path: Path):
    drifts = []
    for calibration in (None, IMAGES):
        written = files.convert(
            file, tmp_path / "half.onnx", IMAGES, budget=Budget(params=0.4), calibration=calibration
        )
        wanted = outputs(file)
        drifts.append(float((outputs(written.path) - wanted).norm() / wanted.norm()))
        assert written.rounding < 1e-4
    assert drifts[1] < 0.5 * drifts[0]


def test_the_command_line_takes_and_writes_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    given = ["--calibrate", str(tmp_path / "images.npy"), "--forms", "dw-pw", "--quiet"]
    assert main(["convert", str(file), *given, "--out", str(tmp_path / "smaller.onnx")]) == 0
    assert "smaller.onnx run in ONNX Runtime" in capsys.readouterr().err
    assert outputs(tmp_path / "smaller.onnx").shape == (8, 5)
    assert main(["plan", str(file), "--forms", "dw-pw", "--input", "1x3x12x12"]) == 0
    assert "4 splittable convolutions" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "missing.onnx")]) == 1


def graph(
    node_numbers: dict[str, object], *, opset: int = 13, kernel: tuple[int, ...] = (3, 3), ir: int = 8
) -> object:
    """A file of one convolution and a ReLU, whose weight is stored as the opset of old had it."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((12, 8, *kernel)).astype(np.float32)
    space = ["h", "w", "d"][: len(kernel)]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, *space])]
    if ir < 4:
        given.append(helper.make_tensor_value_info("w.0", TensorProto.FLOAT, weight.shape))
    nodes = [
        helper.make_node("Conv", ["x", "w.0"], ["y"], "conv.0", **node_numbers),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    results = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    made = helper.make_graph(nodes, "g", given, results, [numpy_helper.from_array(weight, "w.0")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


NUMBERS = [
    {},
    {"pads": [1, 1, 1, 1], "strides": [2, 2]},
    {"pads": [0, 1, 2, 1]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER"},
    {"auto_pad": "VALID", "dilations": [2, 1]},
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize(("opset", "ir"), [(9, 3), (13, 8), (21, 10)])
@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
def test_padding_of_every_kind_is_that_of_the_node(
    numbers: dict[str, object], opset: int, ir: int, form: str, tmp_path: Path
):
    onnx.save(graph(numbers, opset=opset, ir=ir), tmp_path / "one.onnx")
    x = torch.rand(2, 8, 9, 10)
    network = files.read(tmp_path / "one.onnx")
    assert torch.allclose(network(x), outputs(tmp_path / "one.onnx", x), atol=1e-5)
    written = files.convert(tmp_path / "one.onnx", tmp_path / "same.onnx", x, exact=True, forms=form)
    assert [layer.name for layer in written.plan.split] == ["conv/0"]
    assert written.drift < 1e-5
    uneven = convsplit.convert(network, x, forms=form, budget=Budget(params=0.6))
    assert not uneven.get_submodule("conv/0").even
    assert files.write(uneven, tmp_path / "uneven.onnx", x) < 1e-5  # gathers and sums, in old and new opsets


@pytest.mark.parametrize("kernel", [(3,), (3, 3, 2)])
def test_other_dimensions(kernel: tuple[int, ...], tmp_path: Path):
    onnx.save(graph({"pads": [1] * (2 * len(kernel))}, kernel=kernel), tmp_path / "one.onnx")
    x = torch.rand(2, 8, *[7] * len(kernel))
    written = files.convert(tmp_path / "one.onnx", tmp_path / "same.onnx", x, exact=True, forms="pw-dw")
    assert written.plan.split
    assert written.drift < 1e-5


def test_computed_weights_and_sizes_that_are_not_said(tmp_path: Path):
    model = graph({})
    model.graph.node.insert(0, helper.make_node("Neg", ["w.0"], ["w"]))
    model.graph.node[1].input[1] = "w"
    onnx.save(model, tmp_path / "computed.onnx")
    network = files.read(tmp_path / "computed.onnx")
    assert not network.nodes
    x = torch.rand(1, 8, 6, 6)
    assert torch.allclose(network(x), outputs(tmp_path / "computed.onnx", x))
    with pytest.raises(ValueError, match=r"does not say the size of x"):
        files.random_inputs(network)
    (tmp_path / "no.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"cannot be read"):
        files.read(tmp_path / "no.onnx")


def test_copies_share_the_graph_and_nothing_else(file: Path):
    network = files.read(file)
    copied = convsplit.convert(network, IMAGES[:1], forms="dw-pw", rank=1)
    assert isinstance(copied, OnnxNetwork)
    assert copied.graph is network.graph
    assert not any(isinstance(layer, SeparableConv) for layer in network.modules())
