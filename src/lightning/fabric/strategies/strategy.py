"""What a strategy is: where processes, devices and replicas come from, and what that changes about torch's verbs."""

import copy
import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.checkpoint.background import Saver
from lightning.fabric.checkpoint.loading import opened
from lightning.fabric.checkpoint.saving import OneRank, Peers, Prepared, SaveOptions
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.plugins.precision.precision import NO_STEP_HOOKS, Precision, StepHooks
from lightning.fabric.strategies._holding import Holding
from lightning.fabric.strategies._single_file import (
    SingleFile,
    _apply_filter,
    _validate_keys_for_strict_loading,
    by_names_of,
    check_module,
    check_optimizer,
    check_optimizer_shapes,
    is_stateful,
    load_optimizer,
    own_module_state,
)
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.init import _EmptyInit
from lightning.fabric.utilities.load import is_sharded_folder
from lightning.fabric.utilities.optimizer import refuse_meta_parameters
from lightning.fabric.utilities.ranks import all_or_none
from lightning.fabric.utilities.types import _PATH, ReduceOp

if TYPE_CHECKING:
    from lightning.fabric.strategies.launchers.launcher import _Launcher

__all__ = ["Strategy", "TBroadcast", "_apply_filter", "_validate_keys_for_strict_loading"]

TBroadcast = TypeVar("TBroadcast")

_AS_USUAL = SaveOptions()
_FULL_PRECISION = Precision()  # has no state, so every strategy without a precision of its own shares it
_NO_CONTEXT: AbstractContextManager[None] = nullcontext()  # may be entered any number of times


class _BackwardSyncControl(ABC):
    """Switches the synchronisation of gradients in backward off, for strategies that have one."""

    @abstractmethod
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Return a context in which backward leaves ``module``'s gradients unsynchronised, if ``enabled``.

        Forward and backward both run inside. Every rank calls it alike. ``module`` is what ``setup_module`` returned;
        with ``enabled`` anything else raises ``TypeError``.
        """


class _NothingToSync(_BackwardSyncControl):
    """For strategies whose backward never synchronises."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return _NO_CONTEXT


class _Sharded(ABC):
    """For strategies that split the module while it is being made."""

    @abstractmethod
    def module_sharded_context(self) -> AbstractContextManager[None]:
        """Return the context in which layers are made and wrapped, so that no rank ever holds the whole module."""


