"""Nouns that the rest of the library is built from. They need torch and nothing of the library above them.

* talking: ``rank_zero``, ``logger``, ``text``, ``warnings``, ``exceptions``
* trees and data: ``apply_func``, ``data``, ``types``, ``enums``
* numbers: ``seed``, ``init``, ``init_tape``, ``optimizer``, ``device_dtype_mixin``, ``throughput``, ``spike``
* files: ``cloud_io``, ``remote_files``, ``load``, ``sharded_folder``, ``consolidate_checkpoint``
* environment: ``imports``, ``device_parser``, ``distributed``, ``registry``
"""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.utilities.apply_func import move_data_to_device as move_data_to_device
    from lightning.fabric.utilities.data import AttributeDict as AttributeDict
    from lightning.fabric.utilities.data import suggested_max_num_workers as suggested_max_num_workers
    from lightning.fabric.utilities.distributed import is_shared_filesystem as is_shared_filesystem
    from lightning.fabric.utilities.enums import LightningEnum as LightningEnum
    from lightning.fabric.utilities.rank_zero import rank_zero_deprecation as rank_zero_deprecation
    from lightning.fabric.utilities.rank_zero import rank_zero_info as rank_zero_info
    from lightning.fabric.utilities.rank_zero import rank_zero_only as rank_zero_only
    from lightning.fabric.utilities.rank_zero import rank_zero_warn as rank_zero_warn
    from lightning.fabric.utilities.throughput import ThroughputMonitor as ThroughputMonitor
    from lightning.fabric.utilities.throughput import measure_flops as measure_flops
    from lightning.fabric.utilities.warnings import (
        disable_possible_user_warnings as disable_possible_user_warnings,
    )

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.utilities.apply_func": ["move_data_to_device"],
        "lightning.fabric.utilities.data": ["AttributeDict", "suggested_max_num_workers"],
        "lightning.fabric.utilities.distributed": ["is_shared_filesystem"],
        "lightning.fabric.utilities.enums": ["LightningEnum"],
        "lightning.fabric.utilities.rank_zero": [
            "rank_zero_deprecation",
            "rank_zero_info",
            "rank_zero_only",
            "rank_zero_warn",
        ],
        "lightning.fabric.utilities.throughput": ["ThroughputMonitor", "measure_flops"],
        "lightning.fabric.utilities.warnings": ["disable_possible_user_warnings"],
    },
)
