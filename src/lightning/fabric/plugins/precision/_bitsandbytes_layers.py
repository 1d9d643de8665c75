"""Linear layers of bitsandbytes whose weights are quantised from the first moment on.    package: bitsandbytes

They are layers of bitsandbytes, and differ from its own in what goes wrong there without a word:

* Weights are quantised where they are, not at the first move to a device; a state dict of ordinary weights is quantised
  as it is loaded, one of quantised weights is taken as it is.
* All that is needed to undo the quantisation is in parameters (``weight`` and ``scales``, both of integers), so that
  moving, casting, copying and broadcasting a model keeps the two together.
* ``forward`` changes nothing in the layer: no dtype of a bias, no layout of a weight, no quantised copy that outlives
  an update of the weight.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning.fabric.plugins.precision._dtypes import default_dtype
from lightning.fabric.utilities.init import unfilled


def _import_quietly() -> Any:
    """Import the package without its remark that an optional faster kernel for CPUs is missing."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
    return bitsandbytes


bnb: Any = _import_quietly()
# the 8-bit kernels take float16 and say at each call that they cast
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "will be cast from" not in str(record.msg)
)

_BLOCK = 64  # weights that share a scale, in 4 bit
_BLOCKS_PER_SCALE = 256  # blocks whose scales share one of their own, in the modes ending in -dq
_OUTLIER = 6.0  # inputs from here on are multiplied in 16 bit, in the 8-bit modes
_DTYPES_OF_KERNELS = (torch.float16, torch.bfloat16, torch.float32)
_CHANGES_NO_VALUE = frozenset({"requires_grad_", "detach_", "share_memory_", "set_", "rename_"})


class Spec(NamedTuple):
    """How layers are quantised, and the dtype they compute in."""

    mode: str
    dtype: torch.dtype

    @property
    def quant_type(self) -> str:
        return self.mode.removesuffix("-dq")

    @property
    def nested(self) -> bool:
        return self.mode.endswith("-dq")


# ---- weights ---------------------------------------------------------------------------------------------------------


class _Codes:
    """A quantised weight. Filling it, as functions of ``torch.nn.init`` do, would write nonsense, and is refused."""

    detach: Callable[[], Tensor]
    created_empty = False  # as it was asked for, and so it is left

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if (target := _overwritten(func, args, kwargs or {})) is not None:
            if target.created_empty:
                return target
            raise RuntimeError(  # a TypeError would make `weight += 1` try `weight = weight + 1`
                f"`{func.__name__}` is for ordinary weights, but this one is quantised already. Initialise the layer "
                "outside of `fabric.init_module()`, load a state dict, or pass `empty_init=True` if one is loaded "
                "afterwards."
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._ordinary(self.detach()).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), self._ordinary(self.detach().clone()))

    @staticmethod
    def _ordinary(codes: Tensor) -> nn.Parameter:
        return nn.Parameter(codes, requires_grad=False)  # the layer it is in links the rest to it again

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        # bitsandbytes takes this for the moment to quantise, or makes a parameter that has lost its scales
        return self.detach().to(*args, **kwargs)


