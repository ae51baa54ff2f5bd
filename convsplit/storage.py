"""Storage: a converted model in one safetensors file, and back from it onto the model that was converted.

The file holds the tensors of the state_dict and, as JSON in the header, a description: which layers are split and
how (read off the live layers, so that a refit or an edit by hand is stored as it is), versions, and a fingerprint
of the architecture with every split layer seen as the convolution it replaces. Nothing in the file is executed, and
no number in it makes memory be taken before it was held against the model and against what the file really holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsplit.choose.options import Option
from convsplit.choose.plan import Plan, PlannedLayer
from convsplit.files import write_whole
from convsplit.forms import KNOWN
from convsplit.kinds import equivalent
from convsplit.layers.separable import SeparableConv
from convsplit.layers.stages import ChannelIndex
from convsplit.model.copies import deep_copy
from convsplit.progress import warn
from convsplit.rewrite import apply_plan
from convsplit.spec import LAYERS, ConvSpec
from convsplit.structure import Structure

M = TypeVar("M", bound=nn.Module)

FORMAT = 1  # raised when files change so that older versions cannot read them
KEY = "convsplit"  # of the description in the safetensors metadata
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names model hubs look for
LONGEST_DESCRIPTION = 16 * 2**20  # characters; some 50,000 layers
MOST_SHOWN = 20  # mismatches spelled out in one error


@dataclass(frozen=True)
class StoredLayer:
    """How one layer is split. `spec` and `pad` (a printed module) are compared with the model's, never built from."""

    name: str
    spec: dict[str, Any]
    pad: str
    form: str
    components: int
    even: bool

    @classmethod
    def of(cls, name: str, layer: SeparableConv) -> StoredLayer:
        """Describe a live layer; its numbers are looked up where they run, since a refit may have added a bias."""
        return cls(
            name, layer.spec.to_json(), printed(layer.stages.get("pad")), layer.form, layer.components, layer.even
        )

    @property
    def bias(self) -> bool:
        return bool(self.spec["bias"])


