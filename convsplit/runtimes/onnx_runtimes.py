"""ONNX Runtime and OpenVINO: both run ONNX files, on the CPU and on as many threads as torch would use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convsplit.folding import folded
from convsplit.model.running import Batch, Forward
from convsplit.runtimes.base import Run, Runtime, clock_of_cpu
from convsplit.runtimes.onnx_layers import timing_graph
from convsplit.runtimes.onnx_models import as_arrays, write_onnx

COPIES = 3  # of a layer in a graph that is timed

Arrays = list[np.ndarray[Any, Any]]
Infer = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class FromOnnx(Runtime):
    """A runtime that reads ONNX files. Models come to it with batch norm folded."""

    layout: str = "its own layout"
    device: str = "cpu"
    copies: int = COPIES

    def clock(self, device: torch.device) -> Callable[[], float]:
        """Time of work on one CPU thread, else the time that passes."""
        return clock_of_cpu(torch.device("cpu")) or super().clock(device)

    def load(self, model: Path | bytes) -> Infer:
        """A function from input arrays to output arrays, on the current number of threads."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, batch: Batch, forward: Forward | None = None) -> Run:
        """Fold, export and load.

        Raises:
            ValueError: the model cannot be exported, or the runtime does not take the file; says why.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(folded(model, batch, forward), batch, path, forward=forward)
            return self._run(self._loaded(path), as_arrays(batch))

    def prepare_layer(self, layer: nn.Module, x: Tensor) -> Run:
        """A graph of the stages, built directly."""
        return self._run(self._loaded(timing_graph(layer, x.shape, self.copies)), as_arrays(x.float()))

    def _loaded(self, model: Path | bytes) -> Infer:
        try:
            return self.load(model)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else repr(error)
            raise ValueError(f"{self.name} {self.version} does not take the ONNX graph: {text}") from error

    @staticmethod
    def _run(infer: Infer, inputs: Arrays) -> Run:
        def once() -> None:
            infer(inputs)

        return once


@dataclass(frozen=True)
class OnnxRuntime(FromOnnx):
    """ONNX Runtime, on the CPU wherever the model is."""

    needs: tuple[str, ...] = ("onnxruntime", "onnx", "onnxscript")
    extra: str = "onnx"

    def load(self, model: Path | bytes) -> Infer:
        """An inference session; fusions and layouts as they come by default."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads of a session that has run spin for a while, on cores that the next one in turn needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def infer(inputs: Arrays) -> Arrays:
            found: Arrays = session.run(None, dict(zip(names, inputs, strict=True)))
            return found

        return infer


@dataclass(frozen=True)
class OpenVino(FromOnnx):
    """OpenVINO's CPU plugin, in the precision of the file: by default it may choose bfloat16 by itself."""

    needs: tuple[str, ...] = ("openvino", "onnx", "onnxscript")
    extra: str = "openvino"

    def load(self, model: Path | bytes) -> Infer:
        """A compiled model for latency; not pinned to cores, where other work on the machine would hold it up."""
        import openvino

        core = openvino.Core()
        read = core.read_model(model if isinstance(model, bytes) else str(model))
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        request = core.compile_model(read, "CPU", settings).create_infer_request()

        def infer(inputs: Arrays) -> Arrays:
            results = request.infer(dict(enumerate(inputs)), share_inputs=True)
            return [results[index] for index in range(len(results))]

        return infer
