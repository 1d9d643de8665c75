"""Linear layers that compute in 8-bit floats, by NVIDIA's library.    package: transformer-engine"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision._kept import Kept, release
from lightning.fabric.plugins.precision._replaced import stay_off_fast_paths
from lightning.fabric.plugins.precision.precision import Precision, dtype_name
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.imports import require
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.text import did_you_mean

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PIP = '--no-build-isolation "transformer-engine[pytorch]"'
_ROWS, _COLUMNS = 8, 16  # what kernels for 8 bit can divide


class TransformerEnginePrecision(Precision):
    """``precision="transformer-engine"`` and ``"transformer-engine-float16"``: linear layers compute in 8-bit floats.

    ``nn.Linear`` and ``nn.LayerNorm`` are replaced by layers of the Transformer Engine, with the same parameters: the
    optimizer goes on updating them. All else computes in ``fallback_compute_dtype``. Layers of classes derived from
    those two, with hooks, or of sizes that 8-bit kernels cannot take (outputs divisible by 8, inputs by 16) stay as
    they are; :meth:`remarks` names them. The batch (all its dimensions but the last, multiplied) must be divisible by 8
    as well.

    Replaced layers have an entry in the state dict that ordinary checkpoints lack: load those before set-up, or with
    ``strict=False``.

    Args:
        weights_dtype: of parameters and buffers: ``torch.bfloat16``, ``float16`` or ``float32``, or its name.
        recipe: how numbers are scaled into 8 bit: a recipe of ``transformer_engine.common.recipe``, or a dict of the
            fields of its ``DelayedScaling`` (``fp8_format`` may be a name). None: as the library chooses for the GPU.
        replace_layers: False leaves the model's layers as they are. None: they are replaced, unless the model has
            layers of the Transformer Engine already.
        fallback_compute_dtype: of what does not compute in 8 bit. None: ``weights_dtype``.
        keep_fp32: modules that stay in 32 bit, by full name or class.

    Raises:
        ModuleNotFoundError: without the package.
        ValueError, TypeError: for another dtype, or what is no recipe.

    """

    def __init__(
        self,
        *,
        weights_dtype: torch.dtype | str,
        recipe: Mapping[str, Any] | Any | None = None,
        replace_layers: bool | None = None,
        fallback_compute_dtype: torch.dtype | str | None = None,
        keep_fp32: Iterable[str | type[nn.Module]] = (),
    ) -> None:
        self.weights_dtype = _dtype("weights_dtype", weights_dtype)
        self.fallback_compute_dtype = self.weights_dtype
        if fallback_compute_dtype is not None:
            self.fallback_compute_dtype = _dtype("fallback_compute_dtype", fallback_compute_dtype)
        if replace_layers not in (None, True, False):
            raise TypeError(f"replace_layers must be True, False or None, but got {replace_layers!r}.")
        self._kept = Kept(keep_fp32)
        require("transformer_engine", "TransformerEnginePrecision", pip=_PIP)
        suffix = "" if self.weights_dtype == torch.bfloat16 else f"-{dtype_name(self.weights_dtype)}"
        self.precision = f"transformer-engine{suffix}"  # type: ignore[assignment]
        self.recipe = recipe
        self.replace_layers = replace_layers
        self._made_recipe: Any = None
        self._device_type: str | None = None
        self._remarks: list[str] = []

    # -- set up

    def computes_on(self, device_type: str) -> None:
        self._device_type = device_type

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Replace layers, then convert parameters and buffers. A module that is one layer comes back as another."""
        if self._made_recipe is None and self.recipe is not None:
            self._made_recipe = _recipe(self.recipe)
        model = uncompiled(module)
        release(model)
        self._kept.names(model)
        if self._shall_replace(model):
            replaced = self._replace(model)
            module = replaced if module is model else module
        return self._kept.convert(module, self.weights_dtype)

    def _shall_replace(self, model: nn.Module) -> bool:
        own = [name for name, part in model.named_modules() if _is_of_te(part)]
        kind = type(model).__name__
        if own:
            self._remarks.append(f"{kind} has {len(own)} layers of the Transformer Engine already.")
        elif self.replace_layers is False:
            rank_zero_warn(
                f"{kind} has no layer of the Transformer Engine, and replace_layers=False, so nothing computes in 8 "
                "bit. Leave `replace_layers` out."
            )
        return not own if self.replace_layers is None else self.replace_layers

    def _replace(self, model: nn.Module) -> nn.Module:
        te = _transformer_engine()
        parts = {name: part for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.LayerNorm))}
        reasons = {name: self._reason_to_stay(name, part, model) for name, part in parts.items()}
        new: dict[nn.Module, nn.Module] = {
            part: _of_te(te, part, torch.float32 if self._kept.holds(name) else self.weights_dtype)
            for name, part in parts.items()
            if reasons[name] is None
        }
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child in new:
                    parent._modules[key] = new[child]
        stay_off_fast_paths(model)
        self._remark(type(model).__name__, reasons)
        return new.get(model, model)

    def _reason_to_stay(self, name: str, part: nn.Linear | nn.LayerNorm, model: nn.Module) -> str | None:
        if self._kept.holds(name):
            return "computes in float32 (`keep_fp32`)"
        if type(part) not in (nn.Linear, nn.LayerNorm):
            return f"is a {type(part).__name__}, whose parameters others may use"
        if any(getattr(part, hooks) for hooks in _HOOKS):
            return "has hooks, which would be lost"
        return _linear_does_not_fit(part) if isinstance(part, nn.Linear) else _norm_does_not_fit(part)

    def _remark(self, model: str, reasons: dict[str, str | None]) -> None:
        stay = {name: reason for name, reason in reasons.items() if reason}
        why = [f"{name!r} is not replaced: it {reason}." for name, reason in stay.items()]
        if len(stay) == len(reasons):
            rank_zero_warn(f"{type(self).__name__} has replaced no layer of {model}. {' '.join(why)}")
        count = f"{len(reasons) - len(stay)} of {len(reasons)} Linear and LayerNorm layers"
        self._remarks += [f"{model}: {count} are of the Transformer Engine now.", *why]

    # -- create

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.weights_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(torch.float32 if self._kept else self.weights_dtype)

    # -- use

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(default_dtype(self.weights_dtype))
            if self.fallback_compute_dtype != torch.float32:
                stack.enter_context(torch.autocast(self._autocast_device(), dtype=self.fallback_compute_dtype))
            stack.enter_context(_in_8_bit(self._made_recipe))
            yield

    def _autocast_device(self) -> str:
        if self._device_type is None:
            self._device_type = "cuda" if torch.cuda.is_available() else "cpu"
        return self._device_type

    def convert_input(self, data: Any) -> Any:
        return cast_floating(data, self.weights_dtype)

    def convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())

    # -- ask

    def computes_in(self, name: str, module: nn.Module) -> str:
        if self._kept.holds(name):
            return "float32"
        in_8_bit = _is_of_te(module) and not type(module).__name__.endswith("Norm")
        return "float8" if in_8_bit else dtype_name(self.fallback_compute_dtype)

    def remarks(self) -> list[str]:
        return [*self._remarks, *self._kept.remarks()]


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _dtype(argument: str, given: torch.dtype | str) -> torch.dtype:
    known = ", ".join(map(repr, _DTYPES))
    if isinstance(given, str) and given in _DTYPES:
        return _DTYPES[given]
    if isinstance(given, torch.dtype) and given in _DTYPES.values():
        return given
    if not isinstance(given, (str, torch.dtype)):
        raise TypeError(f"{argument} must be a torch.dtype or one of {known}, but got {given!r}.")
    hint = did_you_mean(given, _DTYPES) if isinstance(given, str) else ""
    raise ValueError(f"{argument} must be one of {known}, or that dtype of torch, but got {given!r}.{hint}")


