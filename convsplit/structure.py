"""Structure: how one kernel is written as stages, in one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from convsplit.forms import FORMS, KNOWN, POINTWISE, Form, form_named
from convsplit.spec import Axes, ConvSpec


@dataclass(frozen=True)
class Structure:
    """A form, its number of components R, and whether all channels have equally many of them.

    >>> from torch import nn
    >>> spec = ConvSpec.of(nn.Conv2d(8, 16, 3))
    >>> Structure.of(spec, "dw-pw", rank=2)
    Structure(form='dw-pw', components=16, even=True)
    >>> Structure.of(spec, "dw-pw", rank=2).params(spec)
    400
    """

    form: str
    components: int
    even: bool

    @classmethod
    def of(cls, spec: ConvSpec, form: str, *, rank: int | None = None, components: int | None = None) -> Structure:
        """The structure with a rank (by default 1) or a number of components, one of the two.

        `rank` is that of each matrix or tensor which the form factorises: of every input channel's slice for dw-pw and
        of every output channel's for pw-dw, where it is the depth multiplier; of a group's whole kernel for pw-dw-pw,
        where it is the CP rank.

        Raises:
            ValueError: both, neither where the form has no default, a rank below 1, components that do not fit.
        """
        found = form_named(form)
        if not found.filters and spec.positions > 1:
            raise ValueError(f"form {form!r} is for 1x1 kernels; this one has {spec.positions} positions")
        if found.filters and spec.axes == 0:
            raise ValueError(f"form {form!r} filters maps; a linear layer is split as 'pw-pw'")
        both_pointwise = found.expands and found.projects
        if rank is not None and components is not None:
            raise ValueError(f"give rank= or components=, not both (got {rank} and {components})")
        if components is not None:
            if components < 1 or components % spec.groups:
                raise ValueError(f"components={components}: want a positive multiple of groups={spec.groups}")
            # Where each channel is a group of its own, all have equally many in any case.
            alone = found.channels(spec) == spec.groups and components <= found.exact(spec)
            return cls(form, components, both_pointwise or alone)
        if rank is None and both_pointwise:
            raise ValueError(f"form {form!r} wants rank=, the number of components per group")
        rank = 1 if rank is None else rank
        if rank < 1:
            raise ValueError(f"rank={rank}: the rank is at least 1")
        return cls(form, found.components(spec, rank), True)

    @classmethod
    def exact(cls, spec: ConvSpec, form: str) -> Structure:
        """The smallest one that reproduces any kernel of these numbers."""
        return cls(form, form_named(form).exact(spec), True)

    def rank(self, spec: ConvSpec) -> int | None:
        """The rank as given; None where channels have unequal multiplicities."""
        return self.components // form_named(self.form).channels(spec) if self.even else None

    def params(self, spec: ConvSpec) -> int:
        """Parameters of the stages, without bias."""
        return form_named(self.form).params(spec, self.components)

    def macs(self, spec: ConvSpec, input_size: Axes, output_size: Axes) -> int:
        """MACs of the stages for one image."""
        return form_named(self.form).macs(spec, self.components, input_size, output_size)

    def __str__(self) -> str:
        return f"{self.form} {self.components}{'' if self.even else ' uneven'}"


def forms_named(names: str | Sequence[str] | None, *, linear: bool = False, of_one_rank: bool = False) -> list[Form]:
    """The forms of these names; where none are given, those of kernels with several positions.

    `linear`: with the one of linear layers. `of_one_rank`: those in which a rank means the same; by default the two
    where it is the depth multiplier.

    Raises:
        ValueError: an unknown name, an empty list, or forms in which a rank means different things.
    """
    if names is None:
        found = [form for form in FORMS.values() if not (of_one_rank and form.expands and form.projects)]
    else:
        found = [form_named(name) for name in ([names] if isinstance(names, str) else names)]
    if not found:
        raise ValueError(f"forms is empty; name at least one of {', '.join(map(repr, KNOWN))}")
    if linear and POINTWISE not in found:
        found.append(POINTWISE)
    if of_one_rank and len({form.expands and form.projects for form in found}) > 1:
        raise ValueError(
            'rank= is the depth multiplier of "dw-pw" and "pw-dw" and the CP rank of "pw-dw-pw" (of "pw-pw" and linear '
            'layers that of a matrix): say which is meant, forms=("dw-pw", "pw-dw") or forms="pw-dw-pw"'
        )
    return found
