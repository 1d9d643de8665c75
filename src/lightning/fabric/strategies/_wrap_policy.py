"""Which submodules are treated as a unit: a module tree in, a list of its submodules out. Changes nothing."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

Choice: TypeAlias = Callable[[nn.Module, Collection[nn.Module]], set[nn.Module]]
"""Takes a module and the submodules to leave alone, and returns those of its submodules that the user wants."""


class Tie(NamedTuple):
    """A parameter that is used in several units, which therefore cannot be units; all by their names."""

    parameters: tuple[str, ...]
    units: tuple[str, ...]


class Units(NamedTuple):
    """The submodules to treat as a unit, each after those inside it, and what could not be one."""

    modules: list[nn.Module]
    ties: list[Tie]


def choice_of(policy: Any, argument: str) -> Choice | None:
    """Return what the user means by ``policy``, or None if that is None.

    Layer classes (a set or a list of them, or one), ``ModuleWrapPolicy``, ``CustomPolicy``, or a function
    ``(module, recurse, nonwrapped_numel) -> bool``; anything else raises ``TypeError`` with the name of ``argument``.
    """
    if policy is None:
        return None
    if isinstance(policy, ModuleWrapPolicy):
        return _ByClass(tuple(policy._module_classes))
    if isinstance(policy, CustomPolicy):
        return _ByEach(policy._lambda_fn, argument)
    classes = (policy,) if isinstance(policy, type) else policy
    if isinstance(classes, (set, frozenset, list, tuple)):
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                raise TypeError(f"`{argument}` takes classes of layers, but one of those given is {cls!r}.")
        return _ByClass(tuple(classes))
    if callable(policy):
        return _ByQuestions(policy)
    raise TypeError(
        f"`{argument}` must be a set of layer classes, a policy of `torch.distributed.fsdp.wrap` or a function "
        f"`(module, recurse, nonwrapped_numel) -> bool`, but got {policy!r}."
    )


@dataclass(frozen=True)
class _ByClass:
    """Every instance of some classes."""

    classes: tuple[type[nn.Module], ...]

    def __call__(self, module: nn.Module, ignored: Collection[nn.Module]) -> set[nn.Module]:
        return {part for part in module.modules() if isinstance(part, self.classes) and part not in ignored}


@dataclass(frozen=True)
class _ByEach:
    """Every submodule for which a function says True."""

    wanted: Callable[[nn.Module], bool | dict[str, Any]]
    argument: str

    def __call__(self, module: nn.Module, ignored: Collection[nn.Module]) -> set[nn.Module]:
        return {
            part for name, part in module.named_modules() if part not in ignored and self._is_wanted(name or "it", part)
        }

    def _is_wanted(self, name: str, part: nn.Module) -> bool:
        answer = self.wanted(part)
        if not isinstance(answer, (bool, dict)):
            raise TypeError(
                f"The function in `{self.argument}` must return a bool, but returned {answer!r} for {name}."
            )
        if answer and isinstance(answer, dict):
            raise ValueError(
                f"The function in `{self.argument}` returned options for {name}: {answer!r}. Options are the same for "
                "all submodules: return True, and set them for the strategy."
            )
        return bool(answer)


@dataclass(frozen=True)
class _ByQuestions:
    """As a function decides that is asked top down whether to look inside, and bottom up whether to take a module.

    It is told how many elements the parameters have that are in no unit yet.
    """

    answer: Callable[..., bool]

    def __call__(self, module: nn.Module, ignored: Collection[nn.Module]) -> set[nn.Module]:
        chosen: set[nn.Module] = set()
        left_alone = {parameter for part in ignored for parameter in part.parameters()}
        self._choose(module, ignored, left_alone, chosen, is_root=True)
        return chosen

    def _choose(
        self,
        module: nn.Module,
        ignored: Collection[nn.Module],
        left_alone: Collection[Tensor],
        chosen: set[nn.Module],
        is_root: bool = False,
    ) -> int:
        """Add to ``chosen``, and return how many elements are in units then."""
        numel = sum(parameter.numel() for parameter in module.parameters() if parameter not in left_alone)
        if not self.answer(module=module, recurse=True, nonwrapped_numel=numel):
            return 0
        children = [child for child in module.children() if child not in ignored]
        taken = sum(self._choose(child, ignored, left_alone, chosen) for child in children)
        if not is_root and self.answer(module=module, recurse=False, nonwrapped_numel=numel - taken):
            chosen.add(module)
            return numel
        return taken


def units_to_shard(
    root: nn.Module,
    choice: Choice | None,
    ignored: Collection[nn.Module] = (),
    ignored_parameters: Collection[Tensor] = (),
) -> Units:
    """Return the submodules whose parameters are gathered and freed together; the remaining ones are with ``root``.

    ``root`` itself is not among them. A module that has no ``forward`` gives way to its children, one without
    parameters is left out. Whatever shares a parameter ends up in the same unit.
    """
    if choice is None:
        return Units([], [])
    chosen = _with_forward(root, choice(root, ignored))
    chosen = {part for part in chosen if any(p not in ignored_parameters for p in part.parameters())}
    chosen, ties = _without_shared_parameters(root, chosen, ignored_parameters)
    return Units(_inner_first(root, chosen), ties)


def modules_to_checkpoint(root: nn.Module, choice: Choice | None) -> list[nn.Module]:
    """Return the submodules, without ``root``, whose activations are computed again in backward."""
    return [] if choice is None else _inner_first(root, _with_forward(root, choice(root, ())))


def _with_forward(root: nn.Module, chosen: set[nn.Module]) -> set[nn.Module]:
    """Replace modules that are never called by what is called in them."""
    used_past_their_forward = {
        part for module in root.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
    } - {module for module in root.modules() if isinstance(module, nn.MultiheadAttention)}
    result: set[nn.Module] = set()
    for module in chosen:
        result.update(_called(module))
    return result - used_past_their_forward - {root}


def _called(module: nn.Module) -> Iterator[nn.Module]:
    if type(module).forward is not nn.Module.forward or "forward" in vars(module):
        yield module
        return
    for child in module.children():
        yield from _called(child)


def _inner_first(root: nn.Module, chosen: Collection[nn.Module]) -> list[nn.Module]:
    ordered: list[nn.Module] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        for child in module.children():
            visit(child)
        if module in chosen:
            ordered.append(module)

    visit(root)
    return ordered


# ---- parameters that several modules share ---------------------------------------------------------------------------


def _without_shared_parameters(
    root: nn.Module, chosen: set[nn.Module], ignored: Collection[Tensor]
) -> tuple[set[nn.Module], list[Tie]]:
    """Drop units, until no parameter is in two of them: those that share one, except a unit around all the others."""
    paths = dict(root.named_modules(remove_duplicate=False))
    uses = _uses(paths, ignored)
    ties: list[Tie] = []
    while True:
        for parameter_paths in uses:
            units = {_unit_of(path.rpartition(".")[0], paths, chosen) for path in parameter_paths}
            inner = _inner_of(units, paths)
            if inner:
                break
        else:
            return chosen, ties
        ties.append(Tie(tuple(parameter_paths), tuple(sorted(inner))))
        chosen = chosen - {paths[path] for path in inner}


def _uses(paths: Mapping[str, nn.Module], ignored: Collection[Tensor]) -> list[Sequence[str]]:
    """The names of each parameter that has more than one."""
    names: dict[Tensor, list[str]] = {}
    for path, module in paths.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in ignored:
                names.setdefault(parameter, []).append(f"{path}.{name}")
    return [given for given in names.values() if len(given) > 1]


def _unit_of(path: str, paths: Mapping[str, nn.Module], chosen: Collection[nn.Module]) -> str:
    """The path of the innermost unit around the module at ``path``; empty for the root."""
    while path and paths[path] not in chosen:
        path = path.rpartition(".")[0]
    return path


def _inner_of(units: set[str], paths: Mapping[str, nn.Module]) -> set[str]:
    """Those that are not around all the others, if they are different modules."""
    if len({paths[unit] for unit in units}) == 1:
        return set()
    return {unit for unit in units if unit and not all(f"{other}.".startswith(f"{unit}.") for other in units)}
