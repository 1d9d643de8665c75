"""Parts of parameters on the ranks of XLA-FSDP: names, whole tensors from parts and back, and files of parts.

A part is a piece of the flattened parameter, or of its first dimension; the last ones are padded with zeros.
"""

import re
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning.fabric.checkpoint.manifest import MANIFEST
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH

METADATA = "shard_metadata"  # the key that torch_xla's own tool looks for
_FILE = re.compile(r"checkpoint_rank-(\d{8})-of-(\d{8})\.pth")
_WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.")


# ---- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Of which parameter a rank keeps a part: its name in the user's module, and its whole size."""

    name: str
    size: torch.Size


@dataclass(frozen=True)
class Layout:
    """The parts of a wrapped module: by key of its state dict; merged ones, and how this rank takes its own.

    ``merged`` has the names, sizes and numbers of elements of the parameters that are one flat parameter.
    """

    parts: Mapping[str, Part]
    merged: Mapping[str, tuple[Sequence[str], Sequence[Sequence[int]], Sequence[int]]]
    rank: int
    world_size: int

    @classmethod
    def of(cls, root: nn.Module) -> "Layout":
        return cls.from_metadata(root.get_shard_metadata())  # type: ignore[operator]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Layout":
        parts = {
            _joined_name(prefix, key): Part(
                _users_name(_joined_name(prefix, info["_orig_name"])), torch.Size(info["_orig_size"])
            )
            for prefix, infos in metadata["shard_info"].items()
            for key, info in infos.items()
        }
        merged = {}
        for flat, (names, sizes, numels) in metadata["flatten_info"].items():
            owner = flat.rpartition(".")[0]
            merged[_users_name(flat)] = ([_users_name(_joined_name(owner, n)) for n in names], sizes, numels)
        return cls(parts, merged, metadata["rank"], metadata["world_size"])

    @property
    def is_flattened(self) -> bool:
        return bool(self.merged)

    def refuse_flattened(self, what: str) -> None:
        if self.is_flattened:
            raise ValueError(
                f"{what} cannot be put together where flatten_parameters=True has merged parameters. Save with "
                "state_dict_type='sharded', or leave flatten_parameters out."
            )

    def parts_by_key(self, root: nn.Module) -> dict[str, nn.Parameter]:
        state = root.state_dict(keep_vars=True)
        return {key: state[key] for key in self.parts}

    def parts_by_name(self, root: nn.Module) -> dict[str, nn.Parameter]:
        return {self.parts[key].name: part for key, part in self.parts_by_key(root).items()}

    def sizes_by_part(self, root: nn.Module) -> dict[Tensor, torch.Size]:
        return {part: self.parts[key].size for key, part in self.parts_by_key(root).items()}

    def cut_state(self, optimizer: Optimizer, root: nn.Module) -> None:
        """Replace state that is as large as the whole parameter by this rank's part, in place."""
        for part, size in self.sizes_by_part(root).items():
            for name, value in optimizer.state.get(part, {}).items():
                if isinstance(value, Tensor) and value.shape == size and value.shape != part.shape:
                    optimizer.state[part][name] = part_of(value, part, self.rank, self.world_size)

    def load(self, root: nn.Module, whole: Mapping[str, Any], strict: bool) -> None:
        """Copy this rank's parts of a ``whole`` state into ``root``; nothing is changed if it does not fit."""
        own: dict[str, Any] = root.state_dict()
        wanted = {key: self._names(key) for key in own}
        problems = _misfits(whole, [each for names in wanted.values() for each in names], strict)
        if problems:
            raise RuntimeError("Error(s) in loading a state dict; nothing was changed:\n\t" + "\n\t".join(problems))
        found = {
            key: self._piece(key, [whole[name] for name, _ in names], own[key])
            for key, names in wanted.items()
            if all(name in whole for name, _ in names)
        }
        root.load_state_dict(found, strict=False)

    def _names(self, key: str) -> list[tuple[str, torch.Size | None]]:
        """What is needed for an entry of the state dict: names in the user's module, with sizes of parameters."""
        if key not in self.parts:
            return [(_users_name(key), None)]
        part = self.parts[key]
        if part.name not in self.merged:
            return [(part.name, part.size)]
        names, sizes, _ = self.merged[part.name]
        return [(name, torch.Size(size)) for name, size in zip(names, sizes, strict=True)]

    def _piece(self, key: str, values: list[Any], own: Any) -> Any:
        if key not in self.parts:
            return values[0]
        if len(values) == 1 and self.parts[key].name not in self.merged:
            return part_of(values[0], own, self.rank, self.world_size)
        return part_of(torch.cat([value.reshape(-1) for value in values]), own, self.rank, self.world_size)


