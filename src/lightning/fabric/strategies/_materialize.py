"""From the meta device to parts: allocate what each rank holds, and fill it with the values of the whole."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning.fabric.strategies._dtensor import local_shard, local_tensor
from lightning.fabric.utilities.init_tape import (
    default_generator,
    fill_from_recordings,
    forget_what_is_gone,
    is_recorded,
    recorded_source,
)
from lightning.fabric.utilities.types import _DEVICE

_Agree = Callable[[Tensor], Tensor]


class _Place(NamedTuple):
    """Where a parameter or buffer is: ``module._parameters[name]`` or ``module._buffers[name]``."""

    module: nn.Module
    name: str

    def tensor(self) -> Tensor:
        parameter = self.module._parameters.get(self.name)
        tensor = parameter if parameter is not None else self.module._buffers[self.name]
        assert tensor is not None
        return tensor


class MetaTensors:
    """What a module has on the meta device, remembered before it is sharded: then it can be materialised afterwards.

    That is parameters, buffers, and tensors that are attributes of a submodule, also in lists, tuples and dicts. An
    attribute that is a parameter too, on whichever device, goes on being it.

        meta = MetaTensors.of(module)
        ...                                   # fully_shard, parallelize_module: in place
        if meta:
            meta.materialize(module, device, agree=broadcast)

    Submodules stay the same objects meanwhile, their parameters need not.
    """

    def __init__(self, tensors: dict[_Place, Tensor], attributes: list[Tensor], aliases: dict[_Place, Tensor]) -> None:
        self._tensors = tensors
        self._attributes = attributes
        self._aliases = aliases

    @classmethod
    def of(cls, module: nn.Module) -> "MetaTensors":
        """Remember what is on the meta device in ``module`` and its submodules.

        Raises:
            ValueError: if a parameter is lazy (``nn.LazyLinear`` and the like): what has no shape cannot be sharded.

        """
        lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"Parameters without a shape cannot be shared out: {', '.join(map(repr, lazy))} get theirs in the "
                "first forward. Run one before the module is set up, or use the layers that are told the sizes."
            )
        attributes = _tensors_in_attributes(module)
        aliases = {place: place.tensor() for place in _places(module) if place.tensor() in attributes}
        attributes -= set(aliases.values())
        recorded = [tensor for tensor in attributes if tensor.is_meta and is_recorded(tensor)]
        return cls({place: place.tensor() for place in _meta_places(module)}, recorded, aliases)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._tensors or self._attributes or self._aliases)

    def materialize(
        self,
        module: nn.Module,
        device: _DEVICE,
        agree: _Agree = lambda state: state,
        param_init_fn: Callable[[nn.Module], object] | None = None,
        compute_on: _DEVICE | None = None,
    ) -> None:
        """Allocate everything of ``module`` that is on the meta device on ``device``, and give it its initial values.

        What was made under ``recording_init`` gets, to the bit, the values of a module that was made for real in one
        process. For the rest, ``reset_parameters`` of the submodule that owns it is run with the whole tensors,
        submodule by submodule. Each rank keeps its part of both. There is memory for the parts, and for the whole
        tensors of one submodule (or the few that the recorded computation needs at a time).

        Ties are kept. Parameters are new objects, with the attributes of the former ones: optimizers have to be
        re-pointed. Every rank calls it; what is collective about it is ``agree``.

        Args:
            module: what ``MetaTensors.of`` was called with, sharded or not.
            device: where the parts are allocated.
            agree: returns rank 0's integer tensor (on the CPU), so that all ranks use the same random numbers. A rank
                whose own were different has them back afterwards.
            param_init_fn: called in place of all that with each submodule that owns meta tensors, to replace these
                by initialised ones, whole, as by ``submodule.to_empty(device=..., recurse=False)`` and
                ``submodule.reset_parameters()``.
            compute_on: where whole tensors are; None: on ``device`` too.

        Raises:
            TypeError: there is neither a recording, nor ``param_init_fn``, nor a method ``reset_parameters``. Nothing
                was changed.

        """
        device = torch.device(device)
        compute_on = device if compute_on is None else torch.device(compute_on)
        sources = {} if param_init_fn is not None else self._recorded(module)
        others = _by_module(place for place in _meta_places(module) if place not in sources)
        if param_init_fn is None:
            _check_reset_parameters(others)
        _allocate(module, device)
        attributes = {tensor: _empty_like(tensor, device) for tensor in self._attributes}
        _fill_recorded(sources, attributes, compute_on, agree)
        _replace_attributes(module, attributes | {former: place.tensor() for place, former in self._aliases.items()})
        if others:
            with _common_random_numbers(compute_on, agree):
                for submodule, names in others.items():
                    _initialize(submodule, names, compute_on, param_init_fn)
        for finished in (sources, attributes, self._tensors, self._attributes, self._aliases):
            finished.clear()
        forget_what_is_gone()

    def _recorded(self, module: nn.Module) -> dict[_Place, Tensor]:
        """Return the recorded tensor for each place that has one."""
        found = {}
        for place in _meta_places(module):
            tensor = place.tensor()
            former = self._tensors.get(place, tensor)
            source = former if is_recorded(former) else recorded_source(place.module, place.name)
            converted = source is not former  # `module.to(dtype)` is repeated on the values; nothing else is known
            if source is None or source.shape != tensor.shape or (converted and source.dtype == tensor.dtype):
                continue
            found[place] = source
        return found


def _places(module: nn.Module) -> list[_Place]:
    return [
        _Place(submodule, name)
        for submodule in module.modules()
        for name, tensor in (*submodule._parameters.items(), *submodule._buffers.items())
        if tensor is not None
    ]


def _meta_places(module: nn.Module) -> list[_Place]:
    return [place for place in _places(module) if place.tensor().is_meta]


def _by_module(places: Iterable[_Place]) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for place in places:
        names.setdefault(place.module, []).append(place.name)
    return names


def _check_reset_parameters(modules: dict[nn.Module, list[str]]) -> None:
    for module, names in modules.items():
        if not callable(getattr(module, "reset_parameters", None)):
            raise TypeError(
                f"`{_class_as_made(module).__name__}` has {', '.join(map(repr, names))} on the meta device, "
                "not made under `fabric.init_module(empty_init=True)`, and no method `reset_parameters`, which is "
                "needed to initialise them. Add the method, or create the module under it."
            )


def _class_as_made(module: nn.Module) -> type[nn.Module]:
    """Return the user's class: ``fully_shard`` puts another one in front."""
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))


