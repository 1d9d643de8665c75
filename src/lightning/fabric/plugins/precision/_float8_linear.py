"""The float8 linear layer of torchao, made to follow autocast on every device. Needs torchao: imported on first use."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning.fabric.plugins.precision._kept import Recast


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what torchao says while it is imported: that some of its parts, unused here, are not."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


with _quiet():
    from torchao.float8 import Float8LinearConfig as Float8LinearConfig
    from torchao.float8 import convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear


class AutocastFloat8Linear(Recast, Float8Linear):  # type: ignore[misc, unused-ignore]
    """A linear layer that multiplies in float8, and returns the dtype that ``nn.Linear`` would.

    torchao's own asks CUDA's autocast alone what that is.
    """

    former = nn.Linear
    config: Float8LinearConfig

    def forward(self, input: Tensor) -> Tensor:
        device_type = input.device.type
        if not torch.is_autocast_enabled(device_type):
            return super().forward(input)
        input = input.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return super().forward(input)


_OWN = ("config", "linear_mm_config")  # also where a layer was converted before, in another way


def multiply_in_float8(linear: nn.Linear, config: Float8LinearConfig) -> None:
    """Convert ``linear`` in place: it stays the same object with the same parameters, hooks and names."""
    converted = convert_to_float8_training(linear, config=config)
    new = {name: value for name, value in vars(converted).items() if name not in vars(linear) or name in _OWN}
    vars(linear).update(new)
    linear.__class__ = AutocastFloat8Linear
