"""The contract of a precision, which is 32-bit itself."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning.fabric.plugins.precision._kept import release

_PRECISION_INPUT_INT: TypeAlias = Literal[64, 32, 16]
_PRECISION_INPUT_STR_ALIAS: TypeAlias = Literal["64", "32", "16", "bf16"]
_PRECISION_INPUT_STR: TypeAlias = Literal[
    "64-true",
    "32-true",
    "16-true",
    "bf16-true",
    "16-mixed",
    "bf16-mixed",
    "float8",
    "transformer-engine",
    "transformer-engine-float16",
]
_PRECISION_INPUT: TypeAlias = _PRECISION_INPUT_INT | _PRECISION_INPUT_STR_ALIAS | _PRECISION_INPUT_STR


class StepHooks(NamedTuple):
    """What a precision does in each step beside torch's own ``backward`` and ``step``; None: nothing."""

    pre_backward: Callable[..., Any] | None = None
    backward: Callable[..., None] | None = None
    post_backward: Callable[..., Any] | None = None
    optimizer_step: Callable[..., Any] | None = None


NO_STEP_HOOKS = StepHooks()


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


class Precision:
    """Decides the dtypes of weights, of computation and of the gradients' way to the optimizer.

    Every method here does what full 32-bit training needs, which is mostly nothing. A subclass overrides what is
    different. Used in this order: :meth:`convert_module` once; then in each forward :meth:`convert_input`,
    :meth:`forward_context`, :meth:`convert_output`; in each backward :meth:`pre_backward`, :meth:`backward`,
    :meth:`post_backward`; before clipping :meth:`unscale_gradients`; and :meth:`optimizer_step`.
    """

    precision: _PRECISION_INPUT_STR = "32-true"
    engine: ClassVar[str | None] = None
    """What it leaves casting and loss scaling to, and so cannot do without; None: nothing."""

    def computes_on(self, device_type: str) -> None:
        """Take note of the type of the devices, ``"cuda"`` or ``"cpu"``; said before :meth:`convert_module`.

        Raises ``ValueError`` if it could not be honoured there.
        """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` with parameters and buffers of the right dtype. Changes it in place where it can."""
        release(module)
        return module

    def check_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Raise ``ValueError`` if one updates parameters that were replaced by ones which are never trained.

        Asked after :meth:`convert_module`: of optimizers set up with the module, and of each that is set up later.
        """

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new floating-point tensors get this precision's dtype."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new modules get parameters of this precision's dtype."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context for one forward; entered once, for each forward anew."""
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Return the nested ``data`` with its floating-point tensors in the dtype that the forward computes in.

        Tensors of other dtypes, other objects and the nesting stay as they are. Nothing is changed in place.
        """
        return data

    def convert_output(self, data: Any) -> Any:
        """Return the nested ``data`` with its floating-point tensors in torch's default dtype."""
        return data

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """Run before :meth:`backward`; ``tensor`` is the loss."""

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of ``tensor``; the arguments are those of ``torch.Tensor.backward``."""
        tensor.backward(*args, **kwargs)

    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """Run after :meth:`backward`."""

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step ``optimizer``, with ``closure=`` if the user gave one, and return what the step returned."""
        return optimizer.step(**kwargs)

    def step_hooks(self) -> StepHooks:
        """Return those methods of the step that do something here, so that no step asks again.

        ``NO_STEP_HOOKS`` itself, if none does.
        """
        hooks = {name: getattr(self, name) for name in StepHooks._fields}
        own = {
            name: hook for name, hook in hooks.items() if getattr(hook, "__func__", hook) is not vars(Precision)[name]
        }
        return StepHooks(**own) if own else NO_STEP_HOOKS

    def main_params(self, optimizer: Optimizer) -> Generator[Tensor, None, None]:
        """Yield the parameters that ``optimizer`` updates."""
        for group in optimizer.param_groups:
            yield from group["params"]

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring the gradients of ``optimizer`` to their true size. Calling it again before the step does nothing."""

    def computes_in(self, name: str, module: nn.Module) -> str:
        """Return the dtype that ``module`` computes in, for :meth:`Fabric.explain`; ``name`` is its name in the model.

        Asked after :meth:`convert_module`, of modules that have parameters of their own.
        """
        return dtype_name(next(module.parameters(recurse=False)).dtype)

    def remarks(self) -> list[str]:
        """Return what a user should know of the modules that were converted, a sentence each."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what must be in a checkpoint to go on as before."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def teardown(self) -> None:
        """Undo what outlives the run. May be called more than once."""
