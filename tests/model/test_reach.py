"""Split layers that a model does not run, and the line that a warning points at."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsplit
from convsplit.model.reach import unused_layers


class Picks(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                x = layer(x)
        return x


class CallsForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer.forward(input=x)
        return x


class Once(nn.Sequential):
    """Runs its layer a second time where that is a Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](self[0](x)) if isinstance(self[0], nn.Conv2d) else self[0](x)


@pytest.mark.parametrize(
    ("kind", "missed"),
    [(Picks, {"0": (1, 0), "1": (1, 0)}), (CallsForward, {}), (nn.Sequential, {}), (Once, {"0": (2, 1)})],
)
def test_layers_that_run_less_often_are_named(kind: type[nn.Sequential], missed: dict[str, Any]) -> None:
    convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
    model = kind(*convs).train()
    plan = convsplit.make_plan(nn.Sequential(*convs), rank=1, forms="dw-pw")
    converted = convsplit.apply_plan(model, plan)
    assert unused_layers(model, converted, torch.zeros(1, 8, 6, 6)) == missed
    assert model.training
    assert not any("forward" in vars(module) for each in (model, converted) for module in each.modules())


HELD: dict[str, nn.Module] = {}


def test_a_forward_that_closes_over_a_layer_runs_the_split_one() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    first = model[0]
    model.forward = lambda x: first(x)  # type: ignore[method-assign]
    assert unused_layers(model, convsplit.convert(model), torch.zeros(1, 8, 6, 6)) == {}


def test_a_forward_that_holds_on_to_the_original() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3)), torch.zeros(1, 8, 6, 6)
    HELD["first"] = model[0]
    model.forward = lambda x: HELD["first"](x)  # type: ignore[method-assign]
    with pytest.warns(convsplit.ConversionWarning, match=r"run less often .*: 0 \(0 of 1 calls\)"):
        converted = convsplit.convert(model, x)
    assert unused_layers(model, converted, x) == {"0": (1, 0)}


def test_a_hook_that_closes_over_the_original_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    first = model[0]
    model.register_forward_hook(lambda module, args, output: first(args[0]))
    with pytest.warns(convsplit.ConversionWarning, match="hold on to parts of the original"):
        convsplit.convert(model)


def test_layers_are_put_in_where_a_model_copies_itself() -> None:
    class BuildsAnew(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> BuildsAnew:
            new = BuildsAnew(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
            new.load_state_dict(self.state_dict())
            return new.train(self.training)

    class Loses(BuildsAnew):
        def __deepcopy__(self, memo: Any) -> Any:
            return nn.Sequential(nn.ReLU())

    layers = nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)
    plan = convsplit.make_plan(nn.Sequential(*layers), exact=True)
    model, x = BuildsAnew(*layers), torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(convsplit.apply_plan(model, plan)(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"__deepcopy__ of Loses .* gives a copy without '2'"):
        convsplit.apply_plan(Loses(*layers), plan)


def test_warnings_point_at_the_users_line() -> None:
    def ignored(*args: Any) -> None: ...

    hooked = nn.Sequential(nn.Conv2d(8, 8, 3))
    hooked[0].register_full_backward_hook(ignored)
    for run in (
        lambda: convsplit.convert(nn.Sequential(nn.ReLU())),
        lambda: convsplit.make_plan(nn.Sequential(nn.ReLU())),
        lambda: convsplit.convert(hooked),
        lambda: convsplit.apply_plan(hooked, convsplit.make_plan(hooked)),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        assert [warning.filename for warning in caught] == [__file__]
