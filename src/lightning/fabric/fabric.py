"""``Fabric``: the verbs of a training script, in the order of its life.

Every method does three things: it says what is wrong with the call, takes our wrappers off, and makes one call down to
the strategy, the precision or the launcher.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader

from lightning.fabric import _checks
from lightning.fabric._accumulation import Accumulation, Reduction, Weight, factors_of
from lightning.fabric._checkpoints import BestLike, Checkpoints
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.checkpoint.saving import SaveOptions
from lightning.fabric.connector import _PLUGIN_INPUT, _PRECISION_INPUT, _Connector, _is_using_cli
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.observe.first_step import AtFirstStep, DryRunIsOver, Ended
from lightning.fabric.observe.inventory import Inventory, Samplers
from lightning.fabric.strategies.strategy import Strategy, _Sharded
from lightning.fabric.utilities import seed as _seed
from lightning.fabric.utilities.apply_func import (
    apply_to_collection,
    convert_tensors_to_scalars,
    convert_to_tensors,
    move_data_to_device,
)
from lightning.fabric.utilities.compilation import (
    Compilation,
    blocks_to_compile,
    compile_parts,
    compile_whole,
    names_without_compilation,
    take_out_compiled_parts,
    uncompiled,
    without_compilation,
)
from lightning.fabric.utilities.data import (
    _auto_add_worker_init_fn,
    _replace_dunder_methods,
    distribute_dataloader,
)
from lightning.fabric.utilities.distributed import ReduceOp
from lightning.fabric.utilities.optimizer import parameter_names, repoint_optimizers
from lightning.fabric.utilities.rank_zero import rank_zero_deprecation, rank_zero_warn
from lightning.fabric.utilities.ranks import all_or_none
from lightning.fabric.utilities.registry import _load_external_callbacks
from lightning.fabric.utilities.types import _PATH, LRScheduler
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.fabric.wrappers import (
    _FabricDataLoader,
    _FabricModule,
    _FabricOptimizer,
    unwrap,
    unwrap_for_files,
)

if TYPE_CHECKING:
    from lightning.fabric.observe.explanation import Explanation

_T = TypeVar("_T")


class Fabric:
    """Takes an ordinary PyTorch script to any hardware and scale: you keep the loop, Fabric does the rest.

    Five lines change: ``fabric = Fabric(...)``, ``fabric.launch()``, ``fabric.setup(model, optimizer)``,
    ``fabric.setup_dataloaders(loader)`` and ``fabric.backward(loss)``. ``print(fabric)`` says what was chosen and why.
    The constructor is cheap: it makes no process, joins no group and does not touch a GPU.

    Args:
        accelerator: ``"cpu"``, ``"cuda"``, ``"mps"``, ``"gpu"`` (whichever GPU there is), ``"tpu"``, ``"auto"`` (the
            best there is) or an ``Accelerator``.
        strategy: a name that ``STRATEGY_REGISTRY.available_strategies()`` lists, ``"auto"`` or a ``Strategy``.
        devices: how many (an int), which (a list of indices), either as text, or ``"auto"``; for each node.
        num_nodes: number of machines.
        precision: ``"32-true"`` (the default), ``"16-mixed"``, ``"bf16-mixed"``, ``"bf16-true"``, ``"64-true"``.
        plugins: a ``Precision``, ``ClusterEnvironment`` or ``CheckpointIO``, or several of different kinds.
        callbacks: one object or several, whose methods :meth:`call` runs by name.
        loggers: one logger or several, which :meth:`log` writes to.

    Raises:
        ValueError, TypeError, RuntimeError, MisconfigurationException: before any process starts, when the flags do not
            go together or the machine has not got what they ask for.

    """

    # ---- construct ---------------------------------------------------------------------------------------------------

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: _PRECISION_INPUT | None = None,
        plugins: _PLUGIN_INPUT | list[_PLUGIN_INPUT] | None = None,
        callbacks: list[Any] | Any | None = None,
        loggers: Logger | list[Logger] | None = None,
    ) -> None:
        if _is_using_cli() and type(self).run is not Fabric.run:
            raise TypeError(
                f"{type(self).__name__} overrides `run()`, which starts processes itself, so it cannot be started with "
                "`fabric run`. Start the script with `python`, or call `fabric.launch()` instead of overriding `run`."
            )
        self._connector = _Connector(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=plugins,
        )
        self._strategy: Strategy = self._connector.strategy
        self._accelerator: Accelerator = self._connector.accelerator
        self._precision = self._strategy.precision
        self._callbacks: list[Any] = [*_as_list(callbacks), *_load_external_callbacks()]
        self._loggers: list[Any] = _as_list(loggers)
        self._models_setup = 0
        self._accumulation: Accumulation | None = None
        self._launched = False
        self._inventory = Inventory()
        self._at_first_step = AtFirstStep.as_asked(os.environ)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass's ``run`` launches first."""
        super().__init_subclass__(**kwargs)
        if "run" in cls.__dict__:
            cls.run = _launching_first(cls.__dict__["run"])  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self._connector.plan}"

    # ---- launch ------------------------------------------------------------------------------------------------------

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Make the processes exist and join them into one group; the script goes on in every one of them.

        Call it once, early. Where another program has started the processes (``fabric run``, torchrun, a scheduler) it
        only joins the group. On one device it may be left out.

        Args:
            function: run as ``function(fabric, *args, **kwargs)`` in each process. Needed by strategies that spawn or
                fork; others also work without.

        Returns:
            What ``function`` returned on global rank 0.

        Raises:
            TypeError: if the strategy needs a function and there is none, or the function takes no argument.

        """
        launcher = self._strategy.launcher
        needs_function = launcher is not None and launcher.needs_function and not self._launched
        _checks.function_to_launch(function, needs_function, type(self._strategy).__name__)
        return self._wrap_and_launch(_do_nothing if function is None else function, self, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Override it in a subclass to hold the whole training; calling it launches first."""

    def _wrap_and_launch(self, to_run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        to_run = functools.partial(self._wrap_with_setup, to_run)
        launcher = self._strategy.launcher
        if launcher is None or self._launched:
            return to_run(*args, **kwargs)
        result = launcher.launch(to_run, *args, **kwargs)
        if self._at_first_step is not None and not self._launched:
            self._at_first_step.ranks_have_ended(result)
        return result

    def _wrap_with_setup(self, to_run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Join the processes, then run ``to_run`` while dataloaders and batch samplers record their arguments."""
        self._join()
        with _replace_dunder_methods(DataLoader, "dataset"), _replace_dunder_methods(BatchSampler):
            try:
                return to_run(*args, **kwargs)
            except DryRunIsOver:
                if self._strategy.launcher is None or not self._strategy.launcher.needs_function:
                    raise
                return Ended()  # to the process that waits for this one

    def _join(self) -> None:
        if not self._launched:
            self._strategy.setup_environment()
            self._launched = True

    def _require_launch(self, what: str) -> None:
        """Join where there is nothing to start: one process, or processes that ``fabric run`` has started."""
        if not self._launched:
            _checks.launched(self.world_size == 1 or _is_using_cli(), self.world_size, what)
            self._join()

    # ---- set up ------------------------------------------------------------------------------------------------------

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: LRScheduler | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool | Literal["blocks"] = True,
    ) -> Any:
        """Prepare a model and its optimizers: convert to the precision, move to the device, wrap for the strategy.

        All ranks call it. The optimizers go on updating exactly the parameters that the model uses.

        Args:
            module: the model. It may be compiled, by ``torch.compile(model)`` or ``model.compile()``. Parts of it that
                are ``torch.compile(part)`` are replaced by ``part``, compiled in place with the same options.
            optimizers: none, one or several, made from the model's parameters.
            scheduler: a learning-rate scheduler, which some strategies need to see.
            move_to_device: ``False`` leaves the placement of parameters to you.
            _reapply_compile: what becomes of a compiled model. ``True``: it is compiled again, with the same options,
                on the outside of the strategy's wrapper (with ``fullgraph=True``: of the model, for wrappers are never
                a part of the graph). ``"blocks"``: each of its blocks is compiled by itself, with the same options:
                the units that the strategy was told of, else what ``ModuleList``, ``ModuleDict`` and ``Sequential``
                repeat. ``False``: it stays compiled as it is, on the inside.

        Returns:
            The module alone, ``(module, *optimizers)``, or with ``scheduler`` ``(module, *optimizers, scheduler)``.

        Raises:
            ValueError: if the module or an optimizer is set up already; if a compiled model has no blocks, or cannot be
                the one graph that it was to be.
            TypeError: if what is passed is no module or no optimizer.
            RuntimeError: before ``launch`` on several devices.

        """
        self._require_launch("setup")
        _checks.module_to_set_up(module)
        _checks.optimizers_to_set_up(optimizers)
        _checks.way_to_compile(_reapply_compile)
        inner, compilation = without_compilation(module) if _reapply_compile else (module, None)
        compiled_parts, blocks = take_out_compiled_parts(inner), []
        if compilation is not None and _reapply_compile == "blocks":
            blocks = blocks_to_compile(inner, self._strategy.units_to_be(inner))
            compiled_parts = {**dict.fromkeys(blocks, compilation), **compiled_parts}

        inner = self._place(inner, optimizers, move_to_device)
        original = uncompiled(inner)
        compile_parts(original, compiled_parts)
        if optimizers or scheduler is not None:
            forward_module, optimizers_, scheduler = self._strategy.setup_module_and_optimizers(
                inner, list(optimizers), scheduler
            )
        else:
            forward_module, optimizers_ = self._strategy.setup_module(inner), []
        if compilation is not None:
            forward_module = self._compile_again(compilation, forward_module, original, blocks)

        wrapped = self._wrap_module(forward_module, original, move_to_device)
        wrapped_optimizers = [self._wrap_optimizer(optimizer) for optimizer in optimizers_]
        if hasattr(original, "_fabric"):  # a LightningModule, which logs and steps through us
            original._fabric = self
            original._fabric_optimizers = wrapped_optimizers
        self._note_set_up()
        self.call("on_after_setup", fabric=self, module=wrapped)

        parts = [wrapped, *wrapped_optimizers, *([] if scheduler is None else [scheduler])]
        return wrapped if len(parts) == 1 else tuple(parts)

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool | Literal["blocks"] = True
    ) -> _FabricModule:
        """:meth:`setup` for a model without optimizers: for inference, or before the optimizer is made.

        All ranks call it. Arguments and errors are those of :meth:`setup`.
        """
        return self.setup(module, move_to_device=move_to_device, _reapply_compile=_reapply_compile)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepare optimizers of a model that :meth:`setup_module` has prepared.

        Returns:
            The one optimizer, or a tuple in the given order.

        Raises:
            ValueError: if there is none, or one is set up already.
            RuntimeError: before ``launch`` on several devices, or if the strategy sets both up together.

        """
        self._require_launch("setup_optimizers")
        _checks.at_least_one(optimizers, "setup_optimizers", "optimizer")
        _checks.optimizers_to_set_up(optimizers)
        self._precision.check_optimizers(optimizers)
        wrapped = tuple(self._wrap_optimizer(self._strategy.setup_optimizer(optimizer)) for optimizer in optimizers)
        self._note_set_up()
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def setup_dataloaders(
        self,
        *dataloaders: DataLoader[Any],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        replace_sampler: bool | None = None,
    ) -> Any:
        """Prepare dataloaders: each rank gets its own part of the data, on its device, reshuffled every epoch.

        All ranks call it. The epoch advances at each new iteration over a loader.

        Args:
            dataloaders: one or several.
            use_distributed_sampler: ``False`` keeps the loader's own sampler. Iterable datasets and loaders that have a
                ``DistributedSampler`` keep theirs in any case.
            move_to_device: ``False`` leaves batches where the loader puts them.
            replace_sampler: the older name of ``use_distributed_sampler``.

        Returns:
            The one loader, or a list in the given order.

        Raises:
            ValueError: if there is none, or one is set up already.
            TypeError: if one is not a ``DataLoader``, or a subclass of it cannot be made again with another sampler.
            RuntimeError: before ``launch`` on several devices.

        """
        self._require_launch("setup_dataloaders")
        _checks.dataloaders_to_set_up(dataloaders)
        if replace_sampler is not None:
            rank_zero_deprecation(
                "`setup_dataloaders(replace_sampler=...)` is now called `use_distributed_sampler=...`. Rename it."
            )
            use_distributed_sampler = replace_sampler
        wrapped = [self._setup_dataloader(loader, use_distributed_sampler, move_to_device) for loader in dataloaders]
        self._note_set_up()
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def _setup_dataloader(
        self, loader: DataLoader[Any], use_distributed_sampler: bool, move_to_device: bool
    ) -> _FabricDataLoader:
        replicas = self._strategy.distributed_sampler_kwargs
        before = Samplers.of(loader)
        if use_distributed_sampler and replicas is not None:
            loader = distribute_dataloader(loader, **replicas)
        _auto_add_worker_init_fn(loader, self.global_rank)
        processed = self._strategy.process_dataloader(loader) if move_to_device else loader
        wrapped = _FabricDataLoader(processed, self.device if move_to_device else None)
        self._inventory.add_loader(wrapped, loader, before)
        return wrapped

    def _place(self, module: nn.Module, optimizers: tuple[Any, ...], move_to_device: bool) -> nn.Module:
        """Convert to the precision and move to the device; the optimizers follow where that makes new parameters."""
        before = parameter_names(module)
        module = self._precision.convert_module(module)
        self._precision.check_optimizers(optimizers)
        if move_to_device:
            _warn_about_several_devices(module, self.device)
            self._strategy.module_to_device(module)
        repoint_optimizers(optimizers, before, module)
        return module

    def _compile_again(
        self, compilation: Compilation, forward_module: nn.Module, original: nn.Module, blocks: list[str]
    ) -> nn.Module:
        """Compile ``forward_module``, unless ``blocks`` are compiled in place of it."""
        if not blocks:
            return compile_whole(compilation, forward_module, original, self._strategy.check_one_graph)
        if compilation.is_one_graph:
            for block in blocks:
                self._strategy.check_one_graph(original.get_submodule(block))
        return forward_module

    def _wrap_module(self, forward_module: nn.Module, original: nn.Module, on_our_device: bool) -> _FabricModule:
        wrapped = _FabricModule(forward_module, self._strategy, original_module=original)
        first = next(iter(original.parameters()), None)
        own_device = torch.device("cpu") if first is None else first.device
        wrapped._device = self.device if on_our_device else own_device
        if first is not None:
            wrapped._dtype = first.dtype
        self._models_setup += 1
        self._inventory.add_module(wrapped)
        return wrapped

    def _wrap_optimizer(self, optimizer: Any) -> _FabricOptimizer:
        wrapped = _FabricOptimizer(optimizer, self._strategy, self._callbacks)
        self._inventory.add_optimizer(wrapped)
        if self._at_first_step is not None:
            self._at_first_step.wait_for(wrapped, self.explain, self._strategy)
        return wrapped

    def _note_set_up(self) -> None:
        if self._at_first_step is not None:
            self._at_first_step.has_set_up(self.explain(), self._strategy)

    # ---- create tensors and models -----------------------------------------------------------------------------------

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Tensors made inside are at once on the device and of the precision's dtype."""
        return self._strategy.tensor_init_context()

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Parameters of a module made inside are at once on the device and of the precision's dtype.

        Args:
            empty_init: ``True`` leaves weights uninitialised, for a model whose every weight is loaded afterwards: one
                that is still empty at the first forward or step raises. Strategies that share parameters out take no
                memory then, and set-up gives every rank its part of the initial values. ``None``: the strategy decides.

        Raises:
            RuntimeError: before ``launch`` on several devices.

        """
        self._require_launch("init_module")
        return self._strategy.module_init_context(empty_init=empty_init)

    def sharded_model(self) -> AbstractContextManager[Any]:
        """The older name of :meth:`init_module` for strategies that shard the model while it is made."""
        rank_zero_deprecation("`fabric.sharded_model()` is deprecated. Please use `fabric.init_module()`.")
        self._require_launch("sharded_model")
        return self._strategy.module_sharded_context() if isinstance(self._strategy, _Sharded) else nullcontext()

    # ---- step --------------------------------------------------------------------------------------------------------

    def backward(self, tensor: Tensor, *args: Any, model: _FabricModule | None = None, **kwargs: Any) -> None:
        """``loss.backward()``, with the loss scaled and gradients synchronised as precision and strategy need it.

        Args:
            tensor: the loss; ``args`` and ``kwargs`` go to its ``backward``.
            model: the set-up model, for strategies that step several of them separately.

        """
        module = None
        if model is not None:
            model = uncompiled(model)
            _checks.set_up_module(model, "backward(model=...)")
            module = model._forward_module
        if self._accumulation is not None:
            tensor = self._accumulation.weigh(tensor)
        if args or kwargs:  # passing on what is empty takes microseconds
            self._strategy.backward(tensor, module, *args, **kwargs)
        else:
            self._strategy.backward(tensor, module)

    @contextmanager
    def accumulate(
        self,
        module: _FabricModule | Iterable[_FabricModule],
        micro_batches: Iterable[Any],
        weight: Weight | None = None,
        reduction: Reduction = "mean",
    ) -> Iterator[Iterable[Any]]:
        """Make several micro-batches one step, whose gradient is that of the whole batch, however uneven the parts.

        All ranks enter it, with the same number of micro-batches of whatever sizes. Gradients are synchronised once, in
        the last backward; they are complete when the context is left::

            for micro_batches in itertools.batched(loader, 4):
                with fabric.accumulate(model, micro_batches, weight=lambda batch: batch["mask"].sum()) as batches:
                    for batch in batches:
                        fabric.backward(mean_loss_per_token(model, batch))
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()

        Args:
            module: the module that set-up returned, or several that are trained in this step.
            micro_batches: this rank's part of the batch, in parts. Taken into a list at once.
            weight: how much each counts, such as its number of tokens or samples: a function of the micro-batch, or a
                number for each. ``None``: all count the same.
            reduction: what the loss of a micro-batch is: a ``"mean"`` over as many as its weight says, or a ``"sum"``,
                which may also be of nothing (a micro-batch of weight 0).

        Returns:
            The context gives the micro-batches to loop over. Each needs at least one :meth:`backward`.

        Raises:
            ValueError, TypeError: if weights are negative, infinite or missing, or all are 0.
            RuntimeError: if ranks have different numbers of micro-batches; if a micro-batch had no backward, or the
                loop ended early; on the other ranks, if one has a wrong weight.

        """
        self._require_launch("accumulate")
        modules = [module] if isinstance(module, nn.Module) else list(module)
        modules = [uncompiled(each) for each in modules]
        for each in modules:
            _checks.set_up_module(each, "accumulate")
        if self._accumulation is not None:
            raise RuntimeError(
                "`fabric.accumulate` is entered already. Leave it first; a step cannot be inside another."
            )
        batches = list(micro_batches)
        factors = factors_of(self._strategy, batches, weight, reduction)
        accumulation = Accumulation(batches, factors, functools.partial(self._unsynchronised, modules))
        given = iter(accumulation)
        self._accumulation = accumulation
        try:
            yield given
            accumulation.require_end()
        finally:
            self._accumulation = None
            given.close()

    @contextmanager
    def _unsynchronised(self, modules: list[_FabricModule]) -> Iterator[None]:
        """Where the strategy can leave synchronisation out, it does; elsewhere results are the same."""
        control = self._strategy._backward_sync_control
        with ExitStack() as stack:
            if control is not None:
                for module in modules:
                    stack.enter_context(control.no_backward_sync(_forward_module(module), True))
            yield

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | int | None = None,
        max_norm: float | int | None = None,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients, by value or by norm, in place; scaled gradients are un-scaled first. All ranks call it.

        Args:
            module: the module that set-up returned.
            optimizer: the optimizer that set-up returned.
            clip_val: largest absolute value of a gradient's entry.
            max_norm: largest norm of all gradients taken together.
            norm_type: which p-norm; ``float("inf")`` for the largest absolute entry.
            error_if_nonfinite: raise if the norm is infinite or not a number.

        Returns:
            The norm before clipping, a scalar tensor; ``None`` when clipping by value.

        Raises:
            ValueError: unless exactly one of ``clip_val`` and ``max_norm`` is given.

        """
        _checks.one_kind_of_clipping(clip_val, max_norm)
        forward_module, own_optimizer = _forward_module(module), unwrap(optimizer)
        self._precision.unscale_gradients(own_optimizer)
        if max_norm is not None:
            return self._strategy.clip_gradients_norm(
                forward_module,
                own_optimizer,
                max_norm=max_norm,
                norm_type=norm_type,
                error_if_nonfinite=error_if_nonfinite,
            )
        if clip_val is not None:
            self._strategy.clip_gradients_value(forward_module, own_optimizer, clip_val=clip_val)
        return None

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision's forward context, for computation outside a set-up module's ``forward``."""
        return self._precision.forward_context()

    def no_backward_sync(self, module: _FabricModule, enabled: bool = True) -> AbstractContextManager[Any]:
        """Inside, gradients accumulate without being synchronised; forward and backward both belong inside.

        Does nothing on one device. Strategies that cannot leave the synchronisation out say so once and go on.

        Raises:
            TypeError: if ``module`` is not one that set-up returned.

        """
        if not enabled:
            return nullcontext()
        module = uncompiled(module)
        _checks.set_up_module(module, "no_backward_sync")
        control = self._strategy._backward_sync_control
        if control is None:
            _warn_without_backward_sync(type(self._strategy).__name__, self.world_size)
            return nullcontext()
        return control.no_backward_sync(uncompiled(module._forward_module), enabled)

    # ---- move data ---------------------------------------------------------------------------------------------------

    @overload
    def to_device(self, obj: nn.Module) -> nn.Module: ...
    @overload
    def to_device(self, obj: Tensor) -> Tensor: ...
    @overload
    def to_device(self, obj: Any) -> Any: ...
    def to_device(self, obj: Any) -> Any:
        """Move a module (in place), a tensor or a nested collection to this process's device, and return it."""
        if isinstance(obj, nn.Module):
            self._accelerator.setup_device(self.device)
            obj.to(self.device)  # whole, also where set-up would share it out
            return obj
        return move_data_to_device(obj, device=self.device)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on global rank 0 only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    # ---- talk to other ranks -----------------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Collective: returns when all ranks have called it."""
        self._require_launch("barrier")
        self._strategy.barrier(name=name)

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """Collective: rank ``src``'s ``obj`` on every rank; it must pickle. On one process: ``obj`` itself."""
        self._require_launch("broadcast")
        return self._strategy.broadcast(obj, src=src)

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Collective: every rank's ``data`` on every rank, tensors stacked along a new first dimension.

        Args:
            data: an int, a float, a tensor of shape ``(*)`` (equal on all ranks), or a nested collection of them.
            group: a process group; the world if ``None``.
            sync_grads: let gradients flow back to the ranks.

        Returns:
            The same nesting, each tensor of shape ``(world_size, *)``; on one device of unchanged shape.

        """
        self._require_launch("all_gather")
        data = convert_to_tensors(data, device=self.device)
        return apply_to_collection(data, Tensor, self._strategy.all_gather, group=group, sync_grads=sync_grads)

    def all_reduce(self, data: Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        """Collective: the mean (or ``"sum"``, or a ``ReduceOp``) over all ranks, on every rank.

        Args:
            data: an int, a float, a tensor (of equal shape on all ranks), or a nested collection of them.
            group: a process group; the world if ``None``.
            reduce_op: ``"mean"``, ``"avg"``, ``"sum"`` or a ``torch.distributed.ReduceOp``.

        Returns:
            The same nesting, as tensors.

        """
        self._require_launch("all_reduce")
        data = convert_to_tensors(data, device=self.device)
        return apply_to_collection(data, Tensor, self._strategy.all_reduce, group=group, reduce_op=reduce_op)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Rank 0 runs the block first, then all others do; for a download or a cache. All ranks enter it.

        If it raises on rank 0, it is not run elsewhere and every rank raises.

        Args:
            local: the first rank of each node goes first, where nodes do not share files.

        """
        self._require_launch("rank_zero_first")
        goes_first = (self.local_rank if local else self.global_rank) == 0
        doing = "running a `rank_zero_first` block"
        if not goes_first:
            self._strategy.raise_on_all(None, doing)
            yield
            return
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # tells the others; here the error itself is the one to see
                self._strategy.raise_on_all(error, doing)
            raise
        self._strategy.raise_on_all(None, doing)

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: _PATH,
        state: Mapping[str, Any],
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
        *,
        blocking: bool = True,
        digests: bool = True,
    ) -> None:
        """Collective: write ``state`` to ``path``; when it returns, the checkpoint is there for every rank.

        It appears whole or not at all: it is made beside, brought to the disk with a manifest of its files, and
        renamed. An older one survives a failure, a kill and a power cut.

        Args:
            path: a file (or folder, for strategies that write one per rank), local or with an fsspec scheme. Missing
                parent folders are made.
            state: modules, optimizers, anything else with a ``state_dict()``, and plain values, by name.
            filter: for some names of ``state``, a function ``(name, value) -> bool`` that picks entries to keep.
            blocking: ``False`` returns when the state was copied to CPU memory, and writes while training goes on;
                what goes wrong then is raised by the next ``save`` or ``load``, or ends the process with code 1.
                There is one copy at a time: a second ``save`` waits for the first.
            digests: write down a checksum of each file, which :meth:`load` compares.

        Raises:
            TypeError: if ``filter`` or one of its functions is of a wrong type.
            ValueError: if ``filter`` has a name that ``state`` has not.
            NotImplementedError: for ``blocking=False``, if the strategy or the ``CheckpointIO`` cannot.
            RuntimeError: on the other ranks, if one fails to write; that one raises its own error.

        """
        if isinstance(path, Mapping):
            rank_zero_deprecation("`fabric.save(content, path)` is now `fabric.save(path, state)`. Please swap them.")
            path, state = state, path  # type: ignore[assignment]
        self._save(path, state, filter, SaveOptions(blocking=blocking, digests=digests))

    def _save(
        self,
        path: _PATH,
        state: Mapping[str, Any],
        filter: dict[str, Callable[[str, Any], bool]] | None,
        options: SaveOptions,
    ) -> None:
        self._require_launch("save")
        doing = f"saving {str(path)!r}"
        with all_or_none(self._strategy, doing):
            os.fspath(path)
            if not isinstance(state, Mapping):
                raise TypeError(f"`save` needs a dict such as {{'model': model}}, but got {state!r}.")
            _checks.no_plain_loaders(state)
            if filter is not None:
                _checks.state_filter(filter, state)
        # a strategy of the user's may know the first arguments alone
        extra = {} if options == SaveOptions() else {"options": options}
        with all_or_none(self._strategy, doing):
            unwrapped = unwrap_for_files(state)
            with names_without_compilation(_modules_in(unwrapped)):
                self._strategy.save_checkpoint(path=path, state=unwrapped, filter=filter, **extra)

    def load(
        self,
        path: _PATH,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        verify: bool = True,
    ) -> dict[str, Any]:
        """Read a checkpoint, which any strategy on any number of ranks may have written; all ranks call it.

        Args:
            path: what :meth:`save` wrote; or a folder of checkpoints, as :meth:`checkpoints` makes it: then the newest
                one that is good is read, and a warning names what is wrong with newer ones.
            state: objects under their names are restored in place, plain values are replaced in this dict. ``None``:
                nothing is restored.
            strict: every name of ``state`` must be in the file, and every parameter of a module.
            weights_only: ``True`` (torch's default) refuses to unpickle anything but tensors and plain values;
                ``False`` runs whatever code the file holds, so only for files you trust.
            verify: compare the checksums of the files, which takes reading them once more; ``False`` compares sizes.

        Returns:
            The rest of the checkpoint, which ``state`` did not name; the whole of it without ``state``.

        Raises:
            FileNotFoundError: if there is nothing at ``path``.
            KeyError: if ``strict`` and a name is missing from the file.
            DamagedCheckpointError: if a file is not what was saved; it says which. Nothing was changed.

        """
        self._require_launch("load")
        with all_or_none(self._strategy, f"loading {str(path)!r}"):
            os.fspath(path)
            if state is not None:
                _checks.no_plain_loaders(state)
        if state is None:
            return self._load(path, None, strict, weights_only, verify)
        unwrapped = {
            name: value if isinstance(value, _FabricDataLoader) else unwrap(value) for name, value in state.items()
        }
        restored = dict(unwrapped)
        with names_without_compilation(_modules_in(unwrapped)):
            remainder = self._load(path, restored, strict, weights_only, verify)
        state.update({name: value for name, value in restored.items() if value is not unwrapped.get(name)})
        return remainder

    def _load(self, path: _PATH, state: Any, strict: bool, weights_only: bool | None, verify: bool) -> dict[str, Any]:
        with (
            all_or_none(self._strategy, f"loading {os.fspath(path)!r}"),
            self._strategy.opened_checkpoint(path, verify) as found,
        ):
            rest = self._strategy.load_checkpoint(path=found, state=state, strict=strict, weights_only=weights_only)
        return rest  # noqa: RET504  # no rank has raised

    def load_raw(
        self,
        path: _PATH,
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        verify: bool = True,
    ) -> None:
        """Load a file that holds a bare ``state_dict()`` into one module or optimizer; all ranks call it.

        For files that Fabric has not written, such as ``torch.save(model.state_dict(), path)``.

        Args:
            path: the file; or, for a module, a folder that ``torch.distributed.checkpoint`` has written.
            obj: a module or an optimizer, set up or not.
            strict: the module's parameters and the file's must have the same names.
            weights_only, verify: as in :meth:`load`.

        """
        self._require_launch("load_raw")
        self._strategy.barrier("fabric.load_raw")
        unwrapped = unwrap(obj)
        with names_without_compilation(_modules_in({"": unwrapped})):
            self._load(path, unwrapped, strict, weights_only, verify)

    def checkpoints(
        self, folder: _PATH, keep_last: int | None = None, keep_best: BestLike | None = None
    ) -> Checkpoints:
        """Look after the checkpoints of a training loop: save at steps, resume the newest good one; all ranks call it.

        Args:
            folder: where they are, or will be; local or with an fsspec scheme.
            keep_last: how many of the newest to keep; ``None``: all, or with ``keep_best`` the newest alone.
            keep_best: which to keep besides: ``("val_loss", "min")``, or ``("accuracy", "max", 3)`` for several.

        Raises:
            ValueError, TypeError: if ``keep_last`` or ``keep_best`` is none of these.

        """
        self._require_launch("checkpoints")
        return Checkpoints(self._strategy, self._save, self.load, folder, keep_last, keep_best)

    # ---- log and call back -------------------------------------------------------------------------------------------

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Write one scalar to every logger; on rank 0, nothing elsewhere."""
        self.log_dict({name: value}, step=step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars (Python's, or tensors of one element) to every logger; on rank 0, nothing elsewhere."""
        if not self._loggers:
            return
        scalars = convert_tensors_to_scalars(metrics)
        for logger in self._loggers:
            logger.log_metrics(metrics=scalars, step=step)

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Run the method ``hook_name`` of every callback that has one, in order."""
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                rank_zero_warn(
                    f"{type(callback).__name__}.{hook_name} is {method!r}, which cannot be called, so "
                    f"`fabric.call({hook_name!r})` skips it. Make it a method."
                )
                continue
            method(*args, **kwargs)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed Python's, numpy's and torch's generators, and those of dataloader workers unless ``workers=False``.

        Returns:
            The seed: the one given, else that of ``PL_GLOBAL_SEED``, else 0.

        Raises:
            ValueError: if it is no integer between 0 and 2**32 - 1.

        """
        return _seed.seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)

    # ---- ask ---------------------------------------------------------------------------------------------------------

    def explain(self) -> "Explanation":
        """Describe how this process runs: what was chosen and why, and what set-up made of models and the rest.

        Print it (``fabric.print(fabric.explain())``), or take its :meth:`~Explanation.to_dict`. Any rank may call it,
        at any time, alone: it tells what is so on this rank, and changes nothing. ``fabric run --explain`` prints it at
        the first step of an optimizer.
        """
        from lightning.fabric.observe.gather import explain  # only a run that asks pays for the import

        return explain(self._connector.plan, self._strategy, self._inventory, self._launched)

    @property
    def accelerator(self) -> Accelerator:
        """What kind of hardware this runs on."""
        return self._accelerator

    @property
    def strategy(self) -> Strategy:
        """How the work is spread over devices."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self._strategy.root_device

    @property
    def global_rank(self) -> int:
        """This process's number among all, from 0."""
        return getattr(self._strategy, "global_rank", 0)

    @property
    def local_rank(self) -> int:
        """This process's number among those of its machine, from 0."""
        return getattr(self._strategy, "local_rank", 0)

    @property
    def node_rank(self) -> int:
        """This machine's number, from 0."""
        return getattr(self._strategy, "node_rank", 0)

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return getattr(self._strategy, "world_size", 1)

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the main process."""
        return self._strategy.is_global_zero

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return self._loggers

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            IndexError: if there is none.

        """
        if not self._loggers:
            raise IndexError("There is no logger. Pass one: `Fabric(loggers=CSVLogger('logs'))`.")
        return self._loggers[0]


