"""Which dtypes the weights, the computation and the gradients have."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.plugins.precision.amp import MixedPrecision as MixedPrecision
    from lightning.fabric.plugins.precision.bitsandbytes import BitsandbytesPrecision as BitsandbytesPrecision
    from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision as DeepSpeedPrecision
    from lightning.fabric.plugins.precision.double import DoublePrecision as DoublePrecision
    from lightning.fabric.plugins.precision.float8 import Float8Precision as Float8Precision
    from lightning.fabric.plugins.precision.fsdp import FSDPPrecision as FSDPPrecision
    from lightning.fabric.plugins.precision.half import HalfPrecision as HalfPrecision
    from lightning.fabric.plugins.precision.precision import Precision as Precision
    from lightning.fabric.plugins.precision.transformer_engine import (
        TransformerEnginePrecision as TransformerEnginePrecision,
    )
    from lightning.fabric.plugins.precision.xla import XLAPrecision as XLAPrecision

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.plugins.precision.amp": ["MixedPrecision"],
        "lightning.fabric.plugins.precision.bitsandbytes": ["BitsandbytesPrecision"],
        "lightning.fabric.plugins.precision.deepspeed": ["DeepSpeedPrecision"],
        "lightning.fabric.plugins.precision.double": ["DoublePrecision"],
        "lightning.fabric.plugins.precision.float8": ["Float8Precision"],
        "lightning.fabric.plugins.precision.fsdp": ["FSDPPrecision"],
        "lightning.fabric.plugins.precision.half": ["HalfPrecision"],
        "lightning.fabric.plugins.precision.precision": ["Precision"],
        "lightning.fabric.plugins.precision.transformer_engine": ["TransformerEnginePrecision"],
        "lightning.fabric.plugins.precision.xla": ["XLAPrecision"],
    },
)