def part_of(whole: Tensor, like: Tensor, rank: int, world_size: int) -> Tensor:
    """Return the part of ``whole`` that is laid out as the part ``like``, on its device."""
    rows = whole.reshape(-1) if like.ndim == 1 else whole
    missing = like.shape[0] * world_size - rows.shape[0]
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
    return padded.narrow(0, rank * like.shape[0], like.shape[0]).clone().to(like.device)


def join(parts: Sequence[Tensor], size: torch.Size) -> Tensor:
    """Return the whole tensor of ``size`` whose parts are, by rank, ``parts``."""
    rows = torch.cat(list(parts))
    return rows[: size.numel()].reshape(size) if rows.ndim == 1 else rows[: size[0]]


def _misfits(
    whole: Mapping[str, Any], wanted: Sequence[tuple[str, torch.Size | None]], strict: bool
) -> Iterator[str] | list[str]:
    names = {name for name, _ in wanted}
    problems = []
    if strict:
        problems += [f'Missing key(s) in state_dict: "{name}".' for name in sorted(names - whole.keys())]
        problems += [f'Unexpected key(s) in state_dict: "{name}".' for name in whole if name not in names]
    for name, size in wanted:
        if size is not None and name in whole and whole[name].shape != size:
            problems.append(
                f'size mismatch for "{name}": the checkpoint has {tuple(whole[name].shape)}, the model {tuple(size)}.'
            )
    return problems


def _joined_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".lstrip(".")


def _users_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# ---- whole states ----------------------------------------------------------------------------------------------------


def gather_state(root: nn.Module, keep: bool) -> dict[str, Any]:
    """Collective: the whole state of ``root`` under the user's names, on the CPU; empty where not ``keep``."""
    layout = Layout.of(root)
    by_rank: list[OrderedDict[str, Any]] = [OrderedDict() for _ in range(layout.world_size)]
    for key, value in root.state_dict().items():
        every = _from_all(value, keep) if key in layout.parts else [value.cpu()] * layout.world_size
        for state, part in zip(by_rank, every, strict=keep):
            state[key] = part
    return join_state(by_rank, root.get_shard_metadata()) if keep else {}  # type: ignore[operator]


