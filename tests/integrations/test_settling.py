"""What becomes of a model whose library has a file in `convsplit.integrations`, also where its version does not fit."""

import subprocess
import sys

import pytest
from torch import nn

import convsplit
from convsplit import rewrite


class Net(nn.Sequential):
    pass


def test_a_version_that_does_not_fit_is_warned_of_and_converted_all_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rewrite, "SETTLED_BY", ("aged_library",))
    monkeypatch.setattr(Net, "__module__", "aged_library.nets")
    with pytest.warns(convsplit.ConversionWarning, match=r"does not fit this version of aged_library"):
        converted = convsplit.convert(Net(nn.Conv2d(8, 16, 3)), forms="dw-pw", rank=1)
    assert isinstance(converted[0], convsplit.SeparableConv)


def test_models_of_no_library_import_none():
    code = (
        "import sys, convsplit; from torch import nn; convsplit.convert(nn.Sequential(nn.Conv2d(8, 16, 3)), rank=1);"
        "print([name for name in sys.modules if name.startswith('convsplit.integrations')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("package", rewrite.SETTLED_BY)
def test_every_file_says_what_its_models_are_and_settles_them(package: str):
    adapter = pytest.importorskip(f"convsplit.integrations.{package}", exc_type=ImportError)
    roots = adapter.ROOT if isinstance(adapter.ROOT, tuple) else (adapter.ROOT,)
    assert all(root.__module__.split(".")[0] == package for root in roots)
    assert callable(adapter.settle)
