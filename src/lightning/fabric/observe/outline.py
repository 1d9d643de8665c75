"""A module as a few rows: equal siblings are one row, and what is like everything around it is not opened."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from lightning.fabric.observe.records import BufferReport, ModuleReport, ParameterReport, PartReport

_MANY = 12  # rows under one module, from which on different classes share a row
_DEPTH = 3  # how deep a large module is opened that is the same throughout
_LISTS = ("ModuleList", "ModuleDict")  # have no forward: their children stand in their place


class Row(NamedTuple):
    """A line of the outline, of one module or of several alike; sizes are those of each."""

    name: str
    kind: str
    numel: str
    size: str
    note: str


# ---- what is said once -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """What holds for most of a module's parameters, counted by elements, and for most of its buffers."""

    facts: dict[str, str]
    buffer_facts: dict[str, str]

    def words(self) -> list[str]:
        """All of it; whether gradients are there is only said of single parameters."""
        return [text for name, text in self.facts.items() if text not in ("", "trained") and name != "gradient"]

    def differences(self, parameter: ParameterReport) -> tuple[str, ...]:
        """What is different about ``parameter``."""
        return tuple(text for name, text in _facts(parameter).items() if text and text != self.facts.get(name, text))

    def buffer_differences(self, buffer: BufferReport) -> tuple[str, ...]:
        """What is different about ``buffer``."""
        return tuple(text for name, text in _buffer_facts(buffer).items() if text != self.buffer_facts[name])


def common_facts(module: ModuleReport) -> Common:
    """Count."""
    facts = _most([(_facts(parameter), parameter.numel) for parameter in module.parameters])
    if not any(parameter.gradients for parameter in module.parameters):
        facts.pop("gradients", None)  # there are no others to meet
    if any(parameter.has_gradient for parameter in module.parameters):
        facts["gradient"] = ""  # that there is none is worth a word, also where it is so of most
    return Common(facts, _most([(_buffer_facts(buffer), 1) for buffer in module.buffers]))