def join_state(by_rank: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole state, from what each rank's wrapped module has."""
    from torch_xla.distributed.fsdp import consolidate_sharded_state_dicts

    return dict(consolidate_sharded_state_dicts(by_rank, metadata))


def _from_all(part: Tensor, keep: bool) -> list[Tensor]:
    """Collective: every rank's ``part``, on the CPU; none where not ``keep``."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    gathered = xm.all_gather(part.detach().unsqueeze(0))
    torch_xla.sync()  # one at a time: the device need not hold all of them
    return list(gathered.cpu()) if keep else []


def gather_optimizer(optimizer: Optimizer, sizes: Sequence[torch.Size], keep: bool) -> dict[str, Any]:
    """Collective: the whole state in torch's own format, on the CPU; empty where not ``keep``."""
    own = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole: dict[int, Any] = {}
    for index, values in own["state"].items():
        whole[index] = {}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                every = _from_all(value.to(parameters[index].device), keep)
                whole[index][name] = join(every, sizes[index]) if keep else None
            else:
                whole[index][name] = apply_to_collection(value, Tensor, Tensor.cpu)
    return {**own, "state": whole} if keep else {}


def join_optimizer(by_rank: Sequence[Mapping[str, Any]], sizes: Sequence[torch.Size]) -> dict[str, Any]:
    """Return the whole state, from what each rank's optimizer has."""
    whole: dict[int, Any] = {}
    for index, values in by_rank[0]["state"].items():
        every = {name: [each["state"][index][name] for each in by_rank] for name in values}
        whole[index] = {
            name: join(found, sizes[index]) if isinstance(found[0], Tensor) and found[0].ndim else found[0]
            for name, found in every.items()
        }
    return {**by_rank[0], "state": whole}


def load_optimizer(
    optimizer: Optimizer, whole: Mapping[str, Any], sizes: Sequence[torch.Size], rank: int, world_size: int
) -> None:
    """Load this rank's parts of a ``whole`` state in torch's own format."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        index: {
            name: part_of(value, parameters[index], rank, world_size)
            if isinstance(value, Tensor) and value.shape == sizes[index]
            else value
            for name, value in values.items()
        }
        for index, values in whole["state"].items()
    }
    optimizer.load_state_dict({**whole, "state": own})


# ---- files -----------------------------------------------------------------------------------------------------------


def metadata_of(root: nn.Module, parameters: Mapping[str, Sequence[str | None]], save: str) -> dict[str, Any]:
    """Return what describes a rank's file: torch_xla's part, and which save it is of.

    ``parameters`` has the state's keys of what is in parts; for optimizers, with the keys of their parameters.
    """
    return {**root.get_shard_metadata(), "parameters": dict(parameters), "save": save}  # type: ignore[operator]


def new_save() -> str:
    return uuid.uuid4().hex


def are_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether parts that are described so are those of equal modules, for one rank of as many."""
    facts = ("shard_info", "flatten_info", "world_size", "rank")
    return all(_plain(one[fact]) == _plain(other[fact]) for fact in facts)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def sizes_of(metadata: Mapping[str, Any], optimizer: str) -> list[torch.Size]:
    """The whole sizes of the parameters of the optimizer that was saved under a key."""
    layout = Layout.from_metadata(metadata)
    layout.refuse_flattened("The state of an optimizer")
    return [layout.parts[key].size for key in metadata["parameters"][optimizer]]


def file_of(folder: _PATH, rank: int, world_size: int) -> str:
    return f"{str(folder).rstrip('/')}/checkpoint_rank-{rank:08d}-of-{world_size:08d}.pth"


def files_in(folder: str) -> list[str]:
    """The files of all ranks, by rank; ``ValueError`` if there are not as many as there were ranks."""
    found = _rank_files(folder)
    worlds = {world for _, world in found}
    if not found or len(worlds) != 1 or sorted(rank for rank, _ in found) != list(range(worlds.pop())):
        raise ValueError(
            f"{folder!r} is not a checkpoint of XLAFSDPStrategy: it should have a file "
            f"'checkpoint_rank-<rank>-of-<ranks>.pth' for each rank, but has {len(found)}. Pass the folder that "
            "`fabric.save` has written, or one file with whole states."
        )
    return [found[key] for key in sorted(found)]


def remove_other_files(folder: _PATH, world_size: int) -> None:
    """Delete the files that another number of ranks has left."""
    fs = get_filesystem(folder)
    for (_, world), path in _rank_files(str(folder)).items():
        if world != world_size:
            fs.rm(path)


def foreign_entries(folder: Path) -> list[Path]:
    """Return what lies in ``folder`` but is no part of a checkpoint."""
    return [entry for entry in folder.iterdir() if entry.name != MANIFEST and not _FILE.fullmatch(entry.name)]


def _rank_files(folder: str) -> dict[tuple[int, int], str]:
    entries = get_filesystem(folder).ls(folder, detail=False)
    base = folder.rstrip("/")
    names = [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]
    matches = [match for name in names if (match := _FILE.fullmatch(name))]
    return {(int(match[1]), int(match[2])): f"{base}/{match[0]}" for match in matches}
