"""What ``fabric.explain()`` returns: ``print`` shows it as a page, ``to_dict`` as plain data."""

from dataclasses import asdict, dataclass
from typing import Any

from lightning.fabric.observe import page
from lightning.fabric.observe.records import (
    Decision,
    LoaderReport,
    MemoryReport,
    ModuleReport,
    OptimizerReport,
    ProcessReport,
)


@dataclass(frozen=True)
class Explanation:
    """How one rank runs: what was chosen and why, and what set-up made of modules, optimizers and loaders.

    ``attention`` has a sentence for each thing that looks like a mistake.
    """

    versions: dict[str, str]
    plan: tuple[Decision, ...]
    process: ProcessReport
    strategy: str
    strategy_remarks: tuple[str, ...]
    precision: str
    precision_remarks: tuple[str, ...]
    modules: tuple[ModuleReport, ...]
    optimizers: tuple[OptimizerReport, ...]
    loaders: tuple[LoaderReport, ...]
    memory: MemoryReport | None
    attention: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as dicts, lists and plain values, ready for JSON."""
        return _plain(asdict(self))

    def __str__(self) -> str:
        sections = [
            page.head(self.process, self.versions),
            page.of_plan(self.plan),
            page.of_way("strategy", self.strategy, self.strategy_remarks),
            page.of_way("precision", self.precision, self.precision_remarks),
            *(page.of_module(number, module) for number, module in enumerate(self.modules, start=1)),
            *(page.of_optimizer(number, each, self.modules) for number, each in enumerate(self.optimizers, start=1)),
            *(page.of_loader(number, loader) for number, loader in enumerate(self.loaders, start=1)),
            page.of_what_is_missing(self.modules, self.optimizers, self.loaders),
            page.of_memory(self.memory),
            [f"attention: {sentence}" for sentence in self.attention],
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