# ---- the package -----------------------------------------------------------------------------------------------------


def _transformer_engine() -> Any:
    try:
        import transformer_engine.pytorch
    except (ImportError, OSError, RuntimeError) as error:  # without its part for PyTorch, or for this GPU's driver
        raise ModuleNotFoundError(
            "TransformerEnginePrecision needs the package `transformer_engine` with its part for PyTorch, which cannot "
            f"be imported ({error}). Install it with: pip install {_PIP}",
            name="transformer_engine",
        ) from error
    return transformer_engine.pytorch


def _recipe(given: Any) -> Any:
    """Return ``given``, or the recipe that a dict describes."""
    _transformer_engine()
    from transformer_engine.common import recipe as recipes

    if not isinstance(given, Mapping):
        if not isinstance(given, recipes.Recipe):
            raise TypeError(f"recipe must be a recipe of the Transformer Engine or a dict, but got {given!r}.")
        return given
    known = [field.name for field in dataclasses.fields(recipes.DelayedScaling)]
    for name in given:
        if name not in known:
            raise ValueError(
                f"recipe has {name!r}, which `DelayedScaling` has not.{did_you_mean(str(name), known)} "
                f"Known: {', '.join(known)}."
            )
    options = dict(given)
    if isinstance(options.get("fp8_format"), str):
        options["fp8_format"] = recipes.Format[options["fp8_format"]]
    return recipes.DelayedScaling(**options)


def _in_8_bit(recipe: Any) -> AbstractContextManager[Any]:
    te = _transformer_engine()
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe)
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe)


def _is_of_te(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "transformer_engine"


# ---- layers ----------------------------------------------------------------------------------------------------------


def _linear_does_not_fit(linear: nn.Linear) -> str | None:
    if not {"weight"} <= linear._parameters.keys() <= {"weight", "bias"}:
        return "computes its weight from other parameters"
    if linear.out_features % _ROWS or linear.in_features % _COLUMNS:
        sizes = f"{linear.in_features} inputs and {linear.out_features} outputs"
        return f"has {sizes}, but 8 bit needs inputs divisible by {_COLUMNS} and outputs by {_ROWS}"
    return None


def _norm_does_not_fit(norm: nn.LayerNorm) -> str | None:
    if norm._parameters.keys() != {"weight", "bias"} or None in norm._parameters.values():
        return "has not both weight and bias"
    if len(norm.normalized_shape) != 1:
        return f"normalises over {len(norm.normalized_shape)} dimensions"
    return None


def _of_te(te: Any, part: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> nn.Module:
    """Return a layer that has the parameters of ``part``, the same objects."""
    new: nn.Module
    if isinstance(part, nn.Linear):
        has_bias = part.bias is not None
        new = te.Linear(part.in_features, part.out_features, bias=has_bias, params_dtype=dtype, device="meta")
    else:
        new = te.LayerNorm(part.normalized_shape[0], eps=part.eps, params_dtype=dtype, device="meta")
    for name, parameter in part._parameters.items():
        if parameter is not None:
            setattr(new, name, parameter)
    return new.train(part.training)
