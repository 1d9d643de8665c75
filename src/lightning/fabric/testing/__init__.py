"""Tools to test programs that run on several ranks."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.strategies.launchers.report import RankError as RankError
    from lightning.fabric.testing.contract import STRATEGY_CHECKS as STRATEGY_CHECKS
    from lightning.fabric.testing.contract import check_strategy as check_strategy
    from lightning.fabric.testing.ranks import on_ranks as on_ranks
    from lightning.fabric.testing.ranks import preload as preload

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.strategies.launchers.report": ["RankError"],
        "lightning.fabric.testing.contract": ["STRATEGY_CHECKS", "check_strategy"],
        "lightning.fabric.testing.ranks": ["on_ranks", "preload"],
    },
)
