"""Many conversions in one process, and what they leave behind: memory, objects, threads, files."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networks
import public

import convsplit

WARM = 10  # conversions after which nothing may grow any more
MEGABYTES = 32.0  # that the process may hold more at the end: allocators keep some of what is freed
OBJECTS = 0.01  # share of Python's objects that may be added: caches of torch, bounded, still fill


@dataclass(frozen=True)
class Held:
    """What the process holds; `files` are open ones. Memory and files are 0 where the system does not tell."""

    megabytes: float
    objects: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = Path("/proc/self/statm")
        megabytes = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages.exists() else 0.0
        files = len(list(Path("/proc/self/fd").iterdir())) if pages.exists() else 0
        return cls(megabytes, len(gc.get_objects()), threading.active_count(), files)


def runnable(seed: int = 0) -> Iterator[networks.Case]:
    """Random networks without end, all different."""
    rng = random.Random(seed)
    while True:
        case = networks.drawn(random.Random(rng.randrange(2**32)))
        if networks.runs(case):
            yield case


def soak(conversions: int) -> tuple[Held, Held]:
    """What was held after the first ten conversions, and after all; each is saved, loaded and merged too."""
    early = Held.now()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", convsplit.ConversionWarning)
        path = Path(folder) / "model.safetensors"
        for index, case in zip(range(conversions), runnable(), strict=False):
            calibration = [case.inputs] if index % 2 else None
            converted = public.convert(case.model, case.inputs, calibration)
            convsplit.save(converted, path)
            convsplit.merge(convsplit.load(path, case.model))
            assert [each.name for each in Path(folder).iterdir()] == [path.name], "a file is left"
            del case, converted
            if index + 1 == WARM:
                early = Held.now()
        return early, Held.now()


def check(early: Held, late: Held) -> None:
    """Nothing grew."""
    assert late.threads <= early.threads, f"{late.threads - early.threads} threads are left"
    assert late.files <= early.files, f"{late.files - early.files} open files are left"
    assert late.objects <= early.objects * (1 + OBJECTS), f"{late.objects - early.objects} objects are left"
    assert late.megabytes <= early.megabytes + MEGABYTES, f"{late.megabytes - early.megabytes:.0f} MB are left"
