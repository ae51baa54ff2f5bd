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


def inputs_and_results(**shapes: object) -> tuple[list[object], list[object]]:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    return given, [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]


def keep(path: Path, nodes: list[object], given: list[object], results: list[object], held: list[object]) -> None:
    made = helper.make_graph(nodes, "g", given, results, held)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def weight_of(*shape: int, name: str = "w", kind: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(kind), name)


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
@pytest.mark.parametrize(
    "numbers",
    [
        {"strides": [2, 2]},
        {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]},
        {"group": 2, "dilations": [2, 1]},
    ],
    ids=str,
)
def test_transposed_convolutions_are_split(numbers: dict[str, object], form: str, tmp_path: Path):
    given, results = inputs_and_results(x=["n", 8, 6, 7])
    nodes = [helper.make_node("ConvTranspose", ["x", "w", "b"], ["z"], "up", **numbers)]
    held = [weight_of(8, 6, 3, 3), weight_of(6 * numbers.get("group", 1), name="b")]
    keep(tmp_path / "up.onnx", nodes, given, results, held)
    x = torch.rand(2, 8, 6, 7)
    network = files.read(tmp_path / "up.onnx")
    assert torch.allclose(network(x), outputs(tmp_path / "up.onnx", x), atol=1e-5)
    written = files.convert(tmp_path / "up.onnx", tmp_path / "same.onnx", x, exact=True, forms=form)
    assert [layer.name for layer in written.plan.split] == ["up"]
    assert written.drift < 1e-5
    half = convsplit.convert(network, x, forms=form, budget=Budget(params=0.6))
    assert files.write(half, tmp_path / "half.onnx", x) < 1e-5


def test_half_precision_stays_half(tmp_path: Path):
    given, results = ([helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)]
                      for name, shape in (("x", ["n", 8, 9, 9]), ("z", None)))  # fmt: skip
    nodes = [helper.make_node("Conv", ["x", "w"], ["z"], "conv")]
    keep(tmp_path / "h.onnx", nodes, given, results, [weight_of(12, 8, 3, 3, kind=np.float16)])
    images = torch.rand(8, 8, 9, 9).half()
    written = files.convert(tmp_path / "h.onnx", tmp_path / "half.onnx", forms="pw-dw", calibration=images)
    assert written.plan.split
    held = onnx.load(written.path).graph.initializer
    assert {t.data_type for t in held if t.name.endswith(("weight", "bias"))} == {TensorProto.FLOAT16}
    assert outputs(written.path, images).dtype == torch.float16


def branch(name: str, weight: str) -> onnx.GraphProto:
    result = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
    node = helper.make_node("Conv", ["a", weight], [f"{name}_y"], f"{name}/conv")
    return helper.make_graph([node], name, [], [result])


def test_what_is_left_alone_has_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture):
    given, results = inputs_and_results(x=[1, 8, 9, 9])
    branches = {"then_branch": branch("then", "v"), "else_branch": branch("else", "w")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1] * 4),
        helper.make_node("ReduceSum", ["a"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["b"], "choice", **branches),
        helper.make_node("Neg", ["w"], ["minus"]),
        helper.make_node("Conv", ["b", "minus"], ["c"], "computed"),
        helper.make_node("ConvTranspose", ["c", "w"], ["d"], "cropped", pads=[0, 0, 1, 1]),
        helper.make_node("ConvTranspose", ["d", "w"], ["e"], "sized", output_shape=[8, 8]),
        helper.make_node("Reshape", ["e", "shape"], ["f"]),
        helper.make_node("Conv", ["f", "u"], ["z"], "uneven", pads=[0, 2]),
    ]  # fmt: skip
    held = [
        weight_of(8, 8, 3, 3), weight_of(8, 8, 3, 3, name="v"), weight_of(8, 8, 3, name="u"),
        numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(np.asarray([1, 8, -1]), "shape"),
    ]  # fmt: skip
    keep(tmp_path / "net.onnx", nodes, given, results, held)
    network = files.read(tmp_path / "net.onnx")
    assert list(network.nodes) == ["first"]
    assert network.left_alone == {
        "then/conv": "inside of the If node 'choice'",
        "else/conv": "inside of the If node 'choice'",
        "computed": "'minus' is computed by other nodes, not stored",
        "cropped": "it crops its two sides unequally, as no module of torch does",
        "sized": "its padding follows from the size of its output",
        "uneven": "it pads its two sides unequally, as no module of torch of its axes does",
    }
    written = files.convert(tmp_path / "net.onnx", tmp_path / "same.onnx", exact=True, forms="dw-pw")
    assert written.drift < 1e-4
    assert "sized is left alone: its padding follows" in str(written)
    assert (
        main(["convert", str(tmp_path / "net.onnx"), "--exact", "--out", str(tmp_path / "same.onnx"), "--quiet"]) == 0
    )
    assert "computed is left alone: 'minus' is computed" in capsys.readouterr().err


def test_inputs_that_the_file_does_not_take_are_said(tmp_path: Path):
    model = graph({})
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "two.onnx")
    with pytest.raises(ValueError, match=r"(?s)does not run on these inputs.*Got: 3 Expected: 2"):
        files.convert(tmp_path / "two.onnx", tmp_path / "out.onnx", torch.rand(3, 8, 9, 9), exact=True)


def test_copies_share_the_graph_and_nothing_else(file: Path):
    network = files.read(file)
    copied = convsplit.convert(network, IMAGES[:1], forms="dw-pw", rank=1)
    assert isinstance(copied, OnnxNetwork)
    assert copied.graph is network.graph
    assert not any(isinstance(layer, SeparableConv) for layer in network.modules())
