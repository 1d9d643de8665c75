"""Exceptions from a precision: modules that stay in 32 bit, whatever is around them."""

import copyreg
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.text import did_you_mean


class Kept:
    """Which modules stay in 32 bit: by name (of a module, and so of all in it: "head" is not "header") or by class.

    A kept module has its parameters and buffers in float32, and computes in it: its floating-point inputs are cast,
    autocast is off inside, and new tensors are float32 there. It stays the same object; its class becomes one that
    looks like the former and inherits from it.

    Args:
        keep_fp32: full names of modules, such as ``"decoder.head"``, and classes of modules.

    Raises:
        TypeError: for anything else, so for one name that is not in a list.

    """

    def __init__(self, keep_fp32: Iterable[str | type[nn.Module]] = ()) -> None:
        if isinstance(keep_fp32, (str, type)) or not isinstance(keep_fp32, Iterable):
            raise TypeError(
                f"`keep_fp32` is a list of names and classes of modules, but got {keep_fp32!r}. "
                "Pass e.g. ['head', nn.LayerNorm]."
            )
        self.wanted: tuple[str | type[nn.Module], ...] = tuple(keep_fp32)
        for item in self.wanted:
            if not (isinstance(item, str) and item) and not (isinstance(item, type) and issubclass(item, nn.Module)):
                raise TypeError(
                    f"`keep_fp32` has {item!r}, which is neither the name of a module nor a class of modules. "
                    "Pass e.g. ['head', nn.LayerNorm]."
                )
        self._names: list[str] = []
        self._converted: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self.wanted)

    def __repr__(self) -> str:
        return f"[{', '.join(repr(item) if isinstance(item, str) else item.__name__ for item in self.wanted)}]"

    def names(self, module: nn.Module) -> list[str]:
        """Return the full names of the outermost modules of ``module`` that are kept, and remember them.

        In place of a container that is never called, such as a ``ModuleList``, there are the modules in it.

        Raises:
            ValueError: if a name or a class matches nothing, or all; if a kept module is never called, or called
                past its ``forward``.

        """
        module = uncompiled(module)  # it may be compiled on the inside
        named = dict(module.named_modules(remove_duplicate=False))
        chosen = {name: None for item in self.wanted for name in matching(item, named, "keep_fp32")}
        outermost = [name for name in chosen if not is_inside(name, chosen)]
        if "" in chosen:
            raise ValueError(f"keep_fp32 has {type(module).__name__}, the whole model. Use precision='32-true'.")
        self._names = [called for name in outermost for called in _called(name, named[name])]
        for name in self._names:
            _check_is_called(name, named)
        return self._names

    def holds(self, name: str) -> bool:
        """Whether the module of this full name is kept, or in one that is; of the model last given to :meth:`names`."""
        return name in self._names or is_inside(name, self._names)

    __contains__ = holds

    def remarks(self) -> list[str]:
        """Return a sentence that names what was kept, if anything was."""
        return [f"Kept in float32: {', '.join(map(repr, self._converted))}."] if self._converted else []

    def convert(self, module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        """Bring parameters and buffers to ``dtype`` (None: leave them), those of kept modules to float32.

        In place, and floating-point ones alone: not complex ones. Kept modules compute in float32 from now on, and what
        the outermost of them return is cast to ``dtype``. Parameters stay the same objects, so ties and optimizers
        stay true.

        Raises:
            ValueError: as :meth:`names`; or if a tensor is both in a kept module and in one that is not.

        """
        plain = uncompiled(module)
        release(plain)
        outermost = {plain.get_submodule(name) for name in self.names(plain)} if self else set()
        kept = {part for outer in outermost for part in outer.modules()}
        _check_ties(plain, kept)
        own = {id(tensor) for part in kept for tensor in _tensors(part)}

        def convert(tensor: Tensor) -> Tensor:
            to = torch.float32 if id(tensor) in own else dtype
            return tensor if to is None or not tensor.is_floating_point() else tensor.to(to)

        if kept or dtype is not None:
            module._apply(convert)
        for part in kept:
            _compute_in_fp32(part, returns=dtype if part in outermost else None)
        stay_off_fast_paths(plain, kept)
        self._converted.update(dict.fromkeys(self._names))
        return module


def is_kept(module: nn.Module) -> bool:
    """Whether ``module`` was kept in 32 bit, itself or as a part of another."""
    return isinstance(module, ComputesInFp32)


def outermost_kept(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the kept modules in ``module`` that are in no other that is."""
    if is_kept(module):
        yield module
        return
    for child in module.children():
        yield from outermost_kept(child)


def release(module: nn.Module) -> None:
    """Let what a precision has made compute otherwise compute as its class says again; tensors stay as they are."""
    for part in module.modules():
        if "former" in vars(type(part)) and isinstance(part, Recast):
            part.__class__ = type(part).former  # type: ignore[assignment]


# ---- how a kept module computes --------------------------------------------------------------------------------------


class Recast(nn.Module):
    """In the class of a module that a precision has made compute otherwise than the class it had says."""

    former: type[nn.Module]


class ComputesInFp32(Recast):
    """Goes in front of the class of a kept module; a part of the class, so that copies and compilers see it."""

    returns: torch.dtype | None  # None: what it has computed, as it is

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = cast_floating(args, torch.float32)
        kwargs = cast_floating(kwargs, torch.float32)
        device_type = _device_type(self, args)
        if device_type != "meta" and torch.is_autocast_enabled(device_type):  # asking is cheaper than switching it off
            with torch.autocast(device_type, enabled=False):
                output = self._forward(args, kwargs)
        else:
            output = self._forward(args, kwargs)
        return output if self.returns is None else cast_floating(output, self.returns)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with default_dtype(torch.float32):  # the compiler understands one context in a function, and not two
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _new, (self.former, self.returns, *args[1:]), *rest
        return make, args, *rest


@functools.cache
def _class_in_fp32(former: type[nn.Module], returns: torch.dtype | None) -> type[nn.Module]:
    names = {name: getattr(former, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(former.__name__, (ComputesInFp32, former), {**names, "former": former, "returns": returns})


def _new(former: type[nn.Module], returns: torch.dtype | None, *args: Any) -> nn.Module:
    cls = _class_in_fp32(former, returns)  # type: ignore[arg-type]
    return cls.__new__(cls, *args)


def _compute_in_fp32(module: nn.Module, returns: torch.dtype | None) -> None:
    module.__class__ = _class_in_fp32(type(module), returns)  # type: ignore[arg-type]


def _device_type(module: nn.Module, args: tuple[Any, ...]) -> str:
    for tensor in module.parameters():
        return tensor.device.type
    for tensor in (*args, *module.buffers()):
        if isinstance(tensor, Tensor):
            return tensor.device.type
    return "cpu"


def stay_off_fast_paths(module: nn.Module, parts: Collection[nn.Module]) -> None:
    """Let nothing in ``module`` compute with the parameters of ``parts`` in place of calling them.

    A ``TransformerEncoderLayer`` would, in evaluation, unless there are hooks in it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and layer not in parts:
            for part in layer.modules():
                if part in parts and _nothing not in part._forward_pre_hooks.values():
                    part.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    pass


# ---- which modules ---------------------------------------------------------------------------------------------------


def matching(item: str | type[nn.Module], named: Mapping[str, nn.Module], argument: str) -> list[str]:
    """Return the names of the modules that ``item``, a name or a class, stands for; none raises ``ValueError``."""
    whole = type(named[""]).__name__
    if isinstance(item, str):
        found = [item] if item in named else []
        if not found:
            raise ValueError(
                f"{argument}={item!r} names no module of {whole}.{did_you_mean(item, filter(None, named))} "
                "Names are those of `model.named_modules()`."
            )
    else:
        found = [name for name, part in named.items() if isinstance(part, item)]
        if not found:
            raise ValueError(f"{argument} has {item.__name__}, but {whole} has no such module inside. Leave it out.")
    return found


def is_inside(name: str, outer: Collection[str]) -> bool:
    """Whether the module called ``name`` is in one called as ``outer`` says."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in outer:
            return True
    return False


def _called(name: str, module: nn.Module) -> list[str]:
    """``name``; or, as nobody calls the module of this name, those of its parts."""
    if type(module).forward is not nn.Module.forward or "forward" in vars(module):
        return [name]
    if next(_tensors(module), None) is not None:
        raise ValueError(
            f"keep_fp32 has {name!r}, a {type(module).__name__} without a `forward`: what is around it computes with "
            f"its tensors. Keep the module around it instead."
        )
    return [called for key, child in module.named_children() for called in _called(f"{name}.{key}", child)]


def _check_is_called(name: str, named: dict[str, nn.Module]) -> None:
    around = name.rpartition(".")[0]
    if isinstance(named[around], nn.MultiheadAttention):
        raise ValueError(
            f"keep_fp32 has {name!r}, but its parameters are used by the {type(named[around]).__name__} around it. "
            f"Keep {around!r} instead."
        )
    for part in named[name].modules():
        if any(map(is_lazy, part.parameters(recurse=False))):
            raise ValueError(
                f"{name!r} of keep_fp32 has parameters without a shape. Run the model once, before it is set up."
            )
        if "forward" in vars(part) or isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{name!r} of keep_fp32 has a {type(part).__name__} whose `forward` is not that of its class, which "
                "nothing can be put around. Keep the module around it instead, or define `forward` in the class."
            )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor
            if tensor.grad is not None:
                yield tensor.grad


def _check_ties(module: nn.Module, kept: set[nn.Module]) -> None:
    first: dict[int, tuple[str, bool]] = {}
    for name, part in module.named_modules():
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None:
                continue
            full = f"{name}.{key}".lstrip(".")
            other, is_in = first.setdefault(id(tensor), (full, part in kept))
            if is_in != (part in kept):
                raise ValueError(
                    f"{other!r} and {full!r} are one tensor, of which keep_fp32 keeps one alone. Keep both, or neither."
                )
