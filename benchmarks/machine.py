"""What a figure was measured on and with, without names of hosts or people."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "convsplit", "torch", "numpy", "tensorly", "tensorly-torch", "torch-pruning", "fasterai", "torchao", "torchvision",
    "timm", "onnx", "onnxruntime", "openvino",
)  # fmt: skip


def machine() -> dict[str, str | int]:
    """Processor, cores and the threads that torch uses; the GPU, where there is one."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": processor(), "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(),
        "system": platform.system(), "architecture": platform.machine(), **gpu,
    }  # fmt: skip


def processor() -> str:
    """The model of the processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    return {"Python": platform.python_version()} | {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    if package == "convsplit":  # as imported, which may be a checkout that is not installed
        import convsplit

        return convsplit.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
