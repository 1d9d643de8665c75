"""What was set up and how: gathered as plain records first, then shown."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.observe.explanation import Explanation as Explanation

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.observe.explanation": ["Explanation"],
    },
)
