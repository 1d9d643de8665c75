"""DeepSpeed's checkpoints: folders with a file for each rank; and whole weights out of parts."""

import copy
import os
import zipfile
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning.fabric.checkpoint.manifest import MANIFEST
from lightning.fabric.checkpoint.saving import Prepared, Written
from lightning.fabric.strategies._single_file import _validate_keys_for_strict_loading, check_module, is_stateful
from lightning.fabric.utilities.types import _PATH

TAG = "checkpoint"  # the folder in the checkpoint's folder that has the files of all ranks
OWN_STATE = "fabric"  # key of the user's values, kept apart from what DeepSpeed writes under names of its own
_ENTRIES = frozenset({TAG, "latest", "zero_to_fp32.py", "zero_to_torch.py", MANIFEST})  # of the checkpoint's folder
_DEEPSPEEDS_KEYS = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dims",
        "universal_checkpoint_info",
        "num_experts",
        "ds_config",
        "ds_version",
    }
)


def gathered(parameters: Any, write: bool = False) -> AbstractContextManager[Any]:
    """Collective: a context in which those parameters are whole; with ``write``, rank 0's values are kept after."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)


def gathered_state(module: nn.Module, keep: bool) -> dict[str, Any]:
    """Collective: ``module``'s state dict in CPU memory, gathered parameter by parameter; empty unless ``keep``."""
    state: dict[str, Any] = {}
    copies: dict[int, Tensor] = {}  # a tied parameter is one tensor under several names
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in module.state_dict(keep_vars=True).items():
        parameter = parameters.get(name)
        if parameter is not None and id(parameter) not in copies:
            with gathered([parameter]):
                copies[id(parameter)] = parameter.detach().to("cpu", copy=True) if keep else parameter.detach()
        if keep:
            state[name] = copies[id(parameter)] if parameter is not None else _to_cpu(value)
    return state


def _to_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def state_of(obj: Any) -> Any:
    return obj.state_dict() if callable(getattr(obj, "state_dict", None)) else obj


class FolderOfAnEngine:
    """A checkpoint to be written by an engine, which takes all ranks."""

    def __init__(self, engine: Any, options: dict[str, Any], rank: int) -> None:
        self._engine = engine
        self._options = options
        self._mark = f"zero_pp_rank_{rank}_"  # in the names of the files that are this rank's alone

    def prepared(self) -> Prepared:
        """Return how it is saved."""
        # one that goes on writing after the call: nothing may be renamed, or described, meanwhile
        in_place = self._engine.checkpoint_engine.is_decoupled()
        return Prepared(self._write, is_folder=True, in_place=in_place, check=_refuse_file, foreign=_foreign_entries)

    def _write(self, staged: Path) -> Written:
        self._engine.save_checkpoint(os.fspath(staged), tag=TAG, **self._options)
        folder = Path(staged) / TAG
        return Written([f"{TAG}/{file.name}" for file in folder.iterdir() if self._mark in file.name])


def _refuse_file(path: _PATH) -> None:
    folder = Path(os.fspath(path))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"DeepSpeed saves a folder, but {str(folder)!r} is a file. Choose another path.")


def _foreign_entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name not in _ENTRIES]


def checkpoint_folder(path: _PATH) -> Path:
    folder = Path(os.fspath(path))
    if not folder.exists():
        raise FileNotFoundError(f"There is no checkpoint at {str(folder)!r}.")
    if folder.is_file():
        raise ValueError(
            f"A checkpoint of DeepSpeed's is a folder, but {str(folder)!r} is a file. If it holds full "
            "weights under the names of `state`, use `DeepSpeedStrategy(load_full_weights=True)`; if it holds a bare "
            "state dict, `fabric.load_raw`."
        )
    if not (folder / TAG).is_dir():
        inside = next((parent for parent in (folder.parent, folder.parent.parent) if (parent / TAG).is_dir()), None)
        hint = f" Did you mean {str(inside)!r}?" if inside is not None else ""
        raise ValueError(f"{str(folder)!r} is not a checkpoint of DeepSpeed's: there is no folder {TAG!r} in it.{hint}")
    return folder


class Loading:
    """One load of a folder into an engine: everything is checked before anything is changed."""

    def __init__(self, strategy: Any, engine: Any, folder: Path, state: MutableMapping[str, Any], strict: bool) -> None:
        self._engine, self._folder, self._state, self._strict = engine, folder, state, strict
        self._with_optimizer = any(obj is engine.client_optimizer for obj in state.values()) and (
            engine.client_optimizer is not None
        )
        self._others = strategy._besides(engine, state)
        self._stage = engine.zero_optimization_stage()
        self._strategy = strategy

    def run(self) -> dict[str, Any]:
        saved = self._read(self._engine._get_ckpt_name(str(self._folder), TAG))
        # of the files that each rank has at stage 3, that of rank 0 counts
        first = self._read(self._engine._get_ckpt_name(str(self._folder), TAG, pp_placeholder="0"))
        own = first.get(OWN_STATE)
        if own is None:  # written by another program
            own = {key: value for key, value in first.items() if key not in _DEEPSPEEDS_KEYS}
        _validate_keys_for_strict_loading(self._others, own, self._strict)
        self._check(saved)
        loaded, _ = self._engine.load_checkpoint(
            str(self._folder),
            tag=TAG,
            load_module_strict=self._strict,
            load_optimizer_states=self._with_optimizer,
            load_lr_scheduler_states=self._with_optimizer and saved.get("lr_scheduler") is not None,
        )
        if loaded is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint {str(self._folder)!r}.")
        own = copy.deepcopy(own)  # not in the file any more
        for key, obj in self._others.items():
            if key not in own:
                continue
            if is_stateful(obj):
                obj.load_state_dict(own.pop(key))
            else:
                self._state[key] = own.pop(key)
        self._strategy._engines[self._engine].close()
        return dict(own)

    def _read(self, name: str) -> dict[str, Any]:
        """A file of everything but optimizer state, with tensors left in it."""
        path = Path(name)
        if not path.is_file():
            found = sorted(file.name for file in path.parent.glob("*model_states.pt"))
            raise ValueError(
                f"The checkpoint {str(self._folder)!r} has no file {path.name!r}, which this rank needs at stage "
                f"{self._stage}; it has {found}. Load it at the stage, and on as many ranks, as it was saved; or make "
                "full weights of it with `zero_to_fp32.py` and load those with `fabric.load_raw`."
            )
        return torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))

    def _check(self, saved: Mapping[str, Any]) -> None:
        ranks, now = saved.get("dp_world_size"), self._engine.seq_dp_world_size
        if self._with_optimizer and self._stage and ranks != now and not self._engine.load_universal_checkpoint():
            raise ValueError(
                f"The checkpoint's optimizer state is in {ranks} parts, one for each rank that saved it, and there are "
                f"{now} ranks now. Leave the optimizer out of `state` to load the weights alone, or convert the "
                "checkpoint with `deepspeed.checkpoint.ds_to_universal`."
            )
        if self._stage < 3 and not saved.get("frozen_param_fragments"):
            name = next(
                key
                for key, obj in self._state.items()
                if isinstance(obj, nn.Module) and self._strategy._engine_of(obj) is self._engine
            )
            check_module(self._engine.module, saved["module"], self._strict, f"state[{name!r}]")
