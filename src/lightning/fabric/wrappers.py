"""What the user holds in place of a module, an optimizer and a dataloader: looks like the original, reroutes one call.

Wrappers are put on and taken off in ``fabric.py`` and nowhere else. What they need is looked up when they are made, so
that a training step pays for nothing but the call.
"""

import copy
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader

from lightning.fabric.plugins.precision._dtypes import default_dtype
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._single_file import by_names_of
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities import loader_position
from lightning.fabric.utilities.apply_func import apply_to_collection, move_data_to_device
from lightning.fabric.utilities.compilation import (
    begin_no_graph_with,
    compile_whole,
    names_without_compilation,
    uncompiled,
    without_compilation,
)
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.fabric.utilities.init import refuse_unfilled, unfilled
from lightning.fabric.utilities.rank_zero import rank_zero_warn

_STEP_METHODS = frozenset({"training_step", "validation_step", "test_step", "predict_step"})
_METHOD_KEY = "_fabric_method"  # travels with the call, so it reaches replicas and other threads too


# ---- modules ---------------------------------------------------------------------------------------------------------


class _Dispatch:
    """Stands in for a module's ``forward`` while a method other than ``forward`` is being routed.

    A call that carries a method's name runs that method; every other call (the method calling ``self(x)`` itself, or
    another thread) runs the ``forward`` that was there before. It keeps no state of a call, so calls may nest and run
    in several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls_in_flight = 0
        self._patched_forward: Any = None  # an instance-level `forward` that the user has put there

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = kwargs.pop(_METHOD_KEY, None)
        if name is not None:
            return getattr(module, name)(*args, **kwargs)
        if self._patched_forward is not None:
            return self._patched_forward(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        with self._lock:
            if self._calls_in_flight == 0:
                self._patched_forward = module.__dict__.get("forward")
                module.__dict__["forward"] = types.MethodType(self, module)
            self._calls_in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls_in_flight -= 1
                if self._calls_in_flight == 0:
                    self._restore(module)

    def _restore(self, module: nn.Module) -> None:
        if self._patched_forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = self._patched_forward

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Dispatch, ()


class _FabricModule(_DeviceDtypeModuleMixin):
    """The user's module; calls go through precision and strategy, everything else straight to the original.

    ``forward_module`` is what the strategy made of ``original_module`` (the same object where it made nothing).
    """

    def __init__(self, forward_module: nn.Module, strategy: Strategy, original_module: nn.Module | None = None) -> None:
        # kept out of nn.Module's registry: names of parameters are those of the original
        own = self.__dict__
        own["_original_module"] = forward_module if original_module is None else original_module
        own["_forward_module"] = forward_module
        own["_strategy"] = strategy
        super().__init__()
        precision = strategy.precision
        own["_precision"] = precision
        own["_is_plain"] = _does_nothing_around_forward(precision)
        own["_wrapped_by_strategy"] = uncompiled(forward_module) is not own["_original_module"]
        own["_dispatch"] = _Dispatch()
        own["_forward_methods"] = {
            name for name in _STEP_METHODS if callable(getattr(own["_original_module"], name, None))
        }
        own["_routes"] = {}
        own["_before_first_use"] = None
        # where a strategy's wrapper breaks the graph of a compiled forward, they would be graphs without a tensor
        begin_no_graph_with(default_dtype.__enter__, default_dtype.__exit__)
        if unfilled(own["_original_module"].named_parameters()):
            own["_before_first_use"] = self.register_forward_pre_hook(_refuse_unfilled_module)

    # -- what is rerouted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # torch's own way to `forward` takes several microseconds; what it does besides, the module inside does too
        if self._forward_pre_hooks or self._forward_hooks or self._backward_hooks or self._backward_pre_hooks:
            return super().__call__(*args, **kwargs)
        if self._is_plain:
            return self._forward_module(*args, **kwargs) if kwargs else self._forward_module(*args)
        return self._run(self._forward_module, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module under its precision and strategy; floating-point inputs and outputs are converted."""
        return self._run(self._forward_module, args, kwargs)

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Let ``module.<method>(...)`` go the same way as ``forward``.

        Args:
            method: a method of the original module, or its name.

        Raises:
            ValueError: for ``forward`` itself, which always goes that way.
            AttributeError: if the original module has no such method.
            TypeError: for anything but a name or a method.

        """
        if not isinstance(method, str) and not inspect.ismethod(method):
            raise TypeError(
                f"`mark_forward_method` takes a method or the name of one, but got {method!r}. "
                "Pass e.g. 'generate' or `model.generate`."
            )
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise ValueError("`forward` always runs through Fabric and cannot be marked. Mark other methods only.")
        if not callable(getattr(self._original_module, name, None)):
            raise AttributeError(
                f"{type(self._original_module).__name__} has no method {name!r} to mark as a forward method. "
                "Check its spelling, or mark it after it was added."
            )
        self._forward_methods.add(name)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        precision = self._precision
        args = precision.convert_input(args)
        if kwargs:
            kwargs = precision.convert_input(kwargs)
        with precision.forward_context():
            output = function(*args, **kwargs) if kwargs else function(*args)
        return precision.convert_output(output)

    def _call_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._before_first_use is not None:
            _refuse_unfilled_module(self, args)
        forward_module = self._forward_module
        if forward_module is self._original_module and forward_module._compiled_call_impl is None:
            return self._run(getattr(self._original_module, name), args, kwargs)
        with self._dispatch.installed(self._original_module):
            return self._run(functools.partial(self._forward_module, **{_METHOD_KEY: name}), args, kwargs)

    def _call_guarded(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with _no_computation_past(self, name):
            return getattr(self._original_module, name)(*args, **kwargs)

    # -- what is forwarded

    @property
    def module(self) -> nn.Module:
        """The module that was set up, the identical object."""
        return self._original_module

    @property
    def training(self) -> bool:
        """Whether the original module is in training mode."""
        return self._original_module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_is_plain" in self.__dict__:  # not while nn.Module.__init__ runs: the original keeps its mode
            self._original_module.training = mode

    def train(self, mode: bool = True) -> "_FabricModule":
        """Set the training mode of the original module and of what wraps it."""
        self._forward_module.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's state: keys carry no wrapper's prefix."""
        with names_without_compilation([self._original_module]):
            return self._strategy.state_dict(self._original_module, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load into the original module, each rank its part; keys may carry the prefix of a compiled module's."""
        original = self._original_module
        with names_without_compilation([original]):
            state = cast("dict[str, Any]", by_names_of(original, state_dict))
            if kwargs:
                return original.load_state_dict(state, strict=strict, **kwargs)
            return self._strategy.load_module_state_dict(original, state, strict=strict)

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
        """Part of ``load_state_dict`` of a module that has a set-up module inside."""
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        outcome = self._original_module.load_state_dict(own, strict=False)
        missing_keys += [prefix + key for key in outcome.missing_keys]
        unexpected_keys += [prefix + key for key in outcome.unexpected_keys]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The original module's parameters under the original's names."""
        with names_without_compilation([self._original_module]):
            return iter(list(self._strategy.named_parameters(self._original_module, *args, **kwargs)))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The original module's buffers under the original's names."""
        return self._original_module.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The original module (under the empty name) and everything in it."""
        return self._original_module.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The original module's children."""
        return self._original_module.named_children()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile in place, as set-up does with a module that is compiled, and no longer as it was compiled before."""
        original = self._original_module
        forward_module = without_compilation(self._forward_module)[0]
        original.compile(*args, **kwargs)
        compilation = without_compilation(original)[1]
        if compilation is not None:
            forward_module = compile_whole(compilation, forward_module, original, self._strategy.check_one_graph)
        self.__dict__["_forward_module"] = forward_module

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, wherever the strategy keeps them."""
        self._forward_module.zero_grad(set_to_none)

    def apply(self, fn: Callable[[nn.Module], None]) -> "_FabricModule":
        """Apply ``fn`` to the original module and everything in it."""
        self._original_module.apply(fn)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FabricModule":
        self._original_module._apply(fn, recurse)
        return super()._apply(fn, recurse=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n  (module): {_indented(repr(self._forward_module))}\n)"

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if "_original_module" not in own:  # while being unpickled or copied
            raise AttributeError(name)
        value = getattr(own["_original_module"], name)
        if name in own.get("_forward_methods", ()):
            return self._route(name, self._call_method)
        if own.get("_wrapped_by_strategy") and inspect.ismethod(value) and value.__self__ is own["_original_module"]:
            return self._route(name, self._call_guarded)
        return value

    def _route(self, name: str, through: Callable[..., Any]) -> Callable[..., Any]:
        """One callable per name and way, made when it is first asked for."""
        route = self._routes.get(name)
        if route is None or route.func.__func__ is not through.__func__:  # type: ignore[attr-defined]
            route = functools.partial(through, name)
            if not torch.compiler.is_dynamo_compiling():  # which would compile again for a dict that has changed
                self._routes[name] = route
        return route

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = name in self.__dict__ or (hasattr(type(self), name) and name != "forward")
        if is_own or "_is_plain" not in self.__dict__:
            super().__setattr__(name, value)
        else:  # what `forward` reads as `self.name` lives on the original
            setattr(self._original_module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._original_module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FabricModule":
        clone = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self._strategy)], memo[id(self._precision)] = self._strategy, self._precision
        clone.__dict__.update(copy.deepcopy({**self.__dict__, "_routes": {}}, memo))
        return clone

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._original_module)})


