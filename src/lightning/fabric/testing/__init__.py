"""Tools to test programs that run on several ranks."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.strategies.launchers.report import RankError as RankError
    from lightning.fabric.testing.contract import STRATEGY_CHECKS as STRATEGY_CHECKS
    from lightning.fabric.testing.contract import check_strategy as check_strategy
    from lightning.fabric.testing.faults import Forked as Forked
    from lightning.fabric.testing.faults import Outcome as Outcome
    from lightning.fabric.testing.faults import WritePoint as WritePoint
    from lightning.fabric.testing.faults import fail as fail
    from lightning.fabric.testing.faults import fault_at as fault_at
    from lightning.fabric.testing.faults import file_size_limit as file_size_limit
    from lightning.fabric.testing.faults import flip as flip
    from lightning.fabric.testing.faults import kill as kill
    from lightning.fabric.testing.faults import stall as stall
    from lightning.fabric.testing.faults import write_points as write_points
    from lightning.fabric.testing.ranks import on_ranks as on_ranks
    from lightning.fabric.testing.ranks import preload as preload

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.strategies.launchers.report": ["RankError"],
        "lightning.fabric.testing.contract": ["STRATEGY_CHECKS", "check_strategy"],
        "lightning.fabric.testing.faults": [
            "Forked",
            "Outcome",
            "WritePoint",
            "fail",
            "fault_at",
            "file_size_limit",
            "flip",
            "kill",
            "stall",
            "write_points",
        ],
        "lightning.fabric.testing.ranks": ["on_ranks", "preload"],
    },
)
