"""Share parameters, gradients and optimizer state out over XLA devices.    torch_xla: XlaFullyShardedDataParallel"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.checkpoint.saving import Prepared, Written
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision._kept import is_kept
from lightning.fabric.plugins.precision.precision import Precision, dtype_name
from lightning.fabric.plugins.precision.xla import DTYPES
from lightning.fabric.strategies import _xla_shards as shards
from lightning.fabric.strategies._holding import WHOLE, Holding, averaged, ranks
from lightning.fabric.strategies._materialize import MetaTensors
from lightning.fabric.strategies._single_file import (
    _apply_filter,
    _validate_keys_for_strict_loading,
    check_optimizer,
    is_stateful,
)
from lightning.fabric.strategies._wrap_policy import Choice, choice_of, modules_to_checkpoint, units_to_shard
from lightning.fabric.strategies._xla import XLARanks
from lightning.fabric.strategies._xla_shards import Layout
from lightning.fabric.strategies.strategy import _NO_CONTEXT, _BackwardSyncControl, _read, _Sharded
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.init_tape import recording_init
from lightning.fabric.utilities.optimizer import _replace_parameters, parameter_names
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.ranks import all_or_none
from lightning.fabric.utilities.types import _PATH
from lightning.fabric.utilities.warnings import PossibleUserWarning

_Policy = Callable[..., bool] | Iterable[type[nn.Module]]


class XLAFSDPStrategy(XLARanks, _Sharded):
    """Each TPU core keeps a part of every parameter, of its gradient and of its optimizer state. Experimental.

    The parts are always 32-bit; ``precision`` is the dtype that they are gathered in for the computation. Optimizers
    are made after ``setup_module``, or set up together with the module. Each rank takes its parts from its own module:
    ranks create it alike, with one seed.

    Args:
        accelerator: kind of device; None: Fabric chooses.
        parallel_devices: the devices of this machine; None: Fabric chooses.
        checkpoint_io: reads and writes checkpoint files.
        precision: dtype of computation.
        auto_wrap_policy: submodules that are gathered and freed one at a time: a set of their classes, or a function
            ``(module, recurse, numel) -> bool``. What is left over is gathered throughout a step.
        activation_checkpointing_policy: submodules whose activations are computed again in backward, in the same form.
        state_dict_type: ``"sharded"`` writes a folder with a file per rank, ``"full"`` one ordinary file.
        sequential_save: write the files of a sharded checkpoint one after the other, to need less memory of the host.
        kwargs: options of ``torch_xla.distributed.fsdp.XlaFullyShardedDataParallel``.

    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        auto_wrap_policy: _Policy | None = None,
        activation_checkpointing_policy: _Policy | None = None,
        state_dict_type: Literal["full", "sharded"] = "sharded",
        sequential_save: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(accelerator, parallel_devices, checkpoint_io, precision)
        if state_dict_type not in ("full", "sharded"):
            raise ValueError(f"state_dict_type must be 'full' or 'sharded', but got {state_dict_type!r}.")
        self._wrap = _choice(auto_wrap_policy, "auto_wrap_policy")
        self._checkpoint = _choice(activation_checkpointing_policy, "activation_checkpointing_policy")
        self._is_full = state_dict_type == "full"
        self._sequential_save = sequential_save
        self._options = kwargs
        self._set_up: list[_SetUp] = []
        self._recomputed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._backward_sync_control = _XLAFSDPBackwardSync()

    # -- objects

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules made inside wait in the host's memory for `setup_module`, which moves each rank's parts.

        With ``empty_init=True`` they are on the meta device, and `setup_module` initialises them unit by unit.
        """
        where = recording_init() if empty_init else torch.device("cpu")
        with where, self.precision.module_init_context():
            yield

    def module_sharded_context(self) -> AbstractContextManager[None]:
        return self.module_init_context(empty_init=True)

    def module_to_device(self, module: nn.Module) -> None:
        """Leave ``module`` where it is: `setup_module` moves the parts that this rank keeps, and only those."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Collective: return ``module`` in `XlaFullyShardedDataParallel`; its own parameters are gone from it."""
        from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel, checkpoint_module

        self._need_group("setup_module")
        if self.precision.precision != "32-true" and any(is_kept(part) for part in module.modules()):
            raise ValueError(
                "XLAFSDPStrategy computes in one dtype, so `keep_fp32` is not possible. Use precision='32-true', or "
                "strategy='xla'."
            )
        units = units_to_shard(module, self._wrap)
        for tie in units.ties:
            _warn_about_tie(tie)
        for part in modules_to_checkpoint(module, self._checkpoint):
            checkpoint_module(part)
            self._recomputed.add(part)
        names = _first_names(module)
        dtype = DTYPES[self.precision.precision]
        options = {
            "compute_dtype": dtype,
            "buffer_dtype": dtype,
            "param_init_fn": self._initialise,
            "auto_wrap_policy": _policy_for(units.modules),
            **self._options,
        }
        root = XlaFullyShardedDataParallel(module.float(), **options)
        still_there = [each for each in self._set_up if each.root() is not None]
        self._set_up = [*still_there, _SetUp(weakref.ref(module), weakref.ref(root), names)]
        return root

    def _initialise(self, unit: nn.Module) -> None:
        """Give a unit that is on the meta device its values, whole, in the host's memory: it is cut up next."""
        MetaTensors.of(unit).materialize(unit, "cpu", agree=self.broadcast)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Collective: set the module up, and make the optimizers update its parts; their state is cut up too."""
        if optimizers and self._options.get("flatten_parameters"):
            raise ValueError(
                "With flatten_parameters=True parameters are merged into new ones, which an optimizer that exists "
                "cannot follow. Call `fabric.setup_module(model)` first, then make the optimizer."
            )
        before = parameter_names(module)
        root = self.setup_module(module)
        layout = Layout.of(root)
        replacement: dict[Tensor, Tensor] = {before[name]: part for name, part in layout.parts_by_name(root).items()}
        for optimizer in optimizers:
            _replace_parameters(optimizer, replacement)
            layout.cut_state(optimizer, root)
        return root, optimizers, scheduler

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return ``optimizer``; ``ValueError`` if it updates anything but parts of modules that are set up."""
        known = {part for each in self._set_up if (root := each.root()) is not None for part in root.parameters()}
        if not all(parameter in known for parameter in self.precision.main_params(optimizer)):
            raise ValueError(
                f"{type(optimizer).__name__} refers to parameters that are not those of a set-up module. Make it after "
                "`model = fabric.setup_module(model)`, from `model.parameters()`."
            )
        return optimizer

    def named_parameters(
        self, module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parts, under the names of the parameters in the user's own ``module``, in their order."""
        root, names = self._root_of(module), self._set_up_of(module).names
        parts = Layout.of(root).parts_by_name(root)
        merged = {name: name for name in parts if name not in names}
        for name, first in {**names, **merged}.items():
            if first in parts and (name == first or not remove_duplicate) and (recurse or "." not in name):
                yield f"{prefix}.{name}" if prefix else name, parts[first]

    def _module_with_state(self, module: nn.Module) -> nn.Module:
        return next((own for each in self._set_up if each.root() is module and (own := each.own())), module)

    def _root_of(self, module: nn.Module) -> nn.Module:
        return self._set_up_of(module).root() or module

    def _set_up_of(self, module: nn.Module) -> "_SetUp":
        for each in self._set_up:
            if each.root() is not None and (each.own() is module or each.root() is module):
                return each
        raise ValueError(
            f"{type(module).__name__} is not a module that {type(self).__name__} has set up, or what `fabric.setup` "
            "returned for it is gone. Pass the result of `fabric.setup_module(...)`."
        )

    def _is_set_up(self, module: Any) -> bool:
        return any(each.root() is not None and module in (each.own(), each.root()) for each in self._set_up)

    # -- what was done

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        sizes = Layout.of(forward_module).sizes_by_part(forward_module)
        computes = self._options.get("compute_dtype", DTYPES[self.precision.precision])
        reduces = torch.float32 if self._options.get("fp32_reduce_scatter") else computes
        number = self.world_size
        return [
            Holding(
                name,
                part,
                part,
                tuple(sizes[part]),
                WHOLE if number == 1 else f"1/{number} of its elements over {ranks(number)}",
                averaged(number, reduces),
                computes_in=dtype_name(computes),
                has_gradient=part.grad is not None,
            )
            for name, part in self.named_parameters(module, remove_duplicate=False)
        ]

    def is_unit(self, part: nn.Module) -> bool:
        from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel

        return isinstance(part, XlaFullyShardedDataParallel)

    def recomputes(self, part: nn.Module) -> bool:
        return part in self._recomputed or super().recomputes(part)

    # -- the step

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Collective. ``norm_type`` is positive, or infinity."""
        if not norm_type > 0:
            raise ValueError(f"Sharded gradients are clipped by a norm_type > 0, but got {norm_type!r}.")
        parameters = [p for p in self.precision.main_params(optimizer) if p.grad is not None]
        total = self._total_norm([p.grad for p in parameters if p.grad is not None], float(norm_type))
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"The total norm of order {norm_type} of the gradients is non-finite ({total.item()}): they cannot be "
                "clipped. To go on regardless, pass `error_if_nonfinite=False`."
            )
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def _total_norm(self, gradients: list[Tensor], order: float) -> Tensor:
        import torch_xla.core.xla_model as xm

        norms = [torch.linalg.vector_norm(gradient, order, dtype=torch.float32) for gradient in gradients]
        local = torch.stack(norms) if norms else torch.zeros(1, device=self.root_device)
        if order == float("inf"):
            return self._reduced(local.max(), xm.REDUCE_MAX)
        total: Tensor = self._reduced((local**order).sum(), xm.REDUCE_SUM) ** (1 / order)
        return total

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} does not clip gradients by value. Clip by norm: "
            "`fabric.clip_gradients(..., max_norm=...)`."
        )

    # -- state

    def state_dict(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Collective: the whole state; parts have neither the names nor the shapes of the user's parameters."""
        if args or kwargs:
            raise NotImplementedError(
                "`state_dict` of a module that is sharded by XLA takes no arguments. Leave them out."
            )
        return self.get_module_state_dict(module)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Collective: the whole state under the user's names, on the CPU of every rank."""
        return self._full_module(module, rank_zero_only=False)

    def _full_module(self, module: nn.Module, rank_zero_only: bool) -> dict[str, Any]:
        set_up = self._set_up_of(module)
        root = self._root_of(module)
        state = shards.gather_state(root, keep=self.is_global_zero or not rank_zero_only)
        return {**state, **{name: state[first] for name, first in set_up.names.items() if first in state}}

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Collective: load a whole state, which every rank has; nothing is changed if it does not fit."""
        root, names = self._root_of(module), self._set_up_of(module).names
        Layout.of(root).load(root, {k: v for k, v in state_dict.items() if names.get(k, k) == k}, strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collective: rank 0 gets the whole state, on the CPU; the others nothing."""
        return shards.gather_optimizer(optimizer, self._sizes(optimizer), keep=self.is_global_zero)

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Collective: load a whole state, which rank 0 has, or every rank."""
        if not self.reduce_boolean_decision(bool(state_dict)):
            state_dict = self.broadcast(state_dict)
        shards.load_optimizer(optimizer, state_dict, self._sizes(optimizer), self.global_rank, self.world_size)

    def _sizes(self, optimizer: Optimizer) -> list[torch.Size]:
        """The whole sizes of the optimizer's parameters."""
        by_part: dict[Tensor, torch.Size] = {}
        for each in self._set_up:
            if (root := each.root()) is not None:
                layout = Layout.of(root)
                layout.refuse_flattened("The whole state of an optimizer")
                by_part.update(layout.sizes_by_part(root))
        return [by_part[part] for part in self.precision.main_params(optimizer)]

    # -- files

    def _prepare_checkpoint(
        self,
        state: MutableMapping[str, Any],
        storage_options: Any,
        filter: Mapping[str, Callable[[str, Any], bool]],
    ) -> Prepared:
        """Collective: a folder with a file per rank, or one file, as ``state_dict_type`` says.

        In a folder, what is in no parts is in the file of rank 0. The file for rank 1 of 4 is
        ``checkpoint_rank-00000001-of-00000004.pth``. With the module under the key ``"model"``,
        ``python -m torch_xla.distributed.fsdp.consolidate_sharded_ckpts`` makes one file of them.
        """
        import torch_xla

        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no `storage_options`, but got {storage_options!r}.")
        module = self._only_module(state)
        if filter and not self._is_full:
            raise NotImplementedError(
                "A sharded checkpoint is written as it is: `filter` is for XLAFSDPStrategy(state_dict_type='full')."
            )
        torch_xla.sync()
        if self._is_full:
            whole = self._whole(state, filter)
            return self._prepared_file(whole if self.is_global_zero else None)
        own = self._own_part(state, self._root_of(module))
        in_place = not self.checkpoint_io.to_any_path
        write = partial(self._write_in_turn, own)
        return Prepared(write, is_folder=True, in_place=in_place, foreign=shards.foreign_entries)

    def _whole(self, state: Mapping[str, Any], filter: Mapping[str, Callable[[str, Any], bool]]) -> dict[str, Any]:
        checkpoint: dict[str, Any] = {}
        for key, obj in state.items():
            value = self._full_module(obj, rank_zero_only=True) if self._is_set_up(obj) else self._state_of(obj)
            _apply_filter(key, filter, value, checkpoint)
        return checkpoint

    def _state_of(self, obj: Any) -> Any:
        if isinstance(obj, Optimizer):
            return self.get_optimizer_state(obj)
        return obj.state_dict() if callable(getattr(obj, "state_dict", None)) else obj

    def _own_part(self, state: Mapping[str, Any], root: nn.Module) -> dict[str, Any]:
        """Return what is in this rank's file."""
        own: dict[str, Any] = {}
        parameters: dict[str, list[str | None]] = {}
        whole: dict[str, Any] = {}
        names = {part: name for name, part in Layout.of(root).parts_by_key(root).items()}
        for key, obj in state.items():
            if self._is_set_up(obj):
                own[key], parameters[key] = root.state_dict(), []
            elif isinstance(obj, Optimizer):
                own[key] = obj.state_dict()
                parameters[key] = [names.get(part) for part in self.precision.main_params(obj)]  # type: ignore[call-overload]
            else:
                whole[key] = self._state_of(obj)
        if shards.METADATA in state:
            raise ValueError(f"state has the key {shards.METADATA!r}, which describes the files. Rename it.")
        own[shards.METADATA] = shards.metadata_of(root, parameters, save=self.broadcast(shards.new_save()))
        own.update(whole if self.is_global_zero else {})
        return own

    def _write_in_turn(self, checkpoint: dict[str, Any], folder: _PATH) -> Written:
        file = shards.file_of(folder, self.global_rank, self.world_size)
        for turn in range(self.world_size if self._sequential_save else 1):
            with all_or_none(self, f"writing {file!r}"):
                if turn == self.global_rank or not self._sequential_save:
                    self.checkpoint_io.save_checkpoint(checkpoint=checkpoint, path=file)
        if self.is_global_zero:
            shards.remove_other_files(folder, self.world_size)
        return Written([file.rpartition("/")[2]])

    def load_checkpoint(
        self,
        path: _PATH,
        state: nn.Module | Optimizer | MutableMapping[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Collective: restore ``state``, which has the module, from a folder or from one file with whole states.

        A folder that was written by as many ranks, from a module that is wrapped alike, is read by each rank for
        itself; of any other, each rank reads all.
        """
        import torch_xla

        if state is None or (isinstance(state, MutableMapping) and not state):
            raise ValueError(
                f"{type(self).__name__} loads into objects, so `state` must have the set-up module. "
                "Pass e.g. {'model': model, 'optimizer': optimizer}."
            )
        if not isinstance(state, MutableMapping):
            self._restore_whole(state, self._read(str(path), weights_only), strict, type(state).__name__)
            torch_xla.sync()
            return {}
        root = self._root_of(self._only_module(state))
        if get_filesystem(path).isdir(str(path)):
            remainder = self._load_folder(str(path), state, root, strict, weights_only)
        else:
            remainder = self._load_file(str(path), state, strict, weights_only)
        torch_xla.sync()
        return remainder

    def _only_module(self, state: Mapping[str, Any]) -> nn.Module:
        found = [key for key, obj in state.items() if self._is_set_up(obj)]
        if len(found) != 1:
            raise ValueError(
                f"{type(self).__name__} saves and loads a state with exactly one module that is set up, but this one "
                f"has {len(found)}: {found}. Its keys are {list(state)}."
            )
        module: nn.Module = state[found[0]]
        return module

    def _read(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = _read(self.checkpoint_io, path, weights_only, mmap=False)[0]
        return checkpoint

    def _load_file(
        self, path: str, state: MutableMapping[str, Any], strict: bool, weights_only: bool | None
    ) -> dict[str, Any]:
        checkpoint = self._read(path, weights_only)
        if shards.METADATA in checkpoint:
            raise ValueError(f"{path!r} is the part of one rank. Pass the folder that it is in.")
        _validate_keys_for_strict_loading(state.keys(), checkpoint.keys(), strict)
        for key in [key for key in state if key in checkpoint]:
            if not self._restore_whole(state[key], checkpoint[key], strict, f"state[{key!r}]"):
                state[key] = checkpoint[key]
            del checkpoint[key]
        return checkpoint

    def _restore_whole(self, obj: Any, saved: Any, strict: bool, name: str) -> bool:
        """Load a whole state; False if ``obj`` is a plain value."""
        if self._is_set_up(obj):
            self.load_module_state_dict(obj, saved, strict)
        elif isinstance(obj, Optimizer):
            check_optimizer(obj, saved, name)
            shards.load_optimizer(obj, saved, self._sizes(obj), self.global_rank, self.world_size)
        elif is_stateful(obj):
            obj.load_state_dict(saved)
        else:
            return False
        return True

    def _load_folder(
        self, path: str, state: MutableMapping[str, Any], root: nn.Module, strict: bool, weights_only: bool | None
    ) -> dict[str, Any]:
        with all_or_none(self, f"reading {path!r}"):
            files = shards.files_in(path)
            alike = len(files) == self.world_size
            own = self._read(files[self.global_rank] if alike else files[0], weights_only)
        metadata = own.pop(shards.METADATA)
        if alike and shards.are_alike(metadata, shards.metadata_of(root, {}, save="")):
            one_save = self.broadcast(metadata["save"]) == metadata["save"]
            if not self.reduce_boolean_decision(one_save):
                raise ValueError(f"{path!r} has files of different saves: the last one has failed half-way.")
            own.update(self.broadcast({key: value for key, value in own.items() if key not in metadata["parameters"]}))
            return self._restore_parts(state, own, root, strict)
        with all_or_none(self, f"reading {path!r}"):
            every = [self._read(file, weights_only) for file in files]
        return self._restore_joined(path, state, every, strict)

    def _restore_parts(
        self, state: MutableMapping[str, Any], own: dict[str, Any], root: nn.Module, strict: bool
    ) -> dict[str, Any]:
        _validate_keys_for_strict_loading(state.keys(), own.keys(), strict)
        for key in [key for key in state if key in own]:
            obj, saved = state[key], own.pop(key)
            if self._is_set_up(obj):
                root.load_state_dict(saved, strict=strict)
            elif isinstance(obj, Optimizer):
                check_optimizer(obj, saved, f"state[{key!r}]")
                obj.load_state_dict(saved)
            elif is_stateful(obj):
                obj.load_state_dict(saved)
            else:
                state[key] = saved
        return own

    def _restore_joined(
        self, path: str, state: MutableMapping[str, Any], every: list[dict[str, Any]], strict: bool
    ) -> dict[str, Any]:
        parts = [each.pop(shards.METADATA) for each in every]
        if len({metadata["save"] for metadata in parts}) > 1:
            raise ValueError(f"{path!r} has files of different saves: the last one has failed half-way.")
        first = every[0]
        _validate_keys_for_strict_loading(state.keys(), first.keys(), strict)
        for key in [key for key in state if key in first]:
            obj, saved = state[key], [each.pop(key, None) for each in every]
            if self._is_set_up(obj):
                whole = shards.join_state(saved, parts[0])
                self.load_module_state_dict(obj, whole, strict)
            elif isinstance(obj, Optimizer):
                whole = shards.join_optimizer(saved, shards.sizes_of(parts[0], key))
                self._restore_whole(obj, whole, strict, f"state[{key!r}]")
            elif not self._restore_whole(obj, saved[0], strict, key):
                state[key] = saved[0]
        return first


@dataclass(frozen=True)
class _SetUp:
    """A module that was set up: the user's own, what it is wrapped in, and all names of its parameters.

    ``names`` has the first name of the same parameter for each, which is another one where parameters are tied.
    """

    own: "weakref.ref[nn.Module]"
    root: "weakref.ref[nn.Module]"
    names: Mapping[str, str]


def _first_names(module: nn.Module) -> dict[str, str]:
    first_name: dict[Tensor, str] = {}
    return {name: first_name.setdefault(parameter, name) for name, parameter in parameter_names(module).items()}


class _XLAFSDPBackwardSync(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        if not enabled:
            return _NO_CONTEXT
        no_sync = getattr(module, "no_sync", None)
        if no_sync is None:
            raise TypeError(
                f"`no_backward_sync` needs the module that `setup_module` returned, but got {type(module).__name__}. "
                "Pass the result of `fabric.setup(...)`."
            )
        context: AbstractContextManager[None] = no_sync()
        return context


# ---- policies --------------------------------------------------------------------------------------------------------


def _choice(policy: Any, argument: str) -> Choice | None:
    is_function = callable(policy) and not isinstance(policy, type) and not hasattr(policy, "_run_policy")
    return choice_of(_Positional(policy) if is_function else policy, argument)


class _Positional:
    """A policy, whose third parameter torch and torch_xla call by different names."""

    def __init__(self, policy: Callable[[nn.Module, bool, int], bool]) -> None:
        self._policy = policy

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return self._policy(module, recurse, nonwrapped_numel)


def _policy_for(units: Iterable[nn.Module]) -> Callable[..., bool] | None:
    """What torch_xla asks when it is to wrap ``units``, and nothing else."""
    chosen = set(units)
    if not chosen:
        return None

    def is_unit(module: nn.Module, recurse: bool, unwrapped_params: int) -> bool:
        return recurse or module in chosen

    return is_unit


def _activation_checkpointing_auto_wrapper(
    policy: Iterable[type[nn.Module]], module: nn.Module, *args: Any, **kwargs: Any
) -> nn.Module:
    """Wrap ``module`` for FSDP, with its activations computed again in backward if its class is in ``policy``.

    With the policy filled in, this is an ``auto_wrapper_callable`` of `XlaFullyShardedDataParallel`.
    """
    from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel, checkpoint_module

    module = checkpoint_module(module) if isinstance(module, tuple(policy)) else module
    wrapped: nn.Module = XlaFullyShardedDataParallel(module, *args, **kwargs)
    return wrapped


def _warn_about_tie(tie: Any) -> None:
    rank_zero_warn(
        f"{', '.join(tie.parameters)} are one parameter, so {', '.join(tie.units)} cannot be gathered one at a time: "
        "they stay with what is around them.",
        category=PossibleUserWarning,
    )
