"""Data loaders: what they hold, and how to build one again with a sampler that shares the data among ranks."""

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper, _num_cpus_available
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import pl_worker_init_function


class AttributeDict(dict[str, Any]):
    """A dictionary whose keys are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0)
        return "\n".join(f'"{key}":{"":{width - len(str(key))}} {value}' for key, value in sorted(self.items()))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *map(str, self)]

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        # one call: loading with `weights_only=True` fills no subclass of dict item by item
        return type(self), (dict(self),)


# ---- questions ---------------------------------------------------------------------------------------------------


def has_iterable_dataset(dataloader: object) -> bool:
    """Return whether the loader's data set is an ``IterableDataset``, which has no indices to sample."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def sized_len(obj: object) -> int | None:
    """Return ``len(obj)``, or ``None`` if it has no length."""
    try:
        return len(obj)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return how many workers each of ``local_world_size`` data loaders on this machine should have at most.

    One core of each process is left to the process itself; the result is at least 1. Below 1: ``ValueError``.
    """
    if local_world_size < 1:
        raise ValueError(f"`local_world_size` must be 1 or more, but got {local_world_size!r}.")
    return max(1, _num_cpus_available() // local_world_size - 1)


def needs_distributed_sampler(dataloader: DataLoader) -> bool:
    """Return whether the loader has samples to share among ranks, and no sampler that does so already."""
    if has_iterable_dataset(dataloader):
        return False
    return not any(
        isinstance(sampler, DistributedSampler) or hasattr(sampler, "num_replicas") for sampler in _samplers(dataloader)
    )


def _samplers(dataloader: Any) -> list[Any]:
    """The loader's sampler, its batch sampler, and the samplers in these: those that it has, each once."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    sampler = getattr(dataloader, "sampler", None)
    found = (sampler, getattr(sampler, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _set_sampler_epoch(dataloader: object, epoch: int) -> None:
    """Tell every sampler of the loader that wants to know which epoch begins."""
    for sampler in _samplers(dataloader):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)


def _auto_add_worker_init_fn(dataloader: DataLoader, rank: int) -> None:
    """Seed the loader's workers if ``PL_SEED_WORKERS=1`` and the user has no ``worker_init_fn``."""
    if os.environ.get("PL_SEED_WORKERS", "0") == "1" and getattr(dataloader, "worker_init_fn", None) is None:
        dataloader.worker_init_fn = functools.partial(pl_worker_init_function, rank=rank)


# ---- a sampler for each rank -------------------------------------------------------------------------------------


def distribute_dataloader(dataloader: DataLoader, num_replicas: int, rank: int, seed: int | None = None) -> DataLoader:
    """Return a loader like ``dataloader`` that yields the share of ``rank``; the same one if it need not change.

    Sequential loaders stay in order and shuffled ones are shuffled anew each epoch, both exactly as with a
    ``torch.utils.data.DistributedSampler``. Other samplers are wrapped and keep their order.
    ``seed=None``: the value of ``PL_GLOBAL_SEED``, else 0.

    Raises:
        MisconfigurationException, TypeError: the loader's class, or that of its batch sampler, cannot be built again.
    """
    if not needs_distributed_sampler(dataloader):
        return dataloader
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
    share: dict[str, Any] = {"num_replicas": num_replicas, "rank": rank, "seed": seed}
    batch_sampler = dataloader.batch_sampler
    if batch_sampler is not None and not hasattr(batch_sampler, "sampler"):
        # It makes batches out of nothing that could be shared, so share out the batches.
        return _rebuild_loader(dataloader, batch_sampler=DistributedSamplerWrapper(batch_sampler, **share))
    sampler = _base_sampler(dataloader)
    if _is_plain(sampler, SequentialSampler, dataloader):
        return _update_dataloader(dataloader, DistributedSampler(dataloader.dataset, shuffle=False, **share))
    if _is_plain(sampler, RandomSampler, dataloader):
        return _update_dataloader(dataloader, DistributedSampler(dataloader.dataset, shuffle=True, **share))
    return _update_dataloader(dataloader, DistributedSamplerWrapper(sampler, **share))


def _base_sampler(dataloader: DataLoader) -> Any:
    """The sampler of single samples: a batch sampler of the user's has its own, and then the loader's is not used."""
    return getattr(dataloader.batch_sampler, "sampler", dataloader.sampler)


def _is_plain(sampler: Any, kind: type[Sampler], dataloader: DataLoader) -> bool:
    """Whether the sampler yields each index of the data set once, so that a ``DistributedSampler`` can replace it."""
    size = sized_len(dataloader.dataset)
    return type(sampler) is kind and not getattr(sampler, "replacement", False) and size == sized_len(sampler)


def _update_dataloader(dataloader: DataLoader, sampler: Any) -> DataLoader:
    """Return a loader like ``dataloader`` that draws its samples from ``sampler``."""
    batch_sampler = dataloader.batch_sampler
    if batch_sampler is None or dataloader.batch_size is not None:
        return _rebuild_loader(dataloader, sampler=sampler)
    new = _rebuild(batch_sampler, {"sampler": sampler}, BatchSampler)
    if getattr(new, "sampler", None) is not sampler:
        raise MisconfigurationException(
            f"`{type(new).__name__}` does not use the `sampler` that its `__init__` gets, so it cannot share its "
            f"samples among processes. {_WAY_OUT}"
        )
    return _rebuild_loader(dataloader, batch_sampler=new)


_WAY_OUT = "Or pass `use_distributed_sampler=False` to `setup_dataloaders` and share the samples yourself."
_PLAIN_SETTINGS = ("num_workers", "pin_memory", "timeout", "prefetch_factor", "persistent_workers", "in_order")


def _rebuild_loader(dataloader: DataLoader, sampler: Any = None, batch_sampler: Any = None) -> DataLoader:
    """Build ``dataloader`` again with one of the two samplers, and check that the new one is what was asked for."""
    changes: dict[str, Any] = {"sampler": sampler, "batch_sampler": batch_sampler, "shuffle": False}
    kept: tuple[str, ...] = _PLAIN_SETTINGS
    if batch_sampler is None:
        changes |= {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
        kept += ("batch_size", "drop_last")
    else:
        changes |= {"batch_size": 1, "drop_last": False}
    new = _rebuild(dataloader, changes, DataLoader)
    lost = [name for name in kept if getattr(new, name, None) != getattr(dataloader, name, None)]
    lost += [name for name in ("sampler", "batch_sampler") if changes[name] not in (None, getattr(new, name))]
    if lost:
        raise MisconfigurationException(
            f"`{type(dataloader).__name__}` cannot be built again with a sampler that shares the samples among "
            f"processes: its `__init__` does not pass {_listed(lost)} on to `DataLoader.__init__`. Pass the arguments "
            f"on. {_WAY_OUT}"
        )
    return new


# ---- building an object again ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """How an object was made: the arguments of its class, and the attributes that it had afterwards."""

    owner: type  # the class whose `__init__` got the arguments
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attributes: dict[str, Any]


_MADE = "_fabric_made"
_NOT_CARRIED = {_MADE, "sampler", "batch_sampler", "batch_size", "drop_last", "_iterator"}


@contextmanager
def _replace_dunder_methods(base_cls: type, store_explicit_arg: str | None = None) -> Iterator[None]:
    """Inside, every new object of ``base_cls`` and its subclasses notes the arguments that it was made with.

    Loaders and batch samplers are built again from them. ``store_explicit_arg`` names an argument that the object
    also keeps as the attribute ``__<name>``.
    """
    patched = {cls: cls.__dict__["__init__"] for cls in _subclasses(base_cls) if "__init__" in cls.__dict__}
    for cls, init in patched.items():
        cls.__init__ = _noting(cls, init, store_explicit_arg)  # type: ignore[misc]
    try:
        yield
    finally:
        for cls, init in patched.items():
            cls.__init__ = init  # type: ignore[misc]


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def _noting(cls: type, init: Callable[..., None], explicit: str | None) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if _MADE in vars(self):  # called by the `__init__` of a subclass, which notes its own arguments
            init(self, *args, **kwargs)
            return
        vars(self)[_MADE] = None
        init(self, *args, **kwargs)
        vars(self)[_MADE] = _Made(cls, args, kwargs, dict(vars(self)))
        if explicit is not None:
            given = inspect.signature(init).bind(self, *args, **kwargs).arguments
            if explicit in given:
                vars(self)[f"__{explicit}"] = given[explicit]

    return __init__


def _rebuild(obj: Any, changes: dict[str, Any], base: type) -> Any:
    """Return a new object like ``obj``, with ``changes`` to the arguments of ``base``.

    Its arguments are those noted when ``obj`` was made, else the attributes of ``obj`` with the names of arguments.
    """
    cls = type(obj)
    own = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    made: _Made | None = vars(obj).get(_MADE)
    if made is not None and made.owner is not _definer_of_init(cls):
        made = None  # the class was defined after the noting began, and its own arguments were not noted
    arguments = _guessed_arguments(obj, own, takes_any, base) if made is None else _noted_arguments(obj, made, base)
    unset = {name: parameter.default for name, parameter in inspect.signature(base).parameters.items()}
    unset["shuffle"] = False
    for name, value in changes.items():
        name = _own_name(name, obj, arguments, own)
        arguments.pop(name, None)
        if name in own or (takes_any and value != unset[name]):
            arguments[name] = value
        elif value is not None and name in ("sampler", "batch_sampler"):
            raise TypeError(
                f"`{cls.__name__}` cannot be built again with another `{name}`: its `__init__` does not take that "
                f"argument. Add it, or `**kwargs` that are passed on to `{base.__name__}.__init__`. {_WAY_OUT}"
            )
    new = _make(cls, arguments)
    _carry_over(obj, made, new, base)
    return new


def _definer_of_init(cls: type) -> type:
    return next(parent for parent in cls.__mro__ if "__init__" in parent.__dict__)


def _own_name(name: str, obj: Any, arguments: dict[str, Any], own: Mapping[str, Any]) -> str:
    """The name under which the class takes the sampler, if it has one of its own for it."""
    present = getattr(obj, name, None)
    if name in own or not isinstance(present, Iterable):
        return name
    return next((other for other, value in arguments.items() if value is present and other in own), name)


def _noted_arguments(obj: Any, made: _Made, base: type) -> dict[str, Any]:
    signature = inspect.signature(made.owner.__init__)  # type: ignore[misc]
    bound = signature.bind(obj, *made.args, **made.kwargs)
    arguments: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:  # for `base`, whose attributes tell them by name
            arguments |= _attributes(obj, inspect.signature(base).parameters)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        else:
            arguments[name] = value
    return arguments


def _guessed_arguments(obj: Any, own: Mapping[str, inspect.Parameter], takes_any: bool, base: type) -> dict[str, Any]:
    arguments = _attributes(obj, own)
    missing = [
        name
        for name, parameter in own.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in arguments
        and name not in _NOT_CARRIED
        and name != "shuffle"
    ]
    if missing:
        raise MisconfigurationException(
            f"`{type(obj).__name__}` cannot be built again with a sampler that shares the samples among processes: its "
            f"`__init__` needs {_listed(missing)}, which the object does not have as attributes. Set "
            f"{', '.join(f'`self.{name} = {name}`' for name in missing)} in `__init__`. {_WAY_OUT}"
        )
    for parent in type(obj).__mro__[1:] if takes_any else ():
        if "__init__" in parent.__dict__:
            parameters = inspect.signature(parent.__init__).parameters  # type: ignore[misc]
            arguments = _attributes(obj, parameters, but_defaults=True) | arguments
        if parent is base:
            break
    return arguments


def _attributes(obj: Any, parameters: Mapping[str, inspect.Parameter], but_defaults: bool = False) -> dict[str, Any]:
    """The values of the attributes of ``obj`` that have the name of one of ``parameters``."""
    found = {}
    for name, parameter in parameters.items():
        if name in vars(obj) or isinstance(getattr(type(obj), name, None), property):
            value = getattr(obj, name)
            if not (but_defaults and value is parameter.default):
                found[name] = value
    return found


def _make(cls: type, arguments: dict[str, Any]) -> Any:
    """``cls(**arguments)``, without those that ``cls`` itself passes to the class above it."""
    while True:
        try:
            return cls(**arguments)
        except TypeError as error:
            twice = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
            if twice is None or arguments.pop(twice[1], None) is None or twice[1] in ("sampler", "batch_sampler"):
                raise TypeError(_cannot_make(cls, arguments, error)) from error
        except ValueError as error:
            raise MisconfigurationException(_cannot_make(cls, arguments, error)) from error


def _cannot_make(cls: type, arguments: dict[str, Any], error: Exception) -> str:
    return (
        f"`{cls.__name__}` cannot be built again with a sampler that shares the samples among processes: "
        f"`{cls.__name__}({', '.join(f'{name}=...' for name in arguments)})` raised {error!r}. Make its `__init__` "
        f"take these arguments and pass on those that it does not use itself. {_WAY_OUT}"
    )


def _carry_over(obj: Any, made: _Made | None, new: Any, base: type) -> None:
    """Give ``new`` the attributes that ``obj`` did not get from its arguments."""
    arguments_of_base = inspect.signature(base).parameters
    samplers = _samplers(obj)
    for name, value in vars(obj).items():
        if made is None:
            theirs = name not in arguments_of_base and (name not in vars(new) or not name.startswith("_"))
        else:
            theirs = made.attributes.get(name, made) is not value
        if theirs and name not in _NOT_CARRIED and not any(value is sampler for sampler in samplers):
            vars(new)[name] = value  # a loader refuses `setattr` of some


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