# ---- allocation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _allocate(module: nn.Module, device: torch.device) -> None:
    """Replace what is on the meta device by memory on ``device`` for this rank's parts; ties are kept."""
    new: dict[Tensor, Tensor] = {}
    for place in _meta_places(module):
        old = place.tensor()
        if old not in new:
            new[old] = _empty_like(old, device)
        setattr(place.module, place.name, new[old])  # some modules keep lists of their parameters up to date by this
    if new:
        module._apply(lambda tensor: tensor)  # by this, `fully_shard` learns of the new ones


def _empty_like(old: Tensor, device: torch.device) -> Tensor:
    new = torch.empty_like(old, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, value)
    return new


# ---- attributes ------------------------------------------------------------------------------------------------------

_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))  # where torch keeps parameters, hooks and so on


def _attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for submodule in module.modules():
        for name, value in list(vars(submodule).items()):
            if name not in _OWN_ATTRIBUTES:
                yield submodule, name, value


def _tensors_in_attributes(module: nn.Module) -> set[Tensor]:
    found: set[Tensor] = set()

    def note(tensor: Tensor) -> Tensor:
        found.add(tensor)
        return tensor

    for _, _, value in _attributes(module):
        _replace_in(value, note, set())
    return found


def _replace_attributes(module: nn.Module, replaced: Mapping[Tensor, Tensor]) -> None:
    for submodule, name, value in _attributes(module):
        new = _replace_in(value, lambda tensor: replaced.get(tensor, tensor), set())
        if new is not value:
            vars(submodule)[name] = new