def _refuse_unfilled_module(wrapper: _FabricModule, _: Any) -> None:
    original = wrapper._original_module
    refuse_unfilled(original.named_parameters(), f"A forward of {type(original).__name__}")
    wrapper.__dict__["_before_first_use"].remove()
    wrapper.__dict__["_before_first_use"] = None


def _does_nothing_around_forward(precision: Precision) -> bool:
    hooks = ("convert_input", "convert_output", "forward_context")
    return all(getattr(type(precision), hook) is getattr(Precision, hook) for hook in hooks) and not any(
        hook in vars(precision) for hook in hooks
    )


@contextmanager
def _no_computation_past(wrapper: _FabricModule, name: str) -> Iterator[None]:
    """Refuse, in this thread, that a part of the module runs without the strategy having been called first."""
    this_thread = threading.get_ident()
    strategy_was_called = False

    def refuse(module: nn.Module, _: Any) -> None:
        nonlocal strategy_was_called
        if threading.get_ident() != this_thread or strategy_was_called:
            return
        if module is wrapper or module is wrapper._forward_module:
            strategy_was_called = True
            return
        if any(module is part for part in wrapper._original_module.modules()):
            raise RuntimeError(
                f"`{name}()` runs {type(module).__name__}'s forward past Fabric's strategy and precision, so gradients "
                f"would not be synchronised. Mark it once after set-up: `model.mark_forward_method({name!r})`."
            )

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")