def _most(weighted: Iterable[tuple[dict[str, str], int]]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = {}
    for facts, weight in weighted:
        for name, text in facts.items():
            counts.setdefault(name, Counter())[text] += weight
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def _facts(parameter: ParameterReport) -> dict[str, str]:
    facts = {
        "dtype": f"{parameter.dtype} on {parameter.device}",
        "compute": f"computes in {parameter.computes_in}",
        "layout": parameter.layout,
        "trained": "trained" if parameter.trainable else "frozen",
    }
    if parameter.trainable:
        facts["gradients"] = f"gradients {parameter.gradients or 'stay on this rank'}"
        facts["gradient"] = "without a gradient" if parameter.has_gradient is False else ""
    return facts


def _buffer_facts(buffer: BufferReport) -> dict[str, str]:
    return {"dtype": f"{buffer.dtype} on {buffer.device}"}


# ---- the tree --------------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A module with its own parameters and buffers, each with what is different about it."""

    name: str
    part: PartReport
    parameters: list[tuple[ParameterReport, tuple[str, ...]]] = field(default_factory=list)
    buffers: list[tuple[BufferReport, tuple[str, ...]]] = field(default_factory=list)
    children: "list[_Node]" = field(default_factory=list)

    def marks(self) -> tuple[str, ...]:
        marks = {
            "gathered as a unit": self.part.is_unit,
            "activations computed again": self.part.recomputes,
            "compiled": self.part.is_compiled,
        }
        return tuple(mark for mark, applies in marks.items() if applies)

    def everything(self) -> "Iterator[_Node]":
        yield self
        for child in self.children:
            yield from child.everything()

    def numel(self) -> int:
        return sum(parameter.numel for node in self.everything() for parameter, _ in node.parameters)

    def size(self) -> int:
        return sum(parameter.bytes_here for node in self.everything() for parameter, _ in node.parameters)

    def is_uniform(self) -> bool:
        """Whether one note says all about it and what is inside."""
        inside = [node for node in self.everything() if node is not self]
        of_parameters = {differences for node in self.everything() for _, differences in node.parameters}
        of_buffers = {differences for node in self.everything() for _, differences in node.buffers}
        return len(of_parameters) <= 1 and len(of_buffers) <= 1 and not any(node.marks() for node in inside)

    def note(self) -> str:
        parameters = [pair for node in self.everything() for pair in node.parameters]
        buffers = [pair for node in self.everything() for pair in node.buffers]
        said = [*self.marks(), *_differences(parameters)]
        said += [f"buffers: {text}" if parameters else text for text in _differences(buffers)]
        return "; ".join(said)

    def signature(self) -> Any:
        """Equal for modules that are alike in everything but their names."""
        return (
            self.part.kind,
            self.marks(),
            [(p.name.rpartition(".")[2], p.shape, p.numel_here, _facts(p)) for p, _ in self.parameters],
            [(b.name.rpartition(".")[2], b.shape, _buffer_facts(b)) for b, _ in self.buffers],
            [(child.name, child.signature()) for child in self.children],
        )

    def looks(self) -> Any:
        """Equal for modules of which the same can be said."""
        return (self.note(),) if self.is_uniform() else id(self)


def _differences(pairs: Sequence[tuple[Any, tuple[str, ...]]]) -> list[str]:
    """What is different; of each by name, where they are not alike."""
    found = {differences for _, differences in pairs}
    if len(found) == 1:
        return list(found.pop())
    by_name = ((record.name.rpartition(".")[2], ", ".join(differences)) for record, differences in pairs if differences)
    return [f"{name}: {text}" for name, text in by_name]


def _tree(module: ModuleReport, common: Common) -> _Node:
    root = _Node("", PartReport("", module.kind))
    nodes = {"": root}

    def node_of(path: str, part: PartReport | None = None) -> _Node:
        if path not in nodes:
            above, _, leaf = path.rpartition(".")
            nodes[path] = _Node(leaf, part or PartReport(path, ""))
            node_of(above).children.append(nodes[path])
        return nodes[path]

    for part in module.parts:
        node_of(part.name, part).part = part
    for parameter in module.parameters:
        node_of(parameter.name.rpartition(".")[0]).parameters.append((parameter, common.differences(parameter)))
    for buffer in module.buffers:
        node_of(buffer.name.rpartition(".")[0]).buffers.append((buffer, common.buffer_differences(buffer)))
    _prune(root)
    return root


def _prune(node: _Node) -> bool:
    """Take out what has nothing to report; return whether ``node`` has."""
    node.children = [child for child in node.children if _prune(child)]
    return bool(node.children or node.parameters or node.buffers or node.marks())


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows(module: ModuleReport, common: Common) -> list[Row]:
    """The outline of a module, without a row for itself, unless it is all there is."""
    root = _tree(module, common)
    if not root.children:
        return [_row([root], "(itself)", 0, root.note())] if root.note() else []
    return list(_inside(root, 0, large=max(1, root.numel() // 2)))


def _inside(node: _Node, depth: int, large: int) -> Iterator[Row]:
    if node.parameters or node.buffers:
        own = _Node("", node.part, node.parameters, node.buffers)
        note = "; ".join(_differences(own.parameters) + [f"buffers: {text}" for text in _differences(own.buffers)])
        yield Row(_indented("(its own)", depth), "", f"{own.numel():,}", in_bytes(own.size()), note)
    for run in _runs(_shown(node)):
        first = run[0][1]
        name = _indented(_name_of(run), depth)
        if not _is_opened(first, depth, large):
            yield _row([node for _, node in run], name, depth, first.note())
            continue
        yield _row([node for _, node in run], name, depth, "; ".join(first.marks()))
        yield from _inside(first, depth + 1, large)


def _is_opened(node: _Node, depth: int, large: int) -> bool:
    if not node.children:
        return False
    return not node.is_uniform() or (depth + 1 < _DEPTH and node.numel() > large)


def _shown(node: _Node, prefix: str = "") -> Iterator[tuple[str, _Node]]:
    """The children by name; in place of mere lists, what is in them."""
    for child in node.children:
        name = f"{prefix}{child.name}"
        if child.part.kind in _LISTS and not (child.parameters or child.buffers or child.marks()):
            yield from _shown(child, f"{name}.")
        else:
            yield name, child


def _runs(named: Iterable[tuple[str, _Node]]) -> list[list[tuple[str, _Node]]]:
    """What follows one another and is alike, together."""
    named = list(named)
    runs = _grouped(named, lambda pair: (pair[0].rpartition(".")[0], pair[1].signature()))
    return runs if len(runs) <= _MANY else _grouped(named, lambda pair: (pair[0].rpartition(".")[0], pair[1].looks()))


def _grouped(named: list[tuple[str, _Node]], key: Callable[[tuple[str, _Node]], Any]) -> list[list[tuple[str, _Node]]]:
    return [list(run) for _, run in groupby(named, key)]


def _name_of(run: Sequence[tuple[str, _Node]]) -> str:
    names = [name for name, _ in run]
    return names[0] if len(names) == 1 else f"{names[0]} - {names[-1]}" if names[2:] else ", ".join(names)


def _row(nodes: Sequence[_Node], name: str, depth: int, note: str) -> Row:
    kinds = {node.part.kind for node in nodes}
    kind = kinds.pop() if len(kinds) == 1 else "modules"
    numels, sizes = {node.numel() for node in nodes}, {node.size() for node in nodes}
    each = len(nodes) > 1 and len(numels) == len(sizes) == 1
    numel, size = (numels.pop(), sizes.pop()) if each else (sum(n.numel() for n in nodes), sum(n.size() for n in nodes))
    return Row(
        name,
        kind if len(nodes) == 1 else f"{len(nodes)} x {kind}",
        f"{len(nodes)} x {numel:,}" if each else f"{numel:,}",
        f"{len(nodes)} x {in_bytes(size)}" if each else in_bytes(size),
        note,
    )


def _indented(text: str, depth: int) -> str:
    return f"{'  ' * depth}{text}"


def in_bytes(size: int) -> str:
    """Return e.g. ``"1.5 MiB"``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
