"""Weights in 4 or 8 bit.    package: bitsandbytes"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision._kept import Kept, release
from lightning.fabric.plugins.precision._replaced import stay_off_fast_paths
from lightning.fabric.plugins.precision.precision import Precision, dtype_name
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.imports import package_available, require
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.text import did_you_mean

_BITSANDBYTES_AVAILABLE = package_available("bitsandbytes")

_Mode = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"]
_MODES: tuple[str, ...] = get_args(_Mode)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class BitsandbytesPrecision(Precision):
    """Linear layers with weights in 4 or 8 bit, by the package ``bitsandbytes``; on GPUs, and slowly on CPUs.

    ======================= ============================================== ========================================
    ``mode``                weights of linear layers                       are multiplied as
    ======================= ============================================== ========================================
    ``nf4``, ``fp4``        4 bit, with a scale for each 64 of them        ``dtype``, decoded in each forward
    ``nf4-dq``, ``fp4-dq``  the same, and the scales in 8 bit              ``dtype``, decoded in each forward
    ``int8``                8 bit, with a scale for each output            int8, outliers among inputs as ``dtype``
    ``int8-training``       ``dtype``, quantised to 8 bit in each forward  int8, outliers among inputs as ``dtype``
    ======================= ============================================== ========================================

    On CPUs the 8-bit modes decode the weights and multiply as ``dtype`` while the module is in training mode.

    Quantised weights are not trained, except by ``int8-training``: create the optimizer of the parameters that are
    (``[p for p in model.parameters() if p.requires_grad]``) after ``setup_module``, or have layers that shall be
    trained, such as adapters, in ``ignore_modules``. All other parameters, and buffers, become ``dtype``.

    Every ``nn.Linear`` is quantised, but not those of a class derived from it, nor, unless trained, those that share
    their weight with another module: :meth:`remarks` names them. In a module made under ``fabric.init_module()`` each
    layer is quantised as soon as it exists, so that never more than one is in memory with ordinary weights. A state
    dict of ordinary weights is quantised as it is loaded.

    Args:
        mode: how weights are quantised.
        dtype: of all else, and of computation. None: bfloat16, whose range needs no scaling of the loss. On a GPU
            that is slow with it (older than Ampere), pass ``torch.float16``.
        ignore_modules: what the full names of modules begin with whose linear layers stay: ``"head"`` also ignores
            ``"header"``, ``"head."`` does not.
        keep_fp32: modules that stay in 32 bit, by full name or class.

    Raises:
        ModuleNotFoundError: without the package.
        ValueError, TypeError: for another mode or dtype, or what is no list of names.

    """

    def __init__(
        self,
        mode: _Mode,
        dtype: torch.dtype | None = None,
        ignore_modules: Iterable[str] | None = None,
        keep_fp32: Iterable[str | type[nn.Module]] = (),
    ) -> None:
        if mode not in _MODES:
            hint = did_you_mean(mode, _MODES) if isinstance(mode, str) else ""
            raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, but got {mode!r}.{hint}")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))} or None, but got {dtype!r}.")
        self._ignored = _names(ignore_modules)
        self._kept = Kept(keep_fp32)
        require("bitsandbytes", f"BitsandbytesPrecision({mode!r})")
        self.precision = mode  # type: ignore[assignment]
        self.mode = mode
        self.dtype = torch.bfloat16 if dtype is None else dtype
        self._remarks: list[str] = []
        self._replaced: list[tuple[weakref.ref[Tensor], str]] = []

    # -- set up

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Quantise the linear layers of ``module`` in place, one after the other.

        Raises:
            ValueError: if a quantised weight is shared with another module, a layer is quantised in another mode or
                is quantised and shall not be; or if a name of ``ignore_modules`` fits no module.

        """
        model = uncompiled(module)
        release(model)
        self._kept.names(model)
        self._check_ignored(model)
        self._check_ties(model)
        reasons = {name: self._quantize_unless(name, linear, model) for name, linear in _linears(model)}
        stay_off_fast_paths(model)
        self._remark(type(model).__name__, reasons)
        return self._kept.convert(module, self.dtype)

    def _quantize_unless(self, name: str, linear: nn.Linear, module: nn.Module) -> str | None:
        """Quantise ``linear`` and return None, or else why not."""
        from lightning.fabric.plugins.precision import _bitsandbytes_layers as layers

        reason = self._reason_by_name(name)
        if isinstance(linear, layers.QuantizedLinear):
            self._check_quantized(name, linear, reason)
            linear._name = f"{name}.weight".lstrip(".")
            return None
        if layers.is_of_bitsandbytes(linear):
            return "is a layer of bitsandbytes already"
        reason = reason or _reason_by_kind(linear)
        if reason is None and self.mode != "int8-training":
            owners = _owners(linear.weight, module)
            reason = f"shares its weight: {' and '.join(owners)}" if len(owners) > 1 else None
        if reason is None:
            weight = linear.weight
            layers.quantize_(linear, layers.Spec(self.mode, self.dtype))
            linear._name = f"{name}.weight".lstrip(".")  # type: ignore[assignment]
            if linear.weight is not weight and weight.requires_grad:
                self._replaced.append((weakref.ref(weight), f"{name}.weight".lstrip(".")))
        return reason

    def _reason_by_name(self, name: str) -> str | None:
        if self._kept.holds(name):
            return "computes in float32 (`keep_fp32`)"
        return "is in `ignore_modules`" if f"{name}.".startswith(self._ignored) else None

    def _check_quantized(self, name: str, linear: Any, reason: str | None) -> None:
        if linear.spec != (self.mode, self.dtype):
            raise ValueError(
                f"{name!r} is quantised already, as {linear.spec.mode!r} with {linear.spec.dtype}, but now it is to "
                f"be {self.mode!r} with {self.dtype}. Make the model again, or pass the same mode and dtype."
            )
        if reason is not None:
            raise ValueError(
                f"{name!r} {reason}, but it is quantised already. Make the model again, outside of "
                "`fabric.init_module()`."
            )

    def _check_ties(self, module: nn.Module) -> None:
        from lightning.fabric.plugins.precision._bitsandbytes_layers import is_quantized_weight

        for parameter in filter(is_quantized_weight, module.parameters()):
            owners = _owners(parameter, module)
            if len(owners) > 1:
                raise ValueError(
                    f"{' and '.join(owners)} share a weight that is quantised, which only a linear layer can use. Tie "
                    "them the other way round (`linear.weight = other.weight`), or outside of `fabric.init_module()`."
                )

    def _check_ignored(self, module: nn.Module) -> None:
        names = [name for name, _ in module.named_modules()]
        for prefix in self._ignored:
            if not any(f"{name}.".startswith(prefix) for name in names):
                raise ValueError(
                    f"ignore_modules has {prefix!r}, with which no name of a module of {type(module).__name__} begins."
                    f"{did_you_mean(prefix, filter(None, names))} Names are those of `model.named_modules()`."
                )

    def _remark(self, model: str, reasons: dict[str, str | None]) -> None:
        stay = {name: reason for name, reason in reasons.items() if reason}
        why = [f"{name!r} is not quantised: it {reason}." for name, reason in stay.items()]
        if len(stay) == len(reasons):
            rank_zero_warn(f"{type(self).__name__}({self.mode!r}) has quantised nothing in {model}. {' '.join(why)}")
        count = f"{len(reasons) - len(stay)} of {len(reasons)} linear layers are quantised ({self.mode})"
        self._remarks += [f"{model}: {count}.", *why]

    def check_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        given = {id(parameter) for optimizer in optimizers for parameter in self.main_params(optimizer)}
        names = [name for parameter, name in self._replaced if id(parameter()) in given]
        if names:
            shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise ValueError(
                f"The optimizer is to update weights that are quantised now, and that mode={self.mode!r} does not "
                f"train: {shown}. Create it after `setup_module`, of `[p for p in model.parameters() if "
                "p.requires_grad]`, or name layers that are to be trained in `ignore_modules`."
            )

    # -- create

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        if self._ignored or self._kept:
            argument = "ignore_modules" if self._ignored else "keep_fp32"
            raise RuntimeError(
                f"`fabric.init_module()` quantises each layer as soon as it exists, when it has no name yet that "
                f"`{argument}` could exempt. Create the model outside, and set-up quantises the others one by one; or "
                f"leave `{argument}` out."
            )
        return self._quantizing()

    @contextmanager
    def _quantizing(self) -> Iterator[None]:
        from lightning.fabric.plugins.precision import _bitsandbytes_layers as layers

        with default_dtype(self.dtype), layers.linears_quantized_when_made(layers.Spec(self.mode, self.dtype)):
            yield

    # -- use

    def forward_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype)

    def convert_input(self, data: Any) -> Any:
        return cast_floating(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())

    # -- ask

    def computes_in(self, name: str, module: nn.Module) -> str:
        if self._kept.holds(name):
            return "float32"
        is_quantized = hasattr(module, "spec") and isinstance(module, nn.Linear)
        return "int8" if is_quantized and self.mode.startswith("int8") else dtype_name(self.dtype)

    def remarks(self) -> list[str]:
        return [*self._remarks, *self._kept.remarks()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_replaced": []}  # what an optimizer may refer to is in this process


def _names(given: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable | None):
        raise TypeError(f"`ignore_modules` is a list of names, but got {given!r}. Pass e.g. ['head'].")
    names = tuple(given or ())
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"`ignore_modules` is a list of names, but got {given!r}. Pass e.g. ['head'].")
    return names


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield name, part


def _reason_by_kind(linear: nn.Linear) -> str | None:
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, whose weight others may use"
    if not {"weight"} <= linear._parameters.keys() <= {"weight", "bias"}:
        return "computes its weight from other parameters"
    return None


def _owners(parameter: Tensor, module: nn.Module) -> list[str]:
    return [
        repr(f"{name}.{key}".lstrip("."))
        for name, part in module.named_modules()
        for key, own in part._parameters.items()
        if own is parameter
    ]