# ---- optimizers ------------------------------------------------------------------------------------------------------


class _FabricOptimizer:
    """The user's optimizer; ``step`` goes through the strategy, everything else straight through.

    Calling this class gives an instance of both this class and the optimizer's own, which shares the original's
    attributes: whatever is set on one is seen by the other.
    """

    # `step` is a slot because a slot goes first: the shared attributes may hold a `step` that a scheduler has patched
    __slots__ = ("_callbacks", "_optimizer", "_strategy", "step")

    def __new__(cls, optimizer: Any, strategy: Strategy, callbacks: list[Any] | None = None) -> "_FabricOptimizer":
        if cls is not _FabricOptimizer:
            return super().__new__(cls)
        original: Any = type(optimizer)
        return super().__new__(_optimizer_class(original))

    def __init__(self, optimizer: Any, strategy: Strategy, callbacks: list[Any] | None = None) -> None:
        object.__setattr__(self, "__dict__", optimizer.__dict__)
        self._optimizer = optimizer
        self._strategy = strategy
        self._callbacks = [] if callbacks is None else callbacks
        self.step = self._step
        if unfilled(_named_parameters(optimizer)):
            self.step = self._first_step

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step through the strategy and the precision's scaler; returns what the strategy returns."""
        optimizer = self._optimizer
        if self._callbacks:
            self._call("on_before_optimizer_step", optimizer)
        output = (
            self._strategy.optimizer_step(optimizer)
            if closure is None
            else self._strategy.optimizer_step(optimizer, closure=closure)
        )
        self.__dict__["_opt_called"] = True
        if self._callbacks:
            self._call("on_after_optimizer_step", self._strategy, optimizer)
        return output

    def _first_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """:meth:`_step`, if no parameter is empty any more."""
        refuse_unfilled(_named_parameters(self._optimizer), f"A step of {type(self._optimizer).__name__}")
        self.step = self._step
        return self._step(closure)

    # what torch's schedulers look for: the step is counted above, they need not patch it
    _step._wrapped_by_lr_sched = _first_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self._callbacks:
            method = getattr(callback, hook, None)
            if callable(method):
                method(*args)

    @property
    def optimizer(self) -> Any:
        """The optimizer that was set up, the identical object."""
        return self._optimizer

    def state_dict(self) -> dict[str, Tensor]:
        """The state as the strategy gives it (gathered where it is sharded)."""
        return self._strategy.get_optimizer_state(self._optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the original optimizer what :meth:`state_dict` returned."""
        self._strategy.load_optimizer_state(self._optimizer, state_dict)

    def __reduce__(self) -> Any:
        return _FabricOptimizer, (self._optimizer, self._strategy, self._callbacks)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


def _named_parameters(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        numbered = [f"param_groups[{index}]['params'][{number}]" for number in range(len(group["params"]))]
        yield from zip(group.get("param_names") or numbered, group["params"], strict=True)


@functools.cache
def _optimizer_class(original: type) -> type:
    return types.new_class(f"Fabric{original.__name__}", (_FabricOptimizer, original), {}, _set_module)


def _set_module(namespace: dict[str, Any]) -> None:
    namespace["__module__"] = __name__


# ---- dataloaders -----------------------------------------------------------------------------------------------------


class _FabricDataLoader:
    """The user's dataloader; batches arrive on ``device`` (``None``: left where they are), epochs are counted.

    It knows where it is, and goes on from there in another process: see :meth:`state_dict`.
    """

    def __init__(self, dataloader: DataLoader[Any], device: torch.device | None = None) -> None:
        own = self.__dict__
        own["_dataloader"] = dataloader
        own["_device"] = device
        own["_last_epoch"] = None
        own["_position"] = None  # of the last iteration
        own["_to_resume"] = None  # what the next one has to begin with

    @property
    def device(self) -> torch.device | None:
        """Where batches are moved to, or ``None``."""
        return self._device

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[Any]:
        position, batches = self._begin()
        device = self._device
        for batch in batches:
            position.yielded += 1
            yield batch if device is None else move_data_to_device(batch, device)
        position.is_over = True

    def _begin(self) -> tuple[loader_position.Position, Iterator[Any]]:
        own, loader = self.__dict__, self._dataloader
        state, own["_to_resume"] = self._to_resume, None
        if state is None or state["is_over"] or _sampler_epoch(loader) not in (None, self._last_epoch):
            self._advance_epoch()
        epoch = None if state is None else state["epoch"] + state["is_over"]
        if state is not None and epoch == self._last_epoch:
            position, batches = loader_position.resume(loader, state)
        else:
            position, batches = loader_position.begin(loader, self._position)
        if state is not None and epoch != self._last_epoch:
            rank_zero_warn(
                f"The loader was to go on in epoch {epoch}, but `set_epoch` says {self._last_epoch}: that epoch is "
                "begun, at its first batch."
            )
        position.watch(batches)
        own["_position"] = position
        return position, batches

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's loader is, as tensors and plain values: in which epoch, and after how many batches.

        Only batches that were handed out count, not those that workers have prepared. A loop that was left before its
        end is in the middle of its epoch; one that has ended is at the beginning of the next.
        """
        if self._to_resume is not None:
            return dict(self._to_resume)
        return loader_position.state_of(self._dataloader, self._position, self._last_epoch)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on where :meth:`state_dict` was called.

        It yields the same batches as if there had been no interruption, and leaves the random states of the process as
        they are. Samples that were seen are not loaded again, only their indices drawn; but where a data set has no
        indices (``IterableDataset``), and neither it nor the loader has a ``state_dict()``, batches are loaded and
        dropped. A warning says so where the same batches cannot be had: with another number of ranks or workers,
        another batch size or data set.
        """
        own = self.__dict__
        own["_position"], own["_last_epoch"] = None, state_dict["epoch"]
        own["_to_resume"] = state_dict if loader_position.restore(self._dataloader, state_dict) else None

    def _advance_epoch(self) -> None:
        """The next epoch; where the user has called ``set_epoch`` since the last one, the epoch that they set."""
        last, now = self._last_epoch, _sampler_epoch(self._dataloader)
        following = 0 if last is None else last + 1
        epoch = following if now is None or now == last else now
        _set_sampler_epoch(self._dataloader, epoch)
        self.__dict__["_last_epoch"] = epoch

    def __getattr__(self, name: str) -> Any:
        if "_dataloader" not in self.__dict__:  # while being unpickled or copied
            raise AttributeError(name)
        return getattr(self._dataloader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataloader, name, value)


def _sampler_epoch(dataloader: DataLoader[Any]) -> int | None:
    for sampler in (dataloader.sampler, getattr(dataloader.batch_sampler, "sampler", None)):
        epoch = getattr(sampler, "epoch", None)
        if isinstance(epoch, int):
            return epoch
    return None


# ---- taking wrappers off ---------------------------------------------------------------------------------------------


def _unwrap_compiled(module: Any) -> tuple[Any, Callable[[nn.Module], nn.Module] | None]:
    """``torch.compile(module)`` → the module, and what compiles another module with the same options; else no change.

    ``None`` in the second place says that the module was not compiled.
    """
    inner = uncompiled(module)
    return inner, None if inner is module else module.dynamo_ctx


def unwrap(obj: Any) -> Any:
    """The user's own module, optimizer or dataloader behind our wrapper and behind ``torch.compile``."""
    if isinstance(obj, _FabricModule):
        obj = obj._original_module
    elif isinstance(obj, _FabricOptimizer):
        return obj._optimizer
    elif isinstance(obj, _FabricDataLoader):
        return obj._dataloader
    return uncompiled(obj)


def _unwrap_objects(collection: Any) -> Any:
    """:func:`unwrap` for every module, optimizer and dataloader in a nested collection."""
    return apply_to_collection(
        collection, dtype=(_FabricModule, _FabricOptimizer, _FabricDataLoader, nn.Module), function=unwrap
    )


def unwrap_for_files(state: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`_unwrap_objects` of each entry, but for loaders: their positions, which are rank 0's for all ranks."""
    return {key: _for_files(obj) for key, obj in state.items()}


def _for_files(obj: Any) -> Any:
    if isinstance(obj, _FabricDataLoader):
        obj = obj.state_dict()
    return loader_position.for_all_ranks(obj) if loader_position.is_state(obj) else _unwrap_objects(obj)


def is_wrapped(obj: object) -> bool:
    """Whether ``obj`` is a module, optimizer or dataloader that Fabric has set up."""
    return isinstance(uncompiled(obj), (_FabricModule, _FabricOptimizer, _FabricDataLoader))
