"""Linear layers in 8-bit floating point, the rest in 16.    torchao: convert_to_float8_training"""

import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning.fabric.plugins.precision._kept import is_inside, is_kept, matching, stay_off_fast_paths
from lightning.fabric.plugins.precision.amp import MixedPrecision
from lightning.fabric.plugins.precision.half import HalfPrecision
from lightning.fabric.plugins.precision.precision import Precision, dtype_name
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.text import did_you_mean

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

_BASES = ("bf16-mixed", "bf16-true")
_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
_MULTIPLE = 16  # of which the multiplication in hardware needs both dimensions
_FIRST_WITH_FLOAT8 = (8, 9)


@dataclass(frozen=True)
class Float8Conversion:
    """Which linear layers multiply in float8, and why others do not: by their names in the model."""

    converted: tuple[str, ...]
    skipped: Mapping[str, str]

    def reasons(self) -> list[str]:
        """Return a sentence for each reason, with the names of the layers."""
        names: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names.setdefault(reason, []).append(repr(name))
        return [f"Not in float8: {', '.join(which)} ({reason})." for reason, which in names.items()]


class Float8Precision(Precision):
    """``precision="float8"``: linear layers multiply in float8, with scales taken from the values at hand.

    Weights, gradients and the optimizer's state have the dtypes of ``base``, and so have checkpoints, whose keys are
    the plain ones: they can be loaded in any other precision. Layers stay the same objects. Not converted are: layers
    whose dimensions are no multiples of 16, that share their weight, that are kept in 32 bit, that another module
    computes with past their ``forward``, and those of a class of their own. :attr:`conversion` says which, and why.

    Args:
        base: the precision of everything else: ``"bf16-mixed"``, or ``"bf16-true"``.
        recipe: how values are scaled: ``"tensorwise"``, one scale for a tensor; ``"rowwise"``, one for each row;
            ``"rowwise_with_gw_hp"``, where the weights' gradient is not in float8; or a ``Float8LinearConfig``.
        emulate: round as float8 does, and multiply in 32 bit, which is slow. None: on the CPU.
        skip: names and classes of modules to leave as they are.
        keep_fp32: names and classes of modules that stay in 32 bit, as in the other precisions.

    Raises:
        ValueError: for another base, recipe or configuration. At set-up, if no layer can be converted, or the device
            has no float8.
        ModuleNotFoundError: torchao is not installed.

    """

    precision = "float8"

    def __init__(
        self,
        base: Literal["bf16-mixed", "bf16-true"] = "bf16-mixed",
        recipe: "str | Float8LinearConfig" = "tensorwise",
        emulate: bool | None = None,
        skip: Iterable[str | type[nn.Module]] = (),
        keep_fp32: Iterable[str | type[nn.Module]] = (),
    ) -> None:
        if base not in _BASES:
            raise ValueError(
                f"`Float8Precision` needs a base of {' or '.join(map(repr, _BASES))}, but got {base!r}: the numbers "
                "around float8 have the range of bfloat16."
            )
        if isinstance(skip, (str, type)):
            raise TypeError(f"`skip` is a list of names and classes of modules, but got {skip!r}. Pass [{skip!r}].")
        if importlib.util.find_spec("torchao") is None:
            raise ModuleNotFoundError(
                "precision='float8' needs the package `torchao`. Install it with: pip install torchao"
            )
        _check_recipe(recipe)
        self.base = base
        self.recipe = recipe
        self.skip = tuple(skip)
        self.conversion: Float8Conversion | None = None
        self._emulate = emulate
        self._device_type = "cuda" if torch.cuda.device_count() else "cpu"  # unless `computes_on` says otherwise
        self._base = _base(base, self._device_type, keep_fp32)

    @property
    def emulates(self) -> bool:
        """Whether float8 is imitated by rounding."""
        return self._device_type == "cpu" if self._emulate is None else self._emulate

    def computes_on(self, device_type: str) -> None:
        if device_type not in ("cpu", "cuda"):
            raise ValueError(
                f"precision='float8' is for CUDA devices, and for trying it out on the CPU, but not for "
                f"{device_type!r}. Use precision={self.base!r}."
            )
        self._device_type = device_type
        if isinstance(self._base, MixedPrecision):
            self._base.move_to(device_type)

    def convert_module(self, module: nn.Module) -> nn.Module:
        if self._device_type == "cuda" and not self.emulates:
            _check_hardware(self.base)
        module = self._base.convert_module(module)
        self.conversion = _convert(uncompiled(module), self.skip, self._config())
        return module

    def _config(self) -> "Float8LinearConfig":
        from lightning.fabric.plugins.precision._float8_linear import Float8LinearConfig

        given = self.recipe
        if isinstance(given, str):  # batches of any size: else the number of all their rows must be a multiple of 16
            config = replace(Float8LinearConfig.from_recipe_name(given), pad_inner_dim=True)
        else:
            config = given
        return replace(config, emulate=True) if self.emulates else config

    def computes_in(self, name: str, module: nn.Module) -> str:
        from lightning.fabric.plugins.precision._float8_linear import AutocastFloat8Linear

        if isinstance(module, AutocastFloat8Linear):
            return dtype_name(module.config.cast_config_input.target_dtype)
        return self._base.computes_in(name, module)

    def remarks(self) -> list[str]:
        remarks = self._base.remarks()
        if self.conversion is not None:
            how = self.recipe if isinstance(self.recipe, str) else "own"
            shown = ", ".join(map(repr, self.conversion.converted))
            remarks.append(f"Multiply in float8 (recipe {how!r}): {shown}.")
            remarks += self.conversion.reasons()
        if self.emulates:
            remarks.append("Float8 is emulated: values are rounded to it, and multiplied in 32 bit, which is slow.")
        return remarks

    # -- all else is as in the base

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._base.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self._base.module_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        return self._base.forward_context()

    def convert_input(self, data: Any) -> Any:
        return self._base.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return self._base.convert_output(data)


