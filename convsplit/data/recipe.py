"""Values of a run by how to get at them in another run, at a moment when they may not be there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

DEEPEST = 12  # operations between a value and the places that it is computed from


@dataclass(frozen=True)
class Place:
    """Where a value of a run can be had: what a module takes, or what it gives."""

    module: str
    given: bool  # by the module; otherwise taken


@dataclass(frozen=True)
class Recipe:
    """How to get at a value: from a place, as a parameter of that name, or by a function of such values."""

    place: Place | None = None
    parameter: str = ""
    function: Any = None  # an overload of torch.ops
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def walk(self) -> Iterator[Recipe]:
        """Itself and all recipes that it makes use of."""
        yield self
        for each in tree_leaves(self.arguments):
            if isinstance(each, Recipe):
                yield from each.walk()

    def value(self, at: Callable[[Place], Tensor | None], state: Mapping[str, Tensor]) -> Tensor | None:
        """The value in a run, or None where that was not at all of the places."""
        if self.place is not None:
            return at(self.place)
        if self.function is None:
            return state.get(self.parameter)
        leaves, shape = tree_flatten(self.arguments)
        values = [each.value(at, state) if isinstance(each, Recipe) else each for each in leaves]
        if any(value is None and isinstance(each, Recipe) for each, value in zip(leaves, values, strict=True)):
            return None
        args, kwargs = tree_unflatten(values, shape)
        if self.function._schema.is_mutable:
            args = (args[0].clone(), *args[1:])
        answer = self.function(*args, **kwargs)
        first: Tensor = answer[0] if isinstance(answer, tuple | list) else answer
        return first


@dataclass
class Name:
    """One value: the places where it was seen, from when to when, and the operation that made it."""

    places: list[tuple[Place, int, float]] = field(default_factory=list)
    made: tuple[Any, tuple[tuple[Any, ...], dict[str, Any]]] | None = None  # a function, its arguments (of names)
    parameter: str = ""


def resolved(name: Name, moment: int, again: Mapping[str, int], depth: int = 0) -> Recipe | None:
    """How to get at a value by a moment of a run; None where there is no way.

    From the moment when a module is called `again`, something else is to be had at its places.
    """
    if name.parameter:
        return Recipe(parameter=name.parameter)
    for place, start, end in name.places:
        if start <= moment < min(end, again.get(place.module, end)):
            return Recipe(place)
    if name.made is None or depth == DEEPEST:
        return None
    function, arguments = name.made
    names = {id(each): each for each in tree_leaves(arguments) if isinstance(each, Name)}
    recipes = {key: resolved(each, moment, again, depth + 1) for key, each in names.items()}
    if None in recipes.values():
        return None
    return Recipe(function=function, arguments=tree_map(lambda each: recipes.get(id(each), each), arguments))
