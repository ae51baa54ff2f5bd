"""The command line: every command, its exit codes, suggestions, and files that are whole or not there."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convsplit
from convsplit.cli import main
from convsplit.cli.output import write_whole

MODEL = """
import torch
from torch import nn

def net(classes=4, broken=False):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(16, classes)) if not broken else None

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
    def forward(self, x, scale):
        return self.conv(x) * scale
"""
NET = ["cli_model:net", "--forms", "dw-pw,pw-dw"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cli_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("cli_model", None)
    return tmp_path


def net(**arguments: object) -> nn.Module:
    import cli_model

    return cli_model.net(**arguments).eval()


def test_plan_prints_and_writes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *NET, "--budget", "params=0.5", "--input", "1x3x9x9", "--out", "plan.json"]) == 0
    assert "MACs per input of the splittable" in capsys.readouterr().out
    made = convsplit.make_plan(
        net(), torch.randn(1, 3, 9, 9), budget=convsplit.Budget(params=0.5), forms=["dw-pw", "pw-dw"]
    )
    assert convsplit.Plan.load("plan.json") == made


def test_linear_layers_are_split_where_they_are_asked_for(capsys: pytest.CaptureFixture) -> None:
    for options, listed in (([], False), (["--linear"], True)):
        assert main(["plan", "cli_model:net", "--budget", "params=0.5", *options]) == 0
        assert ("4x16" in capsys.readouterr().out) == listed


def test_from_plan_to_merged_weights(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *NET, "--out", "plan.json"]) == 0
    assert main(["convert", *NET, "--plan", "plan.json", "--out", "small.safetensors"]) == 0
    wanted = convsplit.apply_plan(net(), convsplit.Plan.load("plan.json"))
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(convsplit.load("small.safetensors", net())(x), wanted(x))
    assert main(["merge", "cli_model:net", "small.safetensors", "--out", "dense.safetensors"]) == 0
    assert main(["merge", "cli_model:net", "small.safetensors", "--out", "dense.pt"]) == 0
    dense = net()
    dense.load_state_dict(torch.load("dense.pt", weights_only=True))
    torch.testing.assert_close(dense(x), wanted(x))
    capsys.readouterr()
    for name, said in (("small.safetensors", "2 split layers"), ("plan.json", "are split")):
        assert main(["inspect", name]) == 0
        assert said in capsys.readouterr().out
        assert main(["inspect", name, "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_refit_repairs_and_writes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(torch.randn(32, 3, 9, 9), "images.pt")
    assert main(["convert", *NET, "--budget", "params=0.4", "--out", "a.safetensors"]) == 0
    capsys.readouterr()
    command = ["refit", "cli_model:net", "a.safetensors", "--input", "images.pt", "--out", "b.safetensors"]
    assert main([*command, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert all(layer["after"] <= layer["before"] for layer in layers)
    assert convsplit.load("b.safetensors", net()) is not None
    assert main(command) == 0
    assert "squared error before" in capsys.readouterr().out


def test_report_writes_every_format(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("jinja2")
    files = ["--html", "r.html", "--markdown", "r.md", "--csv", "r.csv", "--out", "r.json"]
    assert main(["report", *NET, "--budget", "params=0.5", "--input", "8x3x9x9", *files, "--time", "--json"]) == 0
    printed = convsplit.report.Report.from_json(capsys.readouterr().out)
    assert printed == convsplit.report.Report.from_json(Path("r.json").read_text())
    assert printed.images == 8
    assert printed.milliseconds is not None
    assert all(Path(name).stat().st_size for name in ("r.html", "r.md", "r.csv"))
    assert main(["inspect", "r.json"]) == 0


def test_frontier_as_table_and_json(capsys: pytest.CaptureFixture) -> None:
    assert main(["frontier", *NET, "--budgets", "0.8,0.5,0.3", "--input", "2x3x9x9", "--csv", "f.csv"]) == 0
    assert "params=0.5" in capsys.readouterr().out
    assert main(["frontier", *NET, "--budgets", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["drift"] is None


def test_weights_from_safetensors_and_wrapped_checkpoints(folder: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import save_file

    state = net().state_dict()
    save_file(state, "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, "w.pt")
    for name in ("w.safetensors", "w.pt"):
        assert main(["plan", *NET, "--weights", name]) == 0
    assert main(["plan", "cli_model:Two", "--weights", "w.pt"]) == 1
    assert "conv.weight" in capsys.readouterr().err


def test_a_checkpoint_that_would_run_code_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(nn.Linear(1, 1), "pickled.pt")
    assert main(["plan", *NET, "--weights", "pickled.pt"]) == 1
    assert capsys.readouterr().out == ""


def test_inputs_from_files(folder: Path) -> None:
    pixels = np.zeros((5, 3, 9, 9), np.uint8)
    np.save("x.npy", pixels)
    np.savez("x.npz", x=pixels, y=np.zeros(5))
    torch.save(torch.randn(5, 3, 9, 9), "x.pt")
    for source in ("x.npy", "x.npz:x", "x.pt"):
        arguments = ["--input", source, "--limit", "3", "--batch", "2", "--out", "r.json"]
        assert main(["report", *NET, *arguments]) == 0
        assert convsplit.report.Report.from_json(Path("r.json").read_text()).images == 3


def test_a_folder_of_images(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (folder / "photos").mkdir()
    for number in range(3):
        image.new("RGB", (20, 14), (number * 90, 0, 0)).save(f"photos/{number}.png")
    assert main(["report", *NET, "--input", "photos", "--image-size", "9", "--out", "r.json"]) == 0
    assert convsplit.report.Report.from_json(Path("r.json").read_text()).images == 3


def test_several_and_named_inputs() -> None:
    two = ["cli_model:Two", "--forms", "dw-pw"]
    assert main(["plan", *two, "--input", "1x3x9x9", "--input", "1x1x1x1"]) == 0
    assert main(["plan", *two, "--input", "scale=1x1x1x1", "--input", "x=1x3x9x9"]) == 0
    assert main(["plan", *two, "--input", "scale=1x1x1x1", "--input", "1x3x9x9"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plam"], 2, "did you mean plan?"),
        (["plan", "cli_model:net", "--bugdet", "x"], 2, "did you mean --budget?"),
        (["plan", "cli_model:net", "--budget", "parms=1"], 2, "did you mean params?"),
        (["plan", "cli_model:net", "--budget", "params=2"], 2, "fraction in (0, 1]"),
        (["plan", "cli_model:net", "--forms", "dw-pv"], 2, "did you mean dw-pw?"),
        (["plan", "cli_model:net", "--rank", "0"], 2, "whole number"),
        (["plan", "cli_model:net", "--device", "cudda"], 2, "'cudda' is no device of this machine"),
        (["plan", "cli_model:net", "--budget", "params=0.5", "--rank", "1"], 2, "not allowed with"),
        (["plan", "cli_model:net", "--model-arg", "classes"], 2, "name=value"),
        (["report", "cli_model:net"], 2, "--input"),
        (["bench", "cli_model:net", "--runtime", "torch,onnxrutime"], 2, "did you mean onnxruntime?"),
        (["plan", "cli_model:net", "--runtime", "openvin"], 2, "did you mean openvino?"),
        (["plan", "cli_model:nett"], 1, "did you mean net?"),
        (["plan", "cli_model"], 1, "package.module:callable"),
        (["plan", "no_such_module:net"], 1, "no module no_such_module"),
        (["plan", "cli_model:net", "--model-arg", "clases=3"], 1, "clases"),
        (["plan", "cli_model:net", "--model-arg", "broken=True"], 1, "NoneType"),
        (["plan", *NET, "--input", "1x4x9x9"], 1, "module '0'"),
        (["plan", *NET, "--input", "missing.npy"], 1, "no such file"),
        (["plan", *NET, "--skip", "conv9"], 1, "matches no convolution"),
        (["plan", *NET, "--budget", "params=0.001"], 1, "the smallest that can"),
        (["convert", *NET, "--out", "model.bin"], 1, ".safetensors"),
        (["inspect", "cli_model.py"], 1, "neither"),
        (["inspect", "missing.json"], 1, "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_explained(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "cli_model:nett", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupted_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plan.json").write_text("old")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convsplit.cli.arguments.study", interrupt)
    assert main(["plan", *NET, "--out", "plan.json"]) == 130
    assert Path("plan.json").read_text() == "old"


def test_writing_that_fails_half_way_leaves_nothing(folder: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    before = sorted(folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        write_whole(folder / "new.json", fail)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("plan", "frontier", "budget", "image-size"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_export_writes_a_file_that_was_checked(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", *NET, "--out", "small.safetensors"]) == 0
    command = ["export", "cli_model:net", "small.safetensors", "--input", "2x3x9x9", "--runtime", "torch"]
    assert main([*command, "--dynamic", "0", "--out", "small.pt2"]) == 0
    assert "outputs differ by" in capsys.readouterr().out
    wanted = convsplit.load("small.safetensors", net())
    x = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(torch.export.load("small.pt2").module()(x), wanted(x), rtol=1e-4, atol=1e-4)
    assert main([*command, "--out", "small.bin"]) == 1
    assert "want .onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["plan", "convert", "report", "export", "merge", "frontier", "inspect", "completion"]
)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "--help"]) == 0
    assert "exit codes" in capsys.readouterr().out


def test_bench_prints_and_writes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    cases = ["--batches", "1", "--threads", "1", "--layout", "contiguous", "--seconds", "0.5", "--prefer", "accuracy"]
    given = ["bench", *NET, "--input", "1x3x9x9", "--budgets", "0.6", *cases]
    assert main([*given, "--out", "bench.json", "--csv", "bench.csv"]) == 0
    assert "of promised" in capsys.readouterr().out
    assert len(json.loads(Path("bench.json").read_text())["rows"]) == 1
    assert len(Path("bench.csv").read_text().splitlines()) == 2
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "Sequential"
    assert main(["bench", *NET]) == 2
    assert "--input 1x3x224x224" in capsys.readouterr().err
    assert main([*given, "--batches", "0"]) == 2


@pytest.mark.clock
def test_plans_by_measured_time(folder: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["plan", *NET, "--input", "1x3x9x9", "--budget", "latency=1.0"]
    assert main(given) == 0
    assert "milliseconds of the splittable convolutions" in capsys.readouterr().out
    pytest.importorskip("onnxruntime")
    assert main([*given, "--runtime", "onnxruntime"]) == 0
    assert "inference in onnxruntime" in capsys.readouterr().out
    assert main(["plan", *NET, "--budget", "latency=0.5"]) == 1
    assert "pass example_inputs" in capsys.readouterr().err


def test_a_target_of_speed_is_measured_where_the_model_will_run(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    seen = []

    def search(known: object, quality: object, **choice: object) -> None:
        seen.append(choice)
        raise ValueError("enough")

    monkeypatch.setattr(convsplit.Study, "search", search)
    for command in (["convert", *NET, "--out", "small.safetensors"], ["report", *NET, "--input", "4x3x9x9"]):
        given = ["--calibrate", "8x3x9x9", "--target", "drift=0.3", "--minimise", "latency", "--runtime", "openvino"]
        assert main([*command, *given]) == 1
    assert [choice["stopwatch"].where.name for choice in seen] == ["openvino", "openvino"]


def test_the_page_of_a_target_shows_what_was_tried(folder: Path) -> None:
    pytest.importorskip("jinja2")
    np.save("data.npy", torch.nn.functional.interpolate(torch.randn(96, 3, 4, 4), size=9).numpy())
    call = ["report", *NET, "--calibrate", "data.npy", "--input", "data.npy", "--html", "page.html"]
    assert main([*call, "--target", "drift=0.3"]) == 0
    assert "chosen: Budget(params=" in (folder / "page.html").read_text()
    assert main([*call, "--budget", "params=0.5"]) == 0
    assert "chosen: Budget(params=" not in (folder / "page.html").read_text()


def test_a_target_is_searched_for(folder: Path, capsys: pytest.CaptureFixture) -> None:
    data = torch.nn.functional.interpolate(torch.randn(96, 3, 4, 4), size=9).numpy()
    np.save("data.npy", data)
    call = ["convert", *NET, "--calibrate", "data.npy", "--out", "small.safetensors"]
    assert main([*call, "--target", "drift=0.3", "--minimise", "params"]) == 0
    assert "held-out inputs the output drifts" in " ".join(capsys.readouterr().out.split())
    smaller = convsplit.load("small.safetensors", net())
    assert convsplit.compare(smaller, net(), torch.from_numpy(data)).drift.relative < 0.4
    (folder / "cli_metric.py").write_text("def fit(model):\n    return -float(model[0].weight.abs().max())\n")
    scored = [*call, "--target", "lost=0.1", "--metric", "cli_metric:fit", "--json"]
    assert main(scored) == 0
    told = json.loads(capsys.readouterr().out)["search"]
    assert (told["budget"], told["limit"]) == ("metric", 0.1)
    (folder / "cli_error.py").write_text("def error(model):\n    return float(model[0].weight.abs().max())\n")
    own = ["--target", "lost=0.1", "--metric", "cli_error:error", "--lower-is-better", "--relative", "--json"]
    assert main([*call, *own]) == 0
    told = json.loads(capsys.readouterr().out)["search"]
    assert told["limit"] == pytest.approx(0.1 * float(net()[0].weight.abs().max()))
    assert all(trial["value"] for trial in told["trials"])
    assert main([*call, "--target", "lost=0.1"]) == 2
    assert main([*call, "--target", "speed=0.1"]) == 2
    assert main([*call, "--metric", "cli_metric:fit"]) == 2
