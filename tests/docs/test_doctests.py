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
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        assert name.startswith("convsplit.integrations.")
        pytest.skip(f"a library that is not installed: {error}")
    names = {"torch": torch, "nn": nn, "convsplit": convsplit}
    failures, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failures
