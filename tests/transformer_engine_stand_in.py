"""A package ``transformer_engine`` for machines without NVIDIA's: the same names, computing in PyTorch on any device.

Inside of ``autocast``, ``Linear`` rounds its input and weight to ``torch.float8_e4m3fn``, and the gradient of its
output to ``torch.float8_e5m2``, each with one scale, and multiplies them in the dtype of autocast, or else of its
weight. Sizes that the real kernels refuse are refused.
"""

import dataclasses
import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

NAMES = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common")
RECIPES = "transformer_engine.common.recipe"


def install(monkeypatch: pytest.MonkeyPatch, autocast_name: str = "autocast") -> ModuleType:
    """Let ``import transformer_engine`` find this; the context has the name of newer versions, or of older ones."""
    modules = {name: ModuleType(name) for name in (*NAMES, RECIPES)}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None, is_package=name != RECIPES)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    pytorch, recipe = modules["transformer_engine.pytorch"], modules[RECIPES]
    pytorch.Linear, pytorch.LayerNorm = Linear, LayerNorm  # type: ignore[attr-defined]
    setattr(pytorch, autocast_name, {"autocast": autocast, "fp8_autocast": fp8_autocast}[autocast_name])
    recipe.Recipe, recipe.DelayedScaling, recipe.Format = Recipe, DelayedScaling, Format  # type: ignore[attr-defined]
    monkeypatch.setattr(Linear, "__module__", "transformer_engine.pytorch.module.linear")
    monkeypatch.setattr(LayerNorm, "__module__", "transformer_engine.pytorch.module.layernorm")
    return pytorch


# ---- recipes ---------------------------------------------------------------------------------------------------------


class Format(enum.Enum):
    E4M3 = "e4m3"
    HYBRID = "e4m3 forward, e5m2 backward"


class Recipe:
    pass


@dataclasses.dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"


_active: list[Any] = []  # the recipes of the contexts around; None: the library's own choice


@contextmanager
def autocast(enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None) -> Iterator[None]:
    assert recipe is None or isinstance(recipe, Recipe)
    _active.append((enabled, recipe))
    try:
        yield
    finally:
        _active.pop()


@contextmanager
def fp8_autocast(enabled: bool = True, calibrating: bool = False, fp8_recipe: Recipe | None = None) -> Iterator[None]:
    with autocast(enabled, calibrating, fp8_recipe):
        yield


# ---- layers ----------------------------------------------------------------------------------------------------------


class _Rounded(torch.autograd.Function):
    """Rounds in forward (``e4m3``), or gradients in backward (``e5m2``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_backward: bool) -> Tensor:
        ctx.in_backward = in_backward
        return x.clone() if in_backward else _round(x, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _round(grad, torch.float8_e5m2) if ctx.in_backward else grad, None


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.finfo(dtype).max / x.abs().max().float().clamp(min=1e-12)
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        self.seen: list[Any] = []  # the recipes that it has computed with

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias if self.use_bias else None
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        enabled, recipe = _active[-1] if _active else (False, None)
        x, weight = x.to(dtype), weight.to(dtype)
        if enabled:
            self.seen.append(recipe)
            for tensor in (x, weight):
                assert tensor.shape[-1] % 16 == 0, "FP8 execution requires the last dimension to be divisible by 16"
                assert tensor.numel() // tensor.shape[-1] % 8 == 0, "and the product of the others by 8"
            x, weight = _Rounded.apply(x, False), _Rounded.apply(weight, False)
        with torch.autocast(device, enabled=False):
            output = functional.linear(x, weight, None if bias is None else bias.to(dtype))
        return _Rounded.apply(output, True) if enabled else output

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


class LayerNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        *,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(normalized_shape, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
