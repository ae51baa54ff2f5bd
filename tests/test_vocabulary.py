"""One word for one thing: the names at the top, and the names of arguments in every public signature."""

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import convsplit
from convsplit import finetune, kinds, measure, passes, repair, storage
from convsplit.studies import Study, StudyOptions

PUBLIC = {
    "convert", "make_plan", "apply_plan", "study", "Study", "Budget", "Plan", "SeparableConv", "SeparableConv2d",
    "refit", "reconstruct", "distill", "compare", "merge", "save", "load", "restore", "for_inference", "Stopwatch",
    "frontier", "bench", "export", "ConversionWarning",
}  # fmt: skip
FUNCTIONS = [
    *(getattr(convsplit, name) for name in sorted(PUBLIC - {"ConversionWarning"})), repair.recalibrate,
    storage.save_folder, kinds.register, finetune.parameter_groups, finetune.kernel_penalty, finetune.check_optimizer,
    passes.SplitConv2d, measure.time_models, Study.plan, Study.convert, Study.apply, Study.frontier,
    Study.search,
]  # fmt: skip
SYNONYMS = {
    "teacher": "original", "student": "converted", "dense_model": "original", "split_model": "converted",
    "inputs": "batches", "loader": "batches", "data": "batches", "images": "batches", "dataset": "batches",
    "example_input": "example_inputs", "sample": "example_inputs", "calibration_data": "calibration",
    "multiplier": "rank", "forward_fn": "forward", "forward_function": "forward", "random_state": "seed",
    "verbose": "progress", "timeout": "seconds",
}  # fmt: skip
ORDER = ["converted", "original", "model", "example_inputs", "batches"]


def arguments(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_front_door_is_small() -> None:
    found = {name for name, value in vars(convsplit).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert found == PUBLIC


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "__qualname__", f.__name__))
def test_signatures_use_one_word_for_one_thing(function: object) -> None:
    wrong = {name: SYNONYMS[name] for name in arguments(function) if name in SYNONYMS}
    assert not wrong, f"arguments with another word for the same thing: {wrong}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "__qualname__", f.__name__))
def test_arguments_come_in_one_order(function: object) -> None:
    found = [name for name in arguments(function) if name in ORDER]
    assert found == sorted(found, key=ORDER.index)


def test_options_of_a_study_are_its_arguments() -> None:
    given = [name for name in arguments(Study) if name not in ("model", "example_inputs")]
    assert list(StudyOptions.__annotations__) == given


def test_words_are_in_the_table() -> None:
    table = (Path(__file__).parents[1] / "docs" / "api.md").read_text().split("## Converting")[0]
    words = set(re.findall(r"`(\w+)`", table))
    assert {*ORDER, *StudyOptions.__annotations__, *set(SYNONYMS.values())} - {"skip", "bake"} <= words