def _do_nothing(fabric: Fabric) -> None:
    """What ``launch()`` runs without a function: the script itself goes on."""


def _launching_first(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def launch_and_run(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if self._launched:
            return run(self, *args, **kwargs)
        # goes by the object, not by `run`: the function under this wrapper cannot be pickled by name
        return self._wrap_and_launch(_run, self, *args, **kwargs)

    return launch_and_run


def _run(fabric: Fabric, *args: Any, **kwargs: Any) -> Any:
    return fabric.run(*args, **kwargs)


def _as_list(objects: Any) -> list[Any]:
    if objects is None:
        return []
    return list(objects) if isinstance(objects, (list, tuple)) else [objects]


def _modules_in(state: Mapping[str, Any]) -> list[nn.Module]:
    return [value for value in state.values() if isinstance(value, nn.Module)]


def _forward_module(module: nn.Module) -> nn.Module:
    module = uncompiled(module)
    return uncompiled(module._forward_module) if isinstance(module, _FabricModule) else module


def _warn_about_several_devices(module: nn.Module, target: torch.device) -> None:
    devices = {parameter.device for parameter in module.parameters()}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        rank_zero_warn(
            f"The model's parameters are on several devices ({found}); all of them are moved to {target}. "
            "To keep them where they are, pass `move_to_device=False`.",
            category=PossibleUserWarning,
        )


@functools.cache
def _warn_without_backward_sync(strategy: str, world_size: int) -> None:
    if world_size > 1:
        rank_zero_warn(
            f"{strategy} cannot leave out gradient synchronisation, so `no_backward_sync` changes nothing. "
            "Results are right; each micro-batch is synchronised.",
            category=PossibleUserWarning,
        )