class Strategy(ABC):
    """How one module is trained on the devices there are.

    The calls, in the order in which they come:

    1. *construct*: no device, file or process is touched; the object can be pickled.
    2. ``accelerator``, ``precision``, ``checkpoint_io`` may be set where they were not given.
    3. ``_configure_launcher``, then ``launcher``: makes the processes, unless None.
    4. ``setup_environment``, in every process: the device becomes current, the ranks are known.
    5. ``module_init_context``, ``tensor_init_context``, ``process_dataloader``.
    6. ``setup_module_and_optimizers``, or ``setup_module`` and later ``setup_optimizer``; ``module_to_device`` comes
       before, where the user did not ask to keep the placement.
    7. The step: ``batch_to_device``, ``_backward_sync_control``, ``backward``, ``clip_gradients_*``,
       ``optimizer_step``; and the collectives.
    8. ``save_checkpoint``, ``load_checkpoint``.
    9. ``teardown``.

    Modules and optimizers passed in are torch's own, never the wrappers that users hold; *module* is what
    ``setup_module`` returned in step 7, and the user's own in step 8. Methods marked *collective* are called by every
    rank, in the same order.

    A strategy of your own overrides what is different. Abstract are only the facts and verbs that have no sensible
    default for more than one process.
    """

    runs_on: ClassVar[frozenset[str] | None] = None
    """Names of the accelerators it can run on; None: any."""
    engine: ClassVar[str | None] = None
    """A library that trains in place of torch, which a precision may need; None: none."""
    start_method: str | None = None
    """How it starts the other processes: popen, spawn, fork, forkserver; None: it starts none."""

    global_rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1

    _backward_sync_control: _BackwardSyncControl | None = None  # None: cannot be asked for

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._checkpoint_io = checkpoint_io
        self._precision = precision
        self._step_hooks: StepHooks | None = None  # what the precision does in a step: asked for at the first one
        self._launcher: _Launcher | None = None
        self._saver = Saver()

    # ---- parts ---------------------------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Accelerator | None:
        """What kind of device this runs on; None until chosen."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator

    @property
    def precision(self) -> Precision:
        """Dtypes and loss scaling; full precision unless set."""
        return self._precision if self._precision is not None else _FULL_PRECISION

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        self._precision = precision
        self._step_hooks = None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Writes and reads files; ``torch.save`` and ``torch.load`` unless set."""
        if self._checkpoint_io is None:
            self._checkpoint_io = TorchCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def launcher(self) -> "_Launcher | None":
        """What makes the processes; None: this process is all there is."""
        return self._launcher

    # ---- facts ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def root_device(self) -> torch.device:
        """The device of this process."""

    @property
    @abstractmethod
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """``num_replicas`` and ``rank`` of the sampler; None: every process sees all the data."""
        return None

    @property
    def num_replicas(self) -> int:
        """Over how many batches, of as many ranks or groups of ranks, a gradient is averaged."""
        return (self.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]

    # ---- processes -----------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        """Set ``self._launcher``, if processes have to be made."""
        self._launcher = None

    def setup_environment(self) -> None:
        """Make this process's device current, and join the other processes. Every process calls it once, launched."""
        if self.accelerator is not None:
            self.accelerator.setup_device(self.root_device)

    # ---- objects -------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: DataLoader) -> Any:
        """Return what is iterated in place of ``dataloader``, whose sampler is distributed already.

        Not called where batches shall stay where the loader puts them (``move_to_device=False``).
        """
        return dataloader

    @contextmanager
    def tensor_init_context(self) -> Iterator[None]:
        """Tensors made inside are on the device of this process and in the dtype of the precision."""
        with self.root_device, self.precision.tensor_init_context():
            yield

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules made inside are on the device of this process and in the dtype of the precision.

        ``empty_init=True`` allocates parameters without filling them, for those who load them next. None is False.
        """
        with self.root_device, _EmptyInit(enabled=bool(empty_init)), self.precision.module_init_context():
            yield

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Set both up together; each comes back in its place."""
        module = self.setup_module(module)
        return module, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Return the module whose ``forward`` is called in training, with ``module`` inside."""
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer that is stepped.

        Raises:
            RuntimeError: if it has parameters on the meta device.

        """
        refuse_meta_parameters(optimizer)
        return optimizer

    def units_to_be(self, module: nn.Module) -> list[nn.Module]:
        """Return the parts of ``module``, which is not set up yet, that the user wants to be units."""
        return []

    def check_one_graph(self, module: nn.Module) -> None:
        """Raise ``ValueError`` if ``module``, set up or a part of one that is, cannot be one graph of the compiler."""
        units = [name for name, part in module.named_modules() if name and self.is_unit(part)]
        if units:
            shown = ", ".join(map(repr, units[:5])) + (f" and {len(units) - 5} more" if units[5:] else "")
            raise ValueError(
                f"{type(module).__name__} was compiled with fullgraph=True, but has units inside ({shown}), whose "
                "parameters are gathered outside of graphs. Compile parts that have none inside, with "
                "`_reapply_compile='blocks'`, or compile without `fullgraph=True`."
            )

    @abstractmethod
    def module_to_device(self, module: nn.Module) -> None:
        """Move ``module`` in place to where ``setup_module`` wants it."""

    def batch_to_device(self, batch: Any, device: torch.device | None = None) -> Any:
        """Return ``batch``, any nesting of tensors, on ``device``; None: on this process's."""
        return move_data_to_device(batch, device or self.root_device)

    # ---- the step ------------------------------------------------------------------------------------------------

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of the loss ``tensor`` and synchronise them; extra arguments go to ``Tensor.backward``."""
        hooks = self._step_hooks or self._ask_precision()
        if hooks is NO_STEP_HOOKS and not args and not kwargs:  # passing on what is empty takes microseconds
            tensor.backward()
            return
        if hooks.pre_backward is not None:
            hooks.pre_backward(tensor, module)
        if hooks.backward is not None:
            hooks.backward(tensor, module, *args, **kwargs)
        else:
            tensor.backward(*args, **kwargs)
        if hooks.post_backward is not None:
            hooks.post_backward(tensor, module)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step, through the gradient scaler where there is one; ``closure=`` is the only keyword. Returns its loss."""
        hook = (self._step_hooks or self._ask_precision()).optimizer_step
        if hook is not None:
            return hook(optimizer, **kwargs)
        return optimizer.step(**kwargs) if kwargs else optimizer.step()

    def _ask_precision(self) -> StepHooks:
        self._step_hooks = self.precision.step_hooks()
        return self._step_hooks

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Scale the gradients of ``optimizer``'s parameters in place, so that together their norm is ``max_norm``.

        The gradients are of true size already: un-scaled, where the precision scales the loss.

        Collective where gradients are sharded. Returns the norm before clipping, a tensor without dimensions; 0 if
        there is no gradient.

        Raises:
            RuntimeError: with ``error_if_nonfinite``, if the norm is not finite; gradients are left alone then.

        """
        parameters = [p for p in self.precision.main_params(optimizer) if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(_nonfinite_message(self._module_with_state(module), parameters, norm_type, total))
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Bound every gradient of ``optimizer``'s parameters to ``[-clip_val, clip_val]`` in place."""
        nn.utils.clip_grad_value_(self.precision.main_params(optimizer), clip_value=clip_val)

    # ---- other ranks ---------------------------------------------------------------------------------------------

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Collective: every rank's ``tensor``, all of one shape, stacked along a new first dimension.

        ``sync_grads`` lets gradients flow back to each rank's tensor. One process: the tensor itself.
        """

    @abstractmethod
    def all_reduce(
        self, tensor: Tensor | Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        """Collective: ``tensor`` combined over ranks by ``mean``, ``avg``, ``sum`` or a torch ``ReduceOp``.

        What is no tensor comes back as it is.
        """

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Collective: wait until every rank is here. ``name`` is for error messages."""

    @abstractmethod
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        """Collective: rank ``src``'s ``obj`` on every rank, as a new object everywhere but on ``src``.

        ``0 <= src < world_size``; ``obj`` must pickle, and only ``src``'s is read. One process: ``obj`` itself.
        """

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Collective: whether every rank (``all``), or at least one, says True."""
        return decision

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        """Collective: if any rank passes an ``error``, raise on every rank; else do nothing.

        A rank with an error of its own raises that. The others raise ``RuntimeError`` with the error of the lowest rank
        that has one. ``doing`` completes "failed while", as in "saving the checkpoint".
        """
        if error is not None:
            raise error

    # ---- files ---------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        path: _PATH,
        state: MutableMapping[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
        options: SaveOptions = _AS_USUAL,
    ) -> None:
        """Collective: write ``state`` to ``path``; a strategy of your own may override it.

        ``state`` mixes modules, optimizers, anything with ``state_dict()``, and plain values. ``filter`` maps keys
        of it to ``(name, value) -> bool``. Tensors are written from where they are, no copy is made, unless the
        ``options`` say that training goes on meanwhile.

        Raises:
            NotImplementedError: if it is to be saved in the background, and cannot be.

        """
        with all_or_none(self, f"saving {os.fspath(path)!r}"):
            self.wait_for_saves()
            prepared = self._prepare_checkpoint(state, storage_options, filter or {})
            if not options.blocking and prepared.detach is None:
                raise NotImplementedError(
                    f"{type(self).__name__} cannot save this while training goes on: what writes it needs all ranks, "
                    "or is not the library's. Use `blocking=True`."
                )
        later = self._peers(in_background=not options.blocking)
        self._saver.save(prepared, path, options, self._peers(), later, strategy=type(self).__name__)

    def _prepare_checkpoint(
        self,
        state: MutableMapping[str, Any],
        storage_options: Any,
        filter: Mapping[str, Callable[[str, Any], bool]],
    ) -> Prepared:
        """Collective: gather what is to be written, and who writes what."""
        # on every rank: the state of an object may be collected from all of them
        checkpoint = self._state_dicts(state, filter)
        return self._prepared_file(checkpoint if self.is_global_zero else None, storage_options)

    def _prepared_file(self, checkpoint: dict[str, Any] | None, storage_options: Any = None) -> Prepared:
        """Return a single file that holds ``checkpoint``, which is None on the ranks that do not write."""
        return SingleFile(self.checkpoint_io, checkpoint, storage_options).prepared()

    def wait_for_saves(self) -> None:
        """Return when no checkpoint is being written in the background; raise what went wrong with the last one."""
        self._saver.wait()

    def _peers(self, in_background: bool = False) -> Peers:
        """The ranks that save and load together: by collectives; or, where training goes on meanwhile, without."""
        return OneRank()

    def _state_dicts(
        self,
        state: MutableMapping[str, Any],
        filter: Mapping[str, Callable[[str, Any], bool]],
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = {}
        for key, obj in state.items():
            value = obj
            if isinstance(obj, nn.Module):
                value = self.get_module_state_dict(obj)
            elif isinstance(obj, Optimizer):
                value = self.get_optimizer_state(obj)
            elif callable(getattr(obj, "state_dict", None)):
                value = obj.state_dict()
            _apply_filter(key, filter, value, checkpoint)
        return checkpoint

    def opened_checkpoint(self, path: _PATH, digests: bool) -> AbstractContextManager[_PATH]:
        """Collective: a context with the path to read, of a checkpoint that is what was saved; see ``loading.opened``.

        What a ``CheckpointIO`` of the user's has written is left to that.
        """
        with all_or_none(self, "saving in the background"):
            self.wait_for_saves()
        return opened(path, digests, self._peers()) if self.checkpoint_io.to_any_path else nullcontext(path)

    def load_checkpoint(
        self,
        path: _PATH,
        state: nn.Module | Optimizer | MutableMapping[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Collective: restore ``state`` in place from ``path``, and return what the file has besides.

        ``state`` is what ``save_checkpoint`` takes; a module or an optimizer for a file that holds a bare state dict;
        or None, to get all of the file. Plain values are replaced in ``state``. Keys and shapes are checked before
        anything is changed, and nothing refers to the file afterwards. Of a folder that a strategy which shards has
        written, on any number of ranks, what ``state`` does not name is left, but for plain values.

        Raises:
            KeyError: if ``strict`` and the file lacks a key of ``state``.
            RuntimeError: if a module does not fit: by its keys if ``strict``, by its shapes in any case.
            ValueError: if an optimizer does not fit.

        """
        if self._is_sharded_folder(path):
            from lightning.fabric.strategies import _sharded_files

            return _sharded_files.load_checkpoint(
                self, path, state, strict=strict, weights_only=weights_only, in_parts=False
            )
        if state is None or (isinstance(state, MutableMapping) and not state):
            return _read(self.checkpoint_io, path, weights_only, mmap=False)[0]
        checkpoint, mapped = _read(self.checkpoint_io, path, weights_only, mmap=True)
        if not isinstance(state, MutableMapping):
            checkpoint = self._by_own_names(state, checkpoint)
            self._check_fits(type(state).__name__, state, checkpoint, strict)
            if not self._restore(state, checkpoint, strict, mapped):
                raise TypeError(f"`state` must be a dict, a module or an optimizer, but got {state!r}.")
            return {}
        if not isinstance(checkpoint, MutableMapping):
            raise TypeError(
                f"{str(path)!r} holds {type(checkpoint).__name__}, not a dict with the keys {list(state)}. "
                "For a file with a bare state dict, use `load_raw`."
            )
        _validate_keys_for_strict_loading(state.keys(), checkpoint.keys(), strict)
        found = {key: self._by_own_names(state[key], checkpoint.pop(key)) for key in state if key in checkpoint}
        for key, saved in found.items():
            self._check_fits(f"state[{key!r}]", state[key], saved, strict)
        for key, saved in found.items():
            if not self._restore(state[key], saved, strict, mapped):
                state[key] = copy.deepcopy(saved) if mapped else saved
        return dict(copy.deepcopy(checkpoint) if mapped else checkpoint)

    def _is_sharded_folder(self, path: _PATH) -> bool:
        """Whether ``path`` is a folder in torch's format; not if a ``CheckpointIO`` of the user's is to read it."""
        is_ours = self.checkpoint_io.to_any_path and _is_local_file_protocol(path)
        return is_ours and is_sharded_folder(_local_path(path))

    def _by_own_names(self, obj: Any, saved: Any) -> Any:
        return by_names_of(self._module_with_state(obj), saved) if isinstance(obj, nn.Module) else saved

    def _check_fits(self, name: str, obj: Any, saved: Any, strict: bool) -> None:
        if isinstance(obj, nn.Module):
            check_module(self._module_with_state(obj), saved, strict, name)
        elif isinstance(obj, Optimizer):
            check_optimizer(obj, saved, name)
            check_optimizer_shapes(obj, saved, name)

    def _restore(self, obj: Any, saved: Any, strict: bool, mapped: bool) -> bool:
        """Load ``saved`` into ``obj``; False if ``obj`` is a plain value."""
        if isinstance(obj, nn.Module):
            saved = own_module_state(self._module_with_state(obj), saved) if mapped else saved
            self.load_module_state_dict(obj, saved, strict=strict)
        elif isinstance(obj, Optimizer):
            load_optimizer(obj, saved, mapped)
        elif is_stateful(obj):
            obj.load_state_dict(copy.deepcopy(saved) if mapped else saved)
        else:
            return False
        return True

    def _module_with_state(self, module: nn.Module) -> nn.Module:
        """Return the module whose names are those of the state dict."""
        return module

    def named_parameters(
        self, module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what optimizers update, under the names of the parameters in the user's own ``module``."""
        return module.named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what ``model.state_dict(...)`` of the user's own ``module`` is; of a sharded one, this rank's part."""
        return module.state_dict(*args, **kwargs)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any | Tensor]:
        """Return ``module``'s state under the user's names: the tensors themselves, not copies."""
        return self._module_with_state(module).state_dict()

    def load_module_state_dict(
        self, module: nn.Module, state_dict: dict[str, Any | Tensor], strict: bool = True
    ) -> Any:
        """Copy ``state_dict``, with the user's names, into ``module``; returns what ``load_state_dict`` returns."""
        return self._module_with_state(module).load_state_dict(state_dict, strict=strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collective for optimizers that share their state out over ranks: then rank 0 gets all, the others nothing."""
        consolidate = getattr(optimizer, "consolidate_state_dict", None)
        if consolidate is None:
            return optimizer.state_dict()
        consolidate()
        return optimizer.state_dict() if self.is_global_zero else {}

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Collective where state is sharded: load what :meth:`get_optimizer_state` returned."""
        optimizer.load_state_dict(state_dict)

    # ---- what was done, for `Fabric.explain`: local, changes nothing -------------------------------------------------

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        """Return what this rank holds of each parameter of the user's own ``module``, once for each of its names.

        ``forward_module`` is what :meth:`setup_module` returned for it.
        """
        named = self.named_parameters(module, remove_duplicate=False)
        return [Holding.all_of(name, parameter) for name, parameter in named]

    def is_unit(self, part: nn.Module) -> bool:
        """Whether the parameters of ``part``, a module inside of a set-up one, are gathered and freed together."""
        return False

    def recomputes(self, part: nn.Module) -> bool:
        """Whether ``part`` computes its activations again in backward, in place of keeping them."""
        return _is_checkpointed(part)

    def tracked(self, optimizer: Optimizer) -> list[list[Tensor]]:
        """Return the parameters that a step of ``optimizer`` updates, by group; each as :meth:`holdings` has it."""
        return [list(group["params"]) for group in optimizer.param_groups]

    def remarks(self) -> list[str]:
        """Return what a user should know of how this runs, a sentence each."""
        return []

    # ---- end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let go of everything; calling it again does nothing."""
        try:
            self.wait_for_saves()
        finally:
            self.precision.teardown()
            if self.accelerator is not None:
                self.accelerator.teardown()
            self.checkpoint_io.teardown()

    @classmethod  # noqa: B027
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Add the names of this class, with their presets, to ``strategy_registry``."""


class _OneProcess:
    """Collectives in a world of one process: nothing is to be combined, and every answer is the input."""

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        return tensor

    def barrier(self, name: str | None = None) -> None:
        return None

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return obj

    def _peers(self, in_background: bool = False) -> Peers:
        return OneRank()


def _is_checkpointed(part: nn.Module) -> bool:
    # asked of modules that only exist where somebody has imported them: importing costs a second
    wrapper = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    if wrapper is not None and isinstance(part, wrapper.CheckpointWrapper):
        return True
    contract = sys.modules.get("torch.distributed._composable.contract")
    return contract is not None and "checkpoint" in (contract._get_registry(part) or ())


def _nonfinite_message(module: nn.Module, parameters: Iterable[Tensor], norm_type: float, total: Tensor) -> str:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    bad = [
        names.get(id(p), f"a parameter of shape {tuple(p.shape)}")
        for p in parameters
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    where = f"Not finite are those of: {', '.join(bad[:10])}" + (f" and {len(bad) - 10} more" if bad[10:] else "")
    return (
        f"The total norm of order {norm_type} of the gradients is non-finite ({total.item()}): they cannot be clipped. "
        + (where if bad else "Each gradient is finite, their norm overflows")
        + ". To go on regardless, or to let a gradient scaler skip this step, pass `error_if_nonfinite=False`."
    )


@cache
def _options_of_load(io_class: type[CheckpointIO]) -> frozenset[str]:
    """Which of our keywords the class's ``load_checkpoint`` takes; older ones know the path alone."""
    parameters = inspect.signature(io_class.load_checkpoint).parameters
    options = frozenset({"weights_only", "mmap"})
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return options & parameters.keys()


def _read(io: CheckpointIO, path: _PATH, weights_only: bool | None, mmap: bool) -> tuple[Any, bool]:
    """Return the file's content, and whether its tensors may still be in the file."""
    options = _options_of_load(type(io))
    if weights_only is not None and "weights_only" not in options:
        raise TypeError(
            f"weights_only={weights_only!r} cannot be honoured: `{type(io).__name__}.load_checkpoint` has no such "
            "parameter. Add it there, or leave it out here."
        )
    wanted: dict[str, Any] = {"weights_only": weights_only} if "weights_only" in options else {}
    if mmap and "mmap" in options:
        wanted["mmap"] = True
    return io.load_checkpoint(path, **wanted), "mmap" in wanted