@dataclass(frozen=True)
class Description:
    """What the header says besides shapes. `modules` maps names to classes, `shared` a tensor's other names to it."""

    versions: dict[str, str]
    fingerprint: str
    modules: dict[str, str]
    layers: tuple[StoredLayer, ...]
    shared: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Of the split layers."""
        return [layer.name for layer in self.layers]


def save(converted: nn.Module, path: str | Path) -> None:
    """Write a converted model to one safetensors file, whole or not at all.

    Args:
        converted: a model with `SeparableConv` layers, also after a refit, fine-tuning or an edit by hand.
        path: the file; an existing one is replaced in one step, so an interrupted save leaves it as it was.

    Raises:
        ValueError: something in the model cannot be stored (extra state that is no tensor, quantised, sparse or
            meta tensors), or a split layer was edited into something `load` could not rebuild; says which.
        OSError: the file cannot be written.

    Warns:
        ConversionWarning: no layer of it is split, as after a library's `fuse()` that builds convolutions anew.

    >>> import convsplit, tempfile
    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
    >>> smaller = convsplit.convert(model, forms="dw-pw", rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(smaller, f"{folder}/smaller.safetensors")
    ...     again = load(f"{folder}/smaller.safetensors", model)
    >>> images = torch.zeros(1, 16, 8, 8)
    >>> torch.equal(smaller(images), again(images))
    True
    """
    tensors, shared = _tensors_to_store(converted)
    description = _describe(converted, shared)
    if not description.layers:
        warn(
            f"no layer of {type(converted).__name__} is split: it is saved as it is. If it was converted, something "
            "has built dense layers in place of split ones since, as fuse() of some libraries does"
        )
    header = {KEY: json.dumps({"format": FORMAT, **asdict(description)}), "format": "pt"}
    write_whole(Path(path), lambda temporary: save_file(tensors, temporary, header))


def save_folder(converted: nn.Module, folder: str | Path, *, config: Mapping[str, Any] | None = None) -> None:
    """Write a folder in the layout of model hubs: model.safetensors and config.json; `load` reads the folder.

    Args:
        converted: as for `save`.
        folder: is made where it does not exist; other files in it stay.
        config: what else config.json should say, such as the arguments that build the model.

    Raises:
        ValueError: as `save`; also where `config` does not go into JSON.

    >>> import convsplit, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_folder(nn.Sequential(convsplit.SeparableConv2d(3, 8, 3)), folder, config={"classes": 10})
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    description = _describe(converted, {})
    facts = {"library_name": "convsplit", "architectures": [type(converted).__name__], **(config or {})}
    facts["convsplit"] = {
        "format": FORMAT,
        "versions": description.versions,
        "fingerprint": description.fingerprint,
        "layers": [asdict(layer) for layer in description.layers],
    }
    try:
        text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config does not go into JSON: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(converted, folder / WEIGHTS)
    write_whole(folder / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load(path: str | Path, model: M, *, strict: bool = True, device: torch.device | str | None = None) -> M:
    """Read a file of `save` onto a copy of the model that was converted.

    Args:
        path: the file, or a folder of `save_folder`.
        model: a fresh instance of the architecture that was converted. Its weights do not matter, and it may be
            on the meta device. It is not changed; it gives class, code, dtype, memory format, `requires_grad` and
            mode.
        strict: False allows classes to differ, casts tensors to the model's dtype, keeps the model's values of
            tensors the file does not have, and leaves out what the model has no place for. Shapes and split
            layers have to fit in any case.
        device: of the result; by default the model's, and the CPU for what is on the meta device.

    Returns:
        a module of the model's own class with the split layers and all tensors of the file.

    Raises:
        ValueError: the file is damaged, not one of convsplit's, or newer than this version; or it does not fit the
            model: lists every layer, tensor and class that differs and says what to do.
        FileNotFoundError: there is no such file.

    >>> load("missing.safetensors", nn.Conv2d(3, 8, 3))
    Traceback (most recent call last):
    FileNotFoundError: no file missing.safetensors
    """
    path = Path(path)
    description, tensors = _read(path / WEIGHTS if path.is_dir() else path)
    problems = list(layer_problems(model, description.layers, tensors))
    rebuildable = not problems
    if strict:
        problems += _class_problems(model, description)
    if rebuildable:
        rebuilt = rebuild(model, description.layers)
        problems += _tensor_problems(rebuilt, tensors, strict)
    if strict and not problems and _architecture(model, description.names)[1] != description.fingerprint:
        problems = ["everything compared agrees, only the fingerprint does not: the file is damaged"]
    if problems:
        raise ValueError(_explain(path, model, problems))
    problems = [
        text for name, layer in _split_layers(rebuilt).items() for text in _channel_problems(name, layer, tensors)
    ]
    if problems:
        raise ValueError(f"{path} is damaged: " + "; ".join(problems))
    rebuilt = off_meta(rebuilt, device or "cpu")
    _fill(rebuilt, tensors)
    return rebuilt if device is None else rebuilt.to(device)


# Writing


def _tensors_to_store(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state_dict as safetensors wants them, and the names under which they appear again."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first_names: dict[int, str] = {}
    memory: set[int] = set()
    for name, value in state_of(model).items():
        _check_storable(name, value)
        first = first_names.setdefault(id(value), name)
        if first != name:
            shared[name] = first
            continue
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors takes no views of one another's memory: windows into a larger block get memory of their own.
        if storage.data_ptr() in memory or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        memory.add(storage.data_ptr())
        tensors[name] = tensor
    return tensors, shared


def state_of(model: nn.Module) -> dict[str, Any]:
    """What torch's own state_dict gives, as it is used: one that the model overrides may rename or leave out."""
    try:
        return nn.Module.state_dict(model, keep_vars=True)
    except TypeError as error:
        raise ValueError(
            f"a part of {type(model).__name__} overrides state_dict in a way that torch cannot call ({error}): give it "
            "the arguments (*args, **kwargs) and hand them to super().state_dict"
        ) from error


def _check_storable(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name!r} in the state_dict is a {type(value).__name__}; only tensors are stored, because reading "
            "anything else could run code. Let get_extra_state return a tensor"
        )
    if is_lazy(value) or value.is_meta:
        raise ValueError(f"{name!r} has no values yet (lazy or on the meta device): there is nothing to save")
    if type(value.data) is not Tensor or value.layout != torch.strided or value.is_quantized:
        kind = "quantised or sparse tensor" if type(value.data) is Tensor else type(value.data).__name__
        raise ValueError(f"{name!r} is a {kind}, not a plain tensor: save before quantising or sharding")


def _describe(model: nn.Module, shared: dict[str, str]) -> Description:
    layers = _split_layers(model)
    for name, layer in layers.items():
        _check_rebuildable(name, layer)
    stored = tuple(StoredLayer.of(name, layer) for name, layer in layers.items())
    modules, fingerprint = _architecture(model, layers)
    return Description(_versions(), fingerprint, modules, stored, shared)


def _split_layers(model: nn.Module) -> dict[str, SeparableConv]:
    """The split layers by their first names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SeparableConv)}


def _check_rebuildable(name: str, layer: SeparableConv) -> None:
    """Refuse at once what `load` would refuse when it is too late: stages that are not what the layer says."""
    spec, built = layer.spec, layer.built_spec
    if spec != built:
        raise ValueError(
            f"the depthwise stage of {name!r} was edited after the layer was made, which load could not repeat: it has "
            f"{spec}, was made with {built}. Make that change in the model before converting it"
        )
    components = None if layer.even else layer.components
    twin = SeparableConv.of(spec, device="meta", form=layer.form, rank=layer.rank, components=components)
    expected, found = _shapes(twin.state_dict()), _shapes(layer.state_dict())
    if expected != found:
        raise ValueError(
            f"the stages of {name!r} were changed into something load cannot rebuild: {layer} has tensors {found}, "
            f"expected {expected}. Put the original kind of stages back, or store the state_dict yourself"
        )
    if problem := layer.edited_stages():
        raise ValueError(f"{name!r} cannot be saved: {problem}")


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...] | str]:
    shaped = {name: isinstance(value, Tensor) and not is_lazy(value) for name, value in tensors.items()}
    return {name: tuple(t.shape) if shaped[name] else type(t).__name__ for name, t in tensors.items()}


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("convsplit")
    except metadata.PackageNotFoundError:  # run from a source tree
        own = "unknown"
    return {"convsplit": own, "torch": str(torch.__version__)}


# The architecture


def _architecture(model: nn.Module, split: Iterable[str]) -> tuple[dict[str, str], str]:
    """Names and classes of all modules, and a hash over them and the shapes of all tensors.

    The modules named in `split` count as the convolution they were or will be, without bias because a refit adds
    one; so a converted model and the model it came from give the same.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    specs = {id(named[name]): spec for name in split if name in named and (spec := _spec(named[name])) is not None}
    convs = {name: specs[id(module)] for name, module in named.items() if id(module) in specs}
    classes = {name: LAYERS[spec.axes, spec.transposed].__name__ for name, spec in convs.items()}
    insides = tuple(f"{name}." if name else "" for name in convs)
    modules = {
        name: classes.get(name, type(module).__name__)
        for name, module in named.items()
        if name in convs or not name.startswith(insides)
    }
    shapes = _shapes({key: value for key, value in state_of(model).items() if not key.startswith(insides)})
    shapes.update({name: spec.weight_shape for name, spec in convs.items()})
    text = json.dumps([modules, shapes], sort_keys=True)
    return modules, hashlib.sha256(text.encode()).hexdigest()


# Reading


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """The description and the tensors under all their names; still on disk, mapped into memory when touched."""
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file, or is damaged: {error}") from error
    if text is None:
        raise ValueError(
            f"{path} was not written by convsplit.save. convsplit.restore(model, path) takes any state_dict of a "
            "converted model"
        )
    with _saying_where(path):
        description = _parse(text)
        for name, source in description.shared.items():
            _require(name not in tensors and source in tensors, f"{name!r} shared with {source!r}")
        tensors.update({name: tensors[source] for name, source in description.shared.items()})
    return description, tensors


@contextmanager
def _saying_where(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"the description in {path} cannot be used: {error}") from error


def _parse(text: str) -> Description:
    """Read a description of which nothing is trusted."""
    _require(len(text) <= LONGEST_DESCRIPTION, f"{len(text)} characters")
    data = _object(json.loads(text, parse_constant=_refuse_constant))
    written = data.get("format")
    versions = _object(data.get("versions"), str)
    if type(written) is int and written > FORMAT:
        raise ValueError(
            f"it has format {written}, written by convsplit {versions.get('convsplit')}; this version reads format "
            f"{FORMAT}. Install a newer convsplit"
        )
    _require(type(written) is int and written == FORMAT, f"format {written!r}")
    _require(isinstance(data.get("layers"), list), "layers that are no list")
    layers = tuple(_parse_layer(layer) for layer in data["layers"])
    _require(len({layer.name for layer in layers}) == len(layers), "a layer listed twice")
    return Description(
        versions=versions,
        fingerprint=str(data.get("fingerprint")),
        modules=_object(data.get("modules"), str),
        layers=layers,
        shared=_object(data.get("shared"), str),
    )


def _parse_layer(data: Any) -> StoredLayer:
    layer = StoredLayer(**_object(data))
    _require(isinstance(layer.name, str), f"layer name {layer.name!r}")
    _require(isinstance(layer.spec, dict) and isinstance(layer.spec.get("bias"), bool), f"spec {layer.spec!r}")
    _require(isinstance(layer.pad, str), f"pad {layer.pad!r}")
    _require(isinstance(layer.form, str) and layer.form in KNOWN, f"form {layer.form!r}")
    _require(type(layer.components) is int and layer.components > 0, f"components {layer.components!r}")
    _require(isinstance(layer.even, bool), f"even {layer.even!r}")
    return layer


def _object(data: Any, values: type = object) -> dict[str, Any]:
    """A JSON object whose values are all of one type."""
    _require(isinstance(data, dict), f"{str(data)[:60]!r} where an object belongs")
    wrong = [key for key, value in data.items() if not isinstance(value, values)]
    _require(not wrong, f"no {values.__name__} under {wrong[:3]}")
    return cast("dict[str, Any]", data)


def _require(fits: bool, found: str) -> None:
    if not fits:
        raise ValueError(f"found {found[:200]}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"found the number {name}")


# Comparing and rebuilding


def layer_problems(model: nn.Module, layers: Iterable[StoredLayer], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What keeps the split layers from being rebuilt in this model; checks every number before it is used."""
    named = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, str] = {}
    for layer in layers:
        module = named.get(layer.name)
        if module is None:
            yield f"the file splits {layer.name!r}, the model has no such module"
            continue
        owner = owners.setdefault(id(module), layer.name)
        if owner != layer.name:
            yield f"{layer.name!r} and {owner!r} are one module in the model, two in the file"
        elif isinstance(module, SeparableConv):
            same = replace(StoredLayer.of(layer.name, module), spec=layer.spec) == layer
            if not same or not _same_spec(layer, module.spec):
                yield f"{layer.name!r} is already split in the model, and otherwise: {module}"
        elif isinstance(original := equivalent(module), str):
            yield f"the file splits {layer.name!r}; in the model, {original}"
        elif not _same_spec(layer, spec := ConvSpec.of(original.conv)):
            yield f"{layer.name!r} has {layer.spec} in the file, {spec.to_json()} in the model"
        elif layer.pad != printed(original.pad):
            pads = [pad or "nothing" for pad in (layer.pad, printed(original.pad))]
            yield f"{layer.name!r} pads by {pads[0]} in the file, {pads[1]} in the model"
        else:
            yield from _size_problems(layer, spec, tensors)


def _spec(module: nn.Module) -> ConvSpec | None:
    """The numbers of a split layer, or of the plain convolution that a module equals."""
    if isinstance(module, SeparableConv):
        return module.spec
    original = equivalent(module)
    return None if isinstance(original, str) else ConvSpec.of(original.conv)


def _same_spec(layer: StoredLayer, spec: ConvSpec) -> bool:
    """Whether the numbers agree; the bias may differ, as a refit adds one."""
    return {**layer.spec, "bias": None} == {**spec.to_json(), "bias": None}


def printed(pad: nn.Module | None) -> str:
    return "" if pad is None else repr(pad)


def _size_problems(layer: StoredLayer, spec: ConvSpec, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A number of components that the file does not really hold would take memory without bound."""
    form = KNOWN[layer.form]
    name = f"{layer.name}.{'depthwise' if form.filters else 'pointwise_in'}.weight".lstrip(".")
    filters = tensors.get(name)
    each = spec.positions if form.filters else spec.in_channels // spec.groups
    if not form.filters and spec.positions > 1:
        yield f"{layer.name!r} has {spec.positions} positions, and cannot be {layer.form}"
    elif layer.components % (form.channels(spec) if layer.even else spec.groups):
        yield f"{layer.name!r} cannot have {layer.components} components over its channels or groups"
    elif filters is None:
        yield f"tensor {name!r} is missing in the file"
    elif filters.numel() != layer.components * each:
        yield f"{name!r} has shape {tuple(filters.shape)}, which is not that of {layer.components} components"
    elif (
        layer.even
        and Structure.of(spec, layer.form, rank=layer.components // form.channels(spec)).components
        != layer.components
    ):
        yield f"{layer.name!r} has {layer.components} components, more than the {form.exact(spec)} that are exact"


def _class_problems(model: nn.Module, description: Description) -> Iterator[str]:
    modules, _ = _architecture(model, description.names)
    for name in {**description.modules, **modules}:
        stored, found = (each.get(name, "no module") for each in (description.modules, modules))
        if stored != found:
            yield f"{name or 'the model'!r} is {stored} in the file, {found} in the model"


def rebuild(model: M, layers: Iterable[StoredLayer]) -> M:
    """A copy of the model with empty split layers."""
    named = dict(model.named_modules(remove_duplicate=False))
    first_names = {id(module): name for name, module in model.named_modules()}
    missing = [layer for layer in layers if not isinstance(named[layer.name], SeparableConv)]
    planned = (_planned(layer, first_names[id(named[layer.name])], named[layer.name]) for layer in missing)
    rebuilt = apply_plan(model, Plan(tuple(planned), model_params=0), initialise=False, progress=False)
    for layer in layers:
        _give_bias(cast(SeparableConv, rebuilt.get_submodule(layer.name)), layer.bias)
    return rebuilt


def _planned(layer: StoredLayer, name: str, conv: nn.Module) -> PlannedLayer:
    spec = _spec(conv)
    assert spec is not None
    structure = Structure(layer.form, layer.components, layer.even)
    return PlannedLayer(name, spec, option=Option(structure, structure.params(spec), macs=None, error=None))


def _give_bias(layer: SeparableConv, bias: bool) -> None:
    """Make the last stage have a bias or none, as the file says."""
    if bias == (layer.bias is not None):
        return
    if bias:
        layer.add_bias()
    else:
        layer.register_parameter("bias", None)


def _tensor_problems(rebuilt: nn.Module, tensors: Mapping[str, Tensor], strict: bool) -> Iterator[str]:
    places = state_of(rebuilt)
    first_names: dict[int, str] = {}
    for name, place in places.items():
        tensor, on_meta = tensors.get(name), isinstance(place, Tensor) and place.is_meta
        if tensor is None:
            if strict or on_meta:
                yield f"tensor {name!r} is missing in the file"
            continue
        yield from _one_tensor_problems(name, tensor, place, strict)
        first = first_names.setdefault(id(place), name)
        if first in tensors and tensors[first] is not tensor and not torch.equal(tensors[first], tensor):
            yield f"{name!r} and {first!r} are one tensor in the model and differ in the file"
    if strict:
        yield from (f"the model has no place for tensor {name!r}" for name in tensors if name not in places)
    stored = {id(place) for place in places.values()}
    yield from (
        f"buffer {name!r} is not part of the state_dict and is on the meta device: build the model on the CPU"
        for name, buffer in rebuilt.named_buffers()
        if buffer.is_meta and id(buffer) not in stored
    )


def _one_tensor_problems(name: str, tensor: Tensor, place: Any, strict: bool) -> Iterator[str]:
    if not isinstance(place, Tensor):
        yield f"{name!r} is a tensor in the file, a {type(place).__name__} in the model"
    elif tensor.shape != place.shape:
        yield f"tensor {name!r} has shape {tuple(tensor.shape)} in the file, {tuple(place.shape)} in the model"
    elif strict and tensor.dtype != place.dtype:
        yield (
            f"tensor {name!r} is {tensor.dtype} in the file, {place.dtype} in the model: cast the model first, "
            f"model.to({tensor.dtype}), or cast the tensors with strict=False"
        )


def off_meta(model: M, device: torch.device | str) -> M:
    """The model with uninitialised memory for what is on the meta device; tied tensors stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if parameter.is_meta:
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
    for buffer in model.buffers():
        if buffer.is_meta:
            memo[id(buffer)] = torch.empty_like(buffer, device=device)
    for stage in model.modules():
        if isinstance(stage, ChannelIndex) and stage.channels.is_meta:
            memo[id(stage.channels)] = torch.tensor(stage.numbers, device=device)
    return cast(M, deep_copy(model, memo)) if memo else model


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    # Through the state_dict of the model: it carries the version numbers that modules ask for when they load.
    state = state_of(model)
    for name in state:
        state[name] = tensors.get(name, state[name])
    nn.Module.load_state_dict(model, state)


def _channel_problems(name: str, layer: SeparableConv, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Channels outside of their group would read or write where they must not."""
    prefix = f"{name}." if name else ""
    for key, stage in layer.stages.items():
        channels = tensors.get(f"{prefix}{key}.channels")
        if isinstance(stage, ChannelIndex) and channels is not None:
            problem = stage.problem(channels.tolist())
            if problem:
                yield f"{key}.channels of {name!r} {problem}"


def _explain(path: Path, model: nn.Module, problems: list[str]) -> str:
    shown = "\n  ".join(text[:400] for text in problems[:MOST_SHOWN])
    more = f"\n  ... and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
    return (
        f"{path} does not fit this {type(model).__name__}:\n  {shown}{more}\nload wants a fresh instance of the "
        "model that was converted (same code, same arguments, before convert)"
    )
