"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import convsplit

MODULES = [name for _, name, _ in pkgutil.walk_packages(convsplit.__path__, "convsplit.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name == "convsplit.__main__":
        return
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "convsplit": convsplit}
    failures, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failures
