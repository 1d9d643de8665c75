"""Compiled modules: what is inside of them, and how to compile something else with the same options."""

import functools
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

_Context = Callable[[Any], Any]
PREFIX = "_orig_mod"  # the name under which `torch.compile(module)` has `module`


def uncompiled(module: Any) -> Any:
    """Return the module behind ``torch.compile(module)``; anything else as it is."""
    return module._orig_mod if _is_optimized(module) else module


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of ``module`` is compiled: by ``torch.compile(module)``, or in place by ``module.compile()``."""
    return _is_optimized(module) or _context_of_call(module) is not None


def _is_optimized(module: Any) -> bool:
    # Importing the class costs a second, and where nobody has imported it nothing can be compiled. Attributes do not
    # tell: some wrappers pass on those of the module inside.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _context_of_call(module: nn.Module) -> _Context | None:
    """Return what ``module.compile()`` has compiled with; None, if it was not called, or with ``disable=True``."""
    call = module._compiled_call_impl
    if call is None or isinstance(call, types.MethodType):  # disabled, it is the method itself
        return None
    names = call.__code__.co_freevars if isinstance(call, types.FunctionType) else ()
    variables = dict(zip(names, getattr(call, "__closure__", None) or (), strict=True))
    if "self" not in variables:
        raise RuntimeError(
            f"{type(module).__name__} was compiled in place, but not by `module.compile()`, so its options are not "
            "known. Use that, or `torch.compile(module)`, or compile what set-up returns."
        )
    return cast("_Context", variables["self"].cell_contents)


@dataclass(frozen=True)
class Compilation:
    """How a module was compiled, to compile others alike.

    Attributes:
        context: torch's own, which holds the options: it returns what it is called with, compiled.
        in_place: by ``module.compile()``, not by ``torch.compile(module)``.

    """

    context: _Context
    in_place: bool

    @classmethod
    def of(cls, module: nn.Module) -> "Compilation | None":
        """Return how ``module`` is compiled as a whole; None: it is not."""
        if _is_optimized(module):
            return cls(cast("_Context", module.dynamo_ctx), in_place=False)
        context = _context_of_call(module)
        return None if context is None else cls(context, in_place=True)

    @property
    def is_one_graph(self) -> bool:
        """Whether ``fullgraph=True`` was asked for."""
        return bool(getattr(self.context, "fullgraph", False))

    def compile_in_place(self, module: nn.Module) -> None:
        """Do as ``module.compile()``: no name in the module changes, and hooks run outside of the graph."""
        _let_forward_be_traced(module)
        module._compiled_call_impl = self.context(module._call_impl)


def _let_forward_be_traced(module: nn.Module) -> None:
    """Put a frame around ``forward`` if torch traces only what it is called by, as of all classes of its own.

    ``module.compile()`` would compile nothing then, and not say so.
    """
    from torch._dynamo import trace_rules

    if "forward" not in vars(module) and trace_rules.check(module.forward):
        module.__dict__["forward"] = types.MethodType(_traced_forward(type(module)), module)  # type: ignore[arg-type]


@functools.cache
def _traced_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    # what is compiled is kept, up to a limit, for each code object: one for each class
    forward.__code__ = forward.__code__.replace(co_name=f"forward of {cls.__name__}")
    return forward


def without_compilation(module: nn.Module) -> tuple[nn.Module, Compilation | None]:
    """Return what is inside ``module``, no longer compiled as a whole, and how it was; None: it was not.

    Raises:
        ValueError: if the compiled module has hooks of its own, which would be lost with it.

    """
    compilation = Compilation.of(module)
    inner = uncompiled(module)
    if inner is not module and _has_hooks(module):
        raise ValueError(
            f"Hooks were registered on the compiled {type(inner).__name__}, which set-up replaces. Register them on "
            "the model before it is compiled, or on what set-up returns."
        )
    if compilation is not None:
        inner.__dict__.pop("_compiled_call_impl", None)
    return inner, compilation


def compile_whole(
    compilation: Compilation, forward_module: nn.Module, module: nn.Module, check: Callable[[nn.Module], None]
) -> nn.Module:
    """Return ``forward_module``, which runs ``module``, compiled as ``compilation`` says.

    What is to be one graph is ``module``: hooks and wrappers around it are never a part of one. Whether it can be,
    ``check`` says, by raising an error.
    """
    if is_compiled(forward_module):
        return forward_module
    if compilation.is_one_graph:
        check(module)
    wraps = forward_module is not module
    if compilation.is_one_graph if wraps else compilation.in_place:
        compilation.compile_in_place(module)
        return forward_module
    return cast("nn.Module", compilation.context(forward_module))


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def take_out_compiled_parts(module: nn.Module) -> dict[str, Compilation]:
    """Replace each submodule that is ``torch.compile(part)`` by ``part``; return how it was compiled, by its names.

    So names of parameters, and parts found by their class, are as they were before compiling. Compiled parts stay where
    they are if they have hooks of their own, or are excluded from compiling (``torch.compiler.disable(part)``).
    """
    taken: dict[nn.Module, Compilation] = {}
    for parent, name, part in _optimized_parts(module):
        compilation = Compilation.of(part)
        if compilation is not None and _compiles(compilation.context) and not _has_hooks(part):
            inner = parent._modules[name] = uncompiled(part)
            taken[inner] = compilation
    named = uncompiled(module).named_modules(remove_duplicate=False)
    return {name: taken[part] for name, part in named if part in taken}


def compile_parts(module: nn.Module, parts: Mapping[str, Compilation]) -> None:
    """Compile submodules in place, by their names; one that is compiled already stays as it is."""
    for name, compilation in parts.items():
        part = module.get_submodule(name)
        if not is_compiled(part):
            compilation.compile_in_place(part)


def _compiles(context: _Context) -> bool:
    return callable(getattr(context, "callback", None))  # others run without the compiler


def _optimized_parts(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, part)
        for parent in module.modules()
        for name, part in parent._modules.items()
        if part is not None and _is_optimized(part)
    ]


@contextmanager
def names_without_compilation(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, names of parameters and of state have no part that says that a submodule is compiled."""
    replaced = [found for module in modules for found in _optimized_parts(module)]
    for parent, name, part in replaced:
        parent._modules[name] = uncompiled(part)
    try:
        yield
    finally:
        for parent, name, part in replaced:
            parent._modules[name] = part