def _base(name: Literal["bf16-mixed", "bf16-true"], device_type: str, keep_fp32: Any) -> Precision:
    if name == "bf16-true":
        return HalfPrecision(name, keep_fp32)
    return MixedPrecision(name, device_type, keep_fp32=keep_fp32)


# ---- what can be done ------------------------------------------------------------------------------------------------


def _check_recipe(recipe: Any) -> None:
    if isinstance(recipe, str):
        if recipe not in _RECIPES:
            known = ", ".join(map(repr, _RECIPES))
            raise ValueError(f"Unknown recipe {recipe!r}.{did_you_mean(recipe, _RECIPES)} Known: {known}.")
        return
    from lightning.fabric.plugins.precision._float8_linear import Float8LinearConfig

    if not isinstance(recipe, Float8LinearConfig):
        raise TypeError(f"`recipe` is the name of one, or a Float8LinearConfig of torchao, but got {recipe!r}.")
    if recipe.enable_fsdp_float8_all_gather:
        raise ValueError(
            "`enable_fsdp_float8_all_gather=True` makes weights a class of torchao's that checkpoints would carry on. "
            "Leave it off: weights are gathered in the dtype they are stored in."
        )


def _check_hardware(base: str) -> None:
    capability = torch.cuda.get_device_capability()
    if capability < _FIRST_WITH_FLOAT8:
        raise ValueError(
            f"precision='float8' needs a GPU with float8, of compute capability 8.9 or more, but "
            f"{torch.cuda.get_device_name()} has {'.'.join(map(str, capability))}. Use precision={base!r}, or "
            "`Float8Precision(emulate=True)` to try out how it rounds, slowly."
        )


# ---- conversion ------------------------------------------------------------------------------------------------------


def _convert(
    module: nn.Module, skip: Iterable[str | type[nn.Module]], config: "Float8LinearConfig"
) -> Float8Conversion:
    """Convert what can be in ``module``, in place."""
    from lightning.fabric.plugins.precision._float8_linear import multiply_in_float8

    reasons = _Reasons(module, skip)
    converted: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            reason = reasons.against(name, part)
            if reason is None:
                converted[name] = part
            else:
                skipped[name] = reason
    if not converted:
        why = " ".join(Float8Conversion((), skipped).reasons()) or "It has no linear layers."
        raise ValueError(
            f"precision='float8' would compute nothing of {type(module).__name__} in float8. {why} "
            "Use precision='bf16-mixed'."
        )
    for part in converted.values():
        multiply_in_float8(part, config)
    stay_off_fast_paths(module, set(converted.values()))
    return Float8Conversion(tuple(converted), MappingProxyType(skipped))


class _Reasons:
    """Why a linear layer of a model is left as it is."""

    def __init__(self, module: nn.Module, skip: Iterable[str | type[nn.Module]]) -> None:
        named = dict(module.named_modules(remove_duplicate=False))
        self._left_out = {name for item in skip for name in matching(item, named, "skip")}
        self._in_attention = {
            part for each in named.values() if isinstance(each, nn.MultiheadAttention) for part in each.modules()
        }
        self._users: dict[int, dict[nn.Module, str]] = {}
        for name, part in named.items():
            for parameter in part.parameters(recurse=False):
                self._users.setdefault(id(parameter), {}).setdefault(part, name)

    def against(self, name: str, part: nn.Linear) -> str | None:
        if name in self._left_out or is_inside(name, self._left_out):
            return "named in `skip`"
        if is_kept(part):
            return "kept in 32 bit"
        if part in self._in_attention:
            return "used by MultiheadAttention past its `forward`"
        if type(part) is not nn.Linear or "forward" in vars(part):
            return f"of the class {type(part).__name__}, not nn.Linear itself"
        if any(map(is_lazy, part.parameters())):
            return "without a shape yet"
        if part.in_features % _MULTIPLE or part.out_features % _MULTIPLE:
            return f"of {part.in_features} to {part.out_features} features, not both multiples of {_MULTIPLE}"
        others = [other for user, other in self._users[id(part.weight)].items() if user is not part]
        if others:
            return f"tied to {others[0]!r} by its weight"
        return None