def _overwritten(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "_Codes | None":
    """Return the quantised weight that ``func`` changes in place, other than by a copy of codes."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _CHANGES_NO_VALUE
    target = args[0] if args else kwargs.get("tensor")
    if not in_place or not isinstance(target, _Codes):
        return None
    is_copy = name == "copy_" and len(args) > 1 and args[1].dtype == target.dtype  # type: ignore[attr-defined]
    return None if is_copy else target


class Codes4bit(_Codes, bnb.nn.Params4bit):
    """Two weights in a byte."""


class Codes8bit(_Codes, bnb.nn.Int8Params):
    """A weight in a byte."""


# ---- layers that are not trained -------------------------------------------------------------------------------------


class QuantizedLinear(nn.Linear):
    """What the layers share: the mode they are in, and that they are told their name for messages."""

    weight: Any
    spec: Spec
    copies_what_it_loads = True
    _name: str = ""

    def named(self) -> str:
        return repr(self._name or type(self).__name__)


class _FrozenLinear(QuantizedLinear):
    """``weight`` holds the codes, ``scales`` what undoes the quantisation, as bytes: nothing casts them by accident.

    Both are parameters that are never trained, and not buffers: distributed strategies send buffers at every forward,
    and parameters once.
    """

    scales: nn.Parameter
    _filled: bool

    # -- what a layer of each kind knows

    def _encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of an ordinary weight, on its device."""
        raise NotImplementedError

    def _empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return codes and scales of the right shapes, not filled."""
        raise NotImplementedError

    def _floats(self) -> Tensor:
        """Return a view of those scales that are float32."""
        raise NotImplementedError

    def _link(self) -> None:
        """Bring what bitsandbytes and its users look for in place: a view of weight and scales."""
        raise NotImplementedError

    def _saved(self) -> dict[str, Tensor]:
        """Return the entries of a state dict that go with the weight, as bitsandbytes writes them."""
        raise NotImplementedError

    def _read(self, weight: Tensor, saved: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return codes and scales from a state dict of quantised weights; ``ValueError`` if it is of another kind."""
        raise NotImplementedError

    # -- becoming one

    def take_over(self, weight: Tensor) -> None:
        """Quantise ``weight``, the ordinary one that the layer had."""
        is_empty = bool(unfilled([("weight", weight)]))
        codes, scales = self._empty(weight.device) if is_empty or weight.is_meta else self._encode(weight.detach())
        self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("scales", nn.Parameter(scales, requires_grad=False))
        self._settle(is_empty)

    def _settle(self, is_empty: bool = False) -> None:
        """After weight and scales have become others, or moved."""
        if is_empty:
            self._filled = False
            self._floats().fill_(float("nan"))  # a mark that is gone when another rank sends what it has loaded
        if not self.scales.is_meta:
            self._link()
            self.weight.created_empty = not self._filled

    def reset_parameters(self) -> None:
        weight = torch.empty(self.out_features, self.in_features, device=self.scales.device, dtype=self.spec.dtype)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        self._fill(weight)

    def _fill(self, weight: Tensor) -> None:
        if not self.scales.is_meta:
            self._put(*self._encode(weight.detach().to(self.scales.device)))

    def _put(self, codes: Tensor, scales: Tensor) -> None:
        self.weight.detach().copy_(codes)
        self.scales.detach().copy_(scales)
        self._is_filled()

    # -- use

    def _check_filled(self) -> None:
        if self._floats().isnan().all():
            raise RuntimeError(
                f"The weight of {self.named()} was created empty, and nothing has filled it since. Load a checkpoint "
                "that has it first, or create the model with `empty_init=False`."
            )
        self._is_filled()

    def _is_filled(self) -> None:
        self._filled = True
        self.weight.created_empty = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, _Codes):
            raise ValueError(
                f"{self.named()} would share a quantised weight, which is not possible. Tie weights outside of "
                "`fabric.init_module()`; those stay as they are."
            )
        if name == "weight" and isinstance(value, Tensor) and value.is_floating_point():
            self._become_ordinary()  # it shares another's weight from now on, or is to have one of its own
        nn.Module.__setattr__(self, name, value)

    def _become_ordinary(self) -> None:
        for name in ("weight", "scales"):
            del self._parameters[name]
        for name in ("spec", "_filled", "_name", *self._of_bitsandbytes):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    _of_bitsandbytes: tuple[str, ...] = ()

    # -- moves and copies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FrozenLinear":
        was_meta = self.scales.is_meta
        super()._apply(fn, recurse)
        self._settle(is_empty=was_meta and not self.scales.is_meta)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._of_bitsandbytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settle()

    # -- files

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        del destination[f"{prefix}scales"]
        if not self.scales.is_meta:
            destination.update({f"{prefix}{key}": value for key, value in self._saved().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: state_dict[key] for key in state_dict if self._is_of_weight(key.removeprefix(prefix))}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        with self._without_weight():
            nn.Module._load_from_state_dict(
                self, rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        weight = own.pop(f"{prefix}weight", None)
        if weight is None:
            missing_keys.extend([f"{prefix}weight"] if strict else [])
            unexpected_keys.extend(own if strict else ())
            return
        try:
            self._load(
                weight,
                {key.removeprefix(prefix): value for key, value in own.items()},
                local_metadata.get("assign_to_params_buffers", False),
            )
        except ValueError as error:
            error_msgs.append(f'"{prefix}weight": {error}')

    def _is_of_weight(self, key: str) -> bool:
        return key in ("weight", "SCB", "weight_format") or key.startswith("weight.")

    @contextmanager
    def _without_weight(self) -> Iterator[None]:
        """What torch does to load a module, does it to the bias alone."""
        own = dict(self._parameters)
        for name in ("weight", "scales"):
            del self._parameters[name]
        try:
            yield
        finally:
            own.update(self._parameters)  # the bias may be another one now
            self._parameters.clear()
            self._parameters.update(own)

    def _load(self, weight: Tensor, saved: dict[str, Tensor], assign: bool) -> None:
        if self.scales.is_meta:
            if not assign:
                raise ValueError("the layer is on the meta device. Pass `assign=True`, or call `to_empty` first.")
            codes, scales = self._empty(weight.device)
            self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
            self._parameters["scales"] = nn.Parameter(scales, requires_grad=False)
            self._settle(is_empty=True)
        if weight.is_floating_point():
            shape = (self.out_features, self.in_features)
            if weight.shape != shape:
                raise ValueError(f"size mismatch: the checkpoint has {tuple(weight.shape)}, the model {shape}.")
            self._fill(weight)
        else:
            self._put(*self._read(weight, saved))


class Linear4bit(_FrozenLinear, bnb.nn.Linear4bit):
    """Weights in 4 bit, in blocks with a scale each; inputs are multiplied with what they stand for, in ``dtype``."""

    _of_bitsandbytes = (
        "quant_state",
        "quant_storage",
        "compute_dtype",
        "compute_type_is_set",
        "support_avx512bf16_for_cpu",
        "_linked",
    )
    _linked: tuple[Tensor, Any]
    quant_state: Any

    def _sizes(self) -> tuple[int, int, int]:
        """Return how many codes (in bytes), blocks, and scales of scales there are."""
        numel = self.in_features * self.out_features
        blocks = -(-numel // _BLOCK)
        return (numel + 1) // 2, blocks, -(-blocks // _BLOCKS_PER_SCALE)

    def _empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        codes, blocks, groups = self._sizes()
        scales = 4 + 4 * groups + blocks if self.spec.nested else 4 * blocks
        return _bytes(codes, device).unsqueeze(1), _bytes(scales, device)

    def _encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight if weight.dtype in _DTYPES_OF_KERNELS else weight.float()
        with default_dtype(torch.float32):  # the package keeps tables, made in the default dtype, for the whole process
            codes, state = bnb.functional.quantize_4bit(
                weight.contiguous(),
                blocksize=_BLOCK,
                quant_type=self.spec.quant_type,
                compress_statistics=self.spec.nested,
            )
        return codes, _packed(state)

    def _floats(self) -> Tensor:
        _, blocks, groups = self._sizes()
        return self.scales.detach()[: 4 * (1 + groups if self.spec.nested else blocks)].view(torch.float32)

    def _state_of(self, scales: Tensor) -> Any:
        groups = self._sizes()[2]
        scales, device = scales.detach(), scales.device
        nested = None
        if self.spec.nested:
            floats = scales[: 4 + 4 * groups].view(torch.float32)
            nested = bnb.functional.QuantState(
                absmax=floats[1:], blocksize=_BLOCKS_PER_SCALE, code=_dynamic_code(device), dtype=torch.float32
            )
        return bnb.functional.QuantState(
            absmax=scales[4 + 4 * groups :] if nested else scales.view(torch.float32),
            shape=torch.Size((self.out_features, self.in_features)),
            code=_code(self.spec.quant_type, device),
            blocksize=_BLOCK,
            quant_type=self.spec.quant_type,
            dtype=self.spec.dtype,
            offset=floats[0] if nested else None,
            state2=nested,
        )

    def _link(self) -> None:
        state = self._state_of(self.scales)
        if not isinstance(self.weight, Codes4bit):
            self._parameters["weight"] = Codes4bit(
                self.weight.detach(),
                compress_statistics=self.spec.nested,
                quant_type=self.spec.quant_type,
                blocksize=_BLOCK,
                bnb_quantized=True,
            )
        self.weight.quant_state = state
        self.__dict__.update(
            quant_state=state,
            quant_storage=torch.uint8,
            compute_dtype=self.spec.dtype,
            compute_type_is_set=True,
            support_avx512bf16_for_cpu=False,  # that repacks weights in place, and rounds their scales
            _linked=(self.scales, state),
        )

    def _saved(self) -> dict[str, Tensor]:
        # torch saves no tensors of different dtypes that share memory
        return {f"weight.{key}": value.clone() for key, value in self.quant_state.as_dict(packed=True).items()}

    def _read(self, weight: Tensor, saved: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        entries = {key.removeprefix("weight."): value for key, value in saved.items()}
        if weight.dtype != torch.uint8 or "absmax" not in entries:
            raise ValueError(
                f"the checkpoint has {weight.dtype} with {sorted(entries)}, not weights in 4 bit, but mode is "
                f"{self.spec.mode!r}."
            )
        with default_dtype(torch.float32):
            state = bnb.functional.QuantState.from_dict(entries, device=self.scales.device)
        has = f"{state.quant_type}{'-dq' if state.nested else ''}, {tuple(state.shape)}, blocks of {state.blocksize}"
        wants = f"{self.spec.mode}, {(self.out_features, self.in_features)}, blocks of {_BLOCK}"
        if has != wants:
            raise ValueError(f"the checkpoint has weights of another kind ({has}) than the model ({wants}).")
        return weight.view(-1, 1), _packed(state)

    def forward(self, x: Tensor) -> Tensor:
        if not self._filled:
            self._check_filled()
        scales, state = self._linked
        if scales is not self.scales:  # in a copy on another GPU
            state = self._state_of(self.scales)
        dtype = self.spec.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight
        if x.device.type == "cpu":
            return _Linear4bitOnCPU.apply(x.to(dtype), weight.detach(), bias, state).to(x.dtype)
        return bnb.matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=state).to(x.dtype)


class _Linear4bitOnCPU(torch.autograd.Function):
    """``linear``, with the weight made from its codes in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        ctx.codes, ctx.state = codes, state
        return nn.functional.linear(x, _decode(codes, state), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        for_x = grad @ _decode(ctx.codes, ctx.state) if ctx.needs_input_grad[0] else None
        for_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return for_x, None, for_bias, None


def _decode(codes: Tensor, state: Any) -> Tensor:
    # The kernel for CPUs takes wrong scales where rows do not begin with a block: it is shown one row, of even length.
    out_features, in_features = state.shape
    in_one_row = bnb.functional.QuantState(
        absmax=state.absmax,
        shape=torch.Size((1, 2 * codes.numel())),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=state.offset,
        state2=state.state2,
    )
    weight = bnb.functional.dequantize_4bit(codes, in_one_row).reshape(-1)
    return weight[: out_features * in_features].view(out_features, in_features)


class Linear8bit(_FrozenLinear, bnb.nn.Linear8bitLt):
    """Weights in 8 bit, with a scale for each output; inputs are quantised too, but for outliers."""

    _of_bitsandbytes = ("state", "index")

    def _empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device=device)
        return codes, _bytes(4 * self.out_features, device)

    def _encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.contiguous().half())
        return codes, scales.float().view(torch.uint8)

    def _floats(self) -> Tensor:
        return self.scales.detach().view(torch.float32)

    def _link(self) -> None:
        if not isinstance(self.weight, Codes8bit):
            self._parameters["weight"] = Codes8bit(self.weight.detach(), requires_grad=False)
        self.weight.SCB = self._floats()
        self.__dict__.update(state=_state_8bit(training=True), index=None)

    def _saved(self) -> dict[str, Tensor]:
        return {"SCB": self._floats().clone(), "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def _read(self, weight: Tensor, saved: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        shape = (self.out_features, self.in_features)
        if weight.dtype != torch.int8 or "SCB" not in saved or saved.get("weight_format", torch.tensor(0)) != 0:
            raise ValueError(
                f"the checkpoint has {weight.dtype} with {sorted(saved)}, not weights in 8 bit, but mode is "
                f"{self.spec.mode!r}."
            )
        if weight.shape != shape or saved["SCB"].numel() != self.out_features:
            raise ValueError(f"size mismatch: the checkpoint has {tuple(weight.shape)}, the model {shape}.")
        return weight, saved["SCB"].float().contiguous().view(-1).view(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        if not self._filled:
            self._check_filled()
        state = _state_8bit(self.training)
        state.has_fp16_weights = False
        state.CB, state.SCB = self.weight.detach(), self._floats()
        return _matmul_8bit(x, self.weight, self.bias, state, self.spec.dtype)


# ---- the layer that is trained ---------------------------------------------------------------------------------------


class Linear8bitTraining(QuantizedLinear, bnb.nn.Linear8bitLt):
    """Weights in ``dtype``, an ordinary parameter that optimizers update; quantised anew in each forward."""

    def take_over(self, weight: Tensor) -> None:
        self.__dict__.update(state=_state_8bit(training=True), index=None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and not weight.is_floating_point():
            error_msgs.append(
                f'"{prefix}weight": the checkpoint has {weight.dtype}, which mode {self.spec.mode!r} cannot train.'
            )
            return
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(self, x: Tensor) -> Tensor:
        # A state of its own for each forward: bitsandbytes would go on with the quantised weight of an earlier one, for
        # as long as there are gradients and in `eval`, even when the weight has changed.
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        weight = self.weight if is_trained else self.weight.detach()
        # what CPUs compute for `eval` has no gradient of the weight
        return _matmul_8bit(x, weight, self.bias, _state_8bit(self.training or is_trained), self.spec.dtype)


def _state_8bit(training: bool) -> Any:
    state = bnb.MatmulLtState()
    state.threshold = _OUTLIER
    state.is_training = training
    return state


def _matmul_8bit(x: Tensor, weight: Tensor, bias: Tensor | None, state: Any, dtype: torch.dtype) -> Tensor:
    # the kernels' gradients of weights are for two dimensions
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    out = bnb.matmul(rows, weight, bias=None if bias is None else bias.to(dtype), state=state)
    return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


# ---- bytes and tables ------------------------------------------------------------------------------------------------


def _bytes(number: int, device: torch.device) -> Tensor:
    return torch.empty(number, dtype=torch.uint8, device=device)


def _packed(state: Any) -> Tensor:
    """Return the scales as bytes: those in float32 first, which must begin where a float may."""
    parts = [state.offset.reshape(1), state.state2.absmax, state.absmax] if state.nested else [state.absmax]
    return torch.cat([part.reshape(-1).contiguous().view(torch.uint8) for part in parts])


@functools.cache
def _code(quant_type: str, device: torch.device) -> Tensor:
    """Return what the 16 codes stand for."""
    with default_dtype(torch.float32), torch.inference_mode(False):
        table: Tensor = bnb.functional.get_4bit_type(quant_type, device=device)
    return table


@functools.cache
def _dynamic_code(device: torch.device) -> Tensor:
    """Return what the 256 codes of a quantised scale stand for."""
    with default_dtype(torch.float32), torch.inference_mode(False):
        table: Tensor = bnb.functional.create_dynamic_map().to(device)
    return table


# ---- from ordinary layers --------------------------------------------------------------------------------------------

_CLASSES: dict[str, type[QuantizedLinear]] = {
    "nf4": Linear4bit,
    "nf4-dq": Linear4bit,
    "fp4": Linear4bit,
    "fp4-dq": Linear4bit,
    "int8": Linear8bit,
    "int8-training": Linear8bitTraining,
}


def quantize_(linear: nn.Linear, spec: Spec) -> None:
    """Turn an ordinary layer into a quantised one, in place: it stays the same object, with hooks and all."""
    linear.__class__ = _CLASSES[spec.mode]
    assert isinstance(linear, (_FrozenLinear, Linear8bitTraining))
    linear.__dict__.update(spec=spec, _filled=True)
    linear.take_over(linear.weight)


def is_of_bitsandbytes(module: nn.Module) -> bool:
    """Whether the layer is one of the package's own, made by the user."""
    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and not isinstance(module, QuantizedLinear)


def is_quantized_weight(parameter: object) -> bool:
    return isinstance(parameter, _Codes)


@contextmanager
def linears_quantized_when_made(spec: Spec) -> Iterator[None]:
    """Inside, each ``nn.Linear`` is quantised as soon as it exists, however the caller has imported the class."""
    original = nn.Linear.__init__

    @functools.wraps(original)
    def init_and_quantize(linear: nn.Linear, *args: Any, **kwargs: Any) -> None:
        original(linear, *args, **kwargs)
        if type(linear) is nn.Linear:
            quantize_(linear, spec)

    nn.Linear.__init__ = init_and_quantize  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Linear.__init__ = original  # type: ignore[method-assign]