def name_without_compilation(name: str) -> str:
    """Return ``name``, of a parameter in a compiled module, as it is in the module itself."""
    return ".".join(part for part in name.split(".") if part != PREFIX) if PREFIX in name else name


def begin_no_graph_with(*functions: Callable[..., Any]) -> None:
    """Let the compiler, if it is there, trace ``functions`` as parts of what calls them, but make no graph of one."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:
        for function in functions:
            dynamo.skip_code(function.__code__)


# ---- block by block --------------------------------------------------------------------------------------------------


def blocks_to_compile(module: nn.Module, units: Sequence[nn.Module]) -> list[str]:
    """Return the names of the parts of ``module`` to compile one by one: ``units`` if there are any, else what repeats.

    None of them is inside another.

    Raises:
        ValueError: if there is none.

    """
    blocks = _outermost(units or list(_repeated(module)))
    if not blocks:
        raise ValueError(
            f"_reapply_compile='blocks' compiles each of the blocks that {type(module).__name__} repeats, but it has "
            "none: no `ModuleList`, `ModuleDict` or `Sequential` in it has two blocks of one class. Compile it whole, "
            "with `_reapply_compile=True`, or compile its parts yourself, with `part.compile()`."
        )
    return [name for name, part in module.named_modules() if part in blocks]


def _outermost(parts: Iterable[nn.Module]) -> set[nn.Module]:
    parts = set(parts)
    return parts - {below for part in parts for below in part.modules() if below is not part}


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            elements = [element for element in part._modules.values() if element is not None]
            times = Counter(map(type, elements))
            yield from (element for element in elements if times[type(element)] > 1 and _is_block(element))


def _is_block(element: nn.Module) -> bool:
    """Whether it is called, and is more than a layer of torch's."""
    cls = type(element)
    return cls.forward is not nn.Module.forward and (
        bool(element._modules) or not cls.__module__.startswith("torch.nn.")
    )