def _replace_in(tree: Any, new: Callable[[Tensor], Tensor], seen: set[int]) -> Any:
    """Return ``tree`` with ``new`` of its tensors: lists and dicts themselves, tuples only if nothing in them changes.

    Else, a new tuple.
    """
    if isinstance(tree, Tensor):
        return new(tree)
    if not isinstance(tree, (list, tuple, dict)) or id(tree) in seen:
        return tree
    seen.add(id(tree))
    if isinstance(tree, tuple):
        items = [_replace_in(item, new, seen) for item in tree]
        if all(map(is_, items, tree)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    for key, item in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        changed = _replace_in(item, new, seen)
        if changed is not item:
            tree[key] = changed
    return tree


# ---- values ----------------------------------------------------------------------------------------------------------


def _fill_recorded(
    sources: Mapping[_Place, Tensor], attributes: Mapping[Tensor, Tensor], device: torch.device, agree: _Agree
) -> None:
    """Fill the places of ``sources``, and what is to take the place of ``attributes``."""
    places: dict[Tensor, list[_Place]] = {source: [] for source in attributes}
    for place, source in sources.items():
        places.setdefault(source, []).append(place)
    wanted = {source: _keeps_part(places[source], attributes.get(source)) for source in places}
    fill_from_recordings(wanted, device, agree)


def _keeps_part(places: list[_Place], attribute: Tensor | None) -> Callable[[Tensor], None]:
    def keep_part(whole: Tensor) -> None:
        for tensor in {place.tensor() for place in places}:
            _copy_part(whole, tensor)
        if attribute is not None:
            _copy_part(whole, attribute)

    return keep_part


@torch.no_grad()
def _copy_part(whole: Tensor, tensor: Tensor) -> None:
    part = local_shard(whole, tensor) if isinstance(tensor, DTensor) else whole
    local_tensor(tensor).copy_(part)


@contextmanager
def _common_random_numbers(device: torch.device, agree: _Agree) -> Iterator[None]:
    """Inside, generators are in the state on which ranks agree; a rank for which that is another gets its own back."""
    generators = [default_generator(torch.device(kind)) for kind in dict.fromkeys([torch.device("cpu"), device])]
    own = [generator.get_state() for generator in generators]
    common = [agree(state.clone()).to("cpu") for state in own]
    for generator, state in zip(generators, common, strict=True):
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, before, used in zip(generators, own, common, strict=True):
            if not torch.equal(before, used):
                generator.set_state(before)


def _initialize(
    module: nn.Module, names: list[str], device: torch.device, param_init_fn: Callable[[nn.Module], object] | None
) -> None:
    """Initialise the tensors ``names`` of ``module`` as a whole, and keep this rank's part of each."""
    if param_init_fn is not None:
        whole = _stand_in(module, names, torch.device("meta"))
        param_init_fn(whole)
    else:
        whole = _stand_in(module, names, device)
        whole.reset_parameters()  # type: ignore[operator]
    for name in names:
        values, tensor = _Place(whole, name).tensor().detach(), _Place(module, name).tensor()
        if values.is_meta or values.shape != tensor.shape:
            raise TypeError(
                f"`param_init_fn` must initialise {name!r} of `{type(whole).__name__}` with shape "
                f"{tuple(tensor.shape)}, but left it on {values.device} with shape {tuple(values.shape)}. "
                "Let it call `module.to_empty(device=..., recurse=False)` and fill the parameters."
            )
        _copy_part(values, tensor)


@torch.no_grad()
def _stand_in(module: nn.Module, names: list[str], device: torch.device) -> nn.Module:
    """Return a copy of ``module`` with the tensors ``names`` whole, empty and on ``device``; submodules are shared.

    Its other parameters and buffers are copies, so that initialising does not change those of ``module``.
    """

    def whole(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if name in names or isinstance(tensor, DTensor):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        else:
            empty = tensor.detach().clone()
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    cls = _class_as_made(module)
    stand_in = cls.__new__(cls)
    vars(stand_in).update(vars(module))
    for kind in ("_parameters", "_buffers"):
        vars(stand_in)[kind] = {name: whole(name, tensor) for name, tensor in vars(module)[kind].items()}
    return stand_in
