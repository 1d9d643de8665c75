"""Checkpoints of a training loop: saved at steps, some of them kept, the newest good one resumed into everything."""

import operator
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.fabric._checks import no_plain_loaders
from lightning.fabric.checkpoint.directory import Best, CheckpointDirectory, Entry
from lightning.fabric.checkpoint.saving import Peers, SaveOptions, agreed
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.random_state import random_state, seed_for, set_random_state
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.ranks import all_or_none
from lightning.fabric.utilities.types import _PATH
from lightning.fabric.wrappers import _FabricDataLoader

KEY = "_fabric"  # of what is saved besides the user's state

BestLike = Best | tuple[str, Literal["min", "max"]] | tuple[str, Literal["min", "max"], int]


class Checkpoints:
    """What ``fabric.checkpoints(folder)`` returns; every method and property is called by all ranks.

    ::

        checkpoints = fabric.checkpoints("runs/1", keep_last=3, keep_best=("val_loss", "min"))
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "epoch": 0}
        step = checkpoints.resume(state) or 0
        ...
        checkpoints.save(step, state, metrics={"val_loss": val_loss})

    A run that was interrupted and resumed ends with the same bits as one that was not, on as many ranks: besides the
    ``state``, a checkpoint holds every rank's random states (python's, numpy's, torch's, CUDA's), every rank's position
    in each set-up loader of ``state``, and the state of the precision (the scale of the gradients).
    ``fabric.load(path, state)`` reads these checkpoints as well.

    In the folder, a checkpoint of step 12 is ``step-00000012``, and the file ``latest`` names the one that was saved
    last. Other files there are left alone.
    """

    def __init__(
        self,
        strategy: Strategy,
        save: Callable[..., None],
        load: Callable[..., dict[str, Any]],
        folder: _PATH,
        keep_last: int | None = None,
        keep_best: BestLike | None = None,
    ) -> None:
        self._strategy = strategy
        self._save = save
        self._load = load
        self._directory = _directory(folder, keep_last, _best(keep_best))
        self._keep_best = _best(keep_best)
        self._seed: int | None = None
        self._is_sure = False  # where this run begins, or that it was said

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.folder)!r})"

    # -- writing

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        blocking: bool = True,
        digests: bool = True,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Collective: save ``state`` as the checkpoint of ``step``; one that exists already is replaced.

        When it is committed, ``latest`` names it; and only then the checkpoints are deleted that need not be kept.

        Args:
            step: 0 or more, the same on all ranks.
            state: as for ``fabric.save``. Set-up loaders in it are saved with their positions.
            metrics: numbers, or tensors of one element, by name; those of rank 0 count.
            blocking: ``False`` returns when the state was copied, and writes while training goes on.
            digests: write down a checksum of each file, which is compared by :meth:`resume`.
            filter: as for ``fabric.save``.

        Raises:
            ValueError: if ``step`` is negative, or not the same on all ranks; if the state has the key ``"_fabric"``.
            TypeError: if ``step`` is no integer, or a metric no number.

        """
        with all_or_none(self._strategy, f"saving step {step!r}"):
            step = _checked_step(step)
            _check_state(state, "save")
            numbers = _checked_metrics(metrics) if self._strategy.is_global_zero else {}
        everything = self._with_own_part(step, state, numbers)
        path = self._directory.path_of(step)

        def committed() -> None:
            self._directory.set_latest(path)
            self._retain()

        options = SaveOptions(
            step, numbers, digests=digests, blocking=blocking, needs_manifest=True, committed=committed
        )
        self._save(path, everything, filter, options)

    def wait(self) -> None:
        """Return when no checkpoint is being written any more; raise what went wrong with the last one."""
        self._strategy.wait_for_saves()

    def _with_own_part(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
        """Collective: return ``state`` with what this class adds to it; what all ranks have to add, on rank 0."""
        peers, doing = self._peers, f"saving step {step}"
        part: dict[str, Any] = agreed(peers, doing, lambda: _part_of_rank(step, state))
        parts = peers.gather(part)
        own = agreed(peers, doing, lambda: None if parts is None else self._own_part(step, parts, metrics))
        return {**state, **part["loaders"], KEY: own}

    def _own_part(self, step: int, parts: list[dict[str, Any]], metrics: Mapping[str, float]) -> dict[str, Any]:
        _check_agreement([part["step"] for part in parts])
        self._say_what_is_left_behind(step)
        self._warn_of_metric(metrics)
        if (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
            self._seed = int(seed)
        elif self._seed is None:
            self._seed = secrets.randbits(32)
        return {
            "step": step,
            "world_size": len(parts),
            "seed": self._seed,
            "precision": self._strategy.precision.state_dict(),
            "ranks": [{name: part[name] for name in ("random", "loaders")} for part in parts],
        }

    def _say_what_is_left_behind(self, step: int) -> None:
        if self._is_sure:
            return
        self._is_sure = True
        later = [entry.step for entry in self._directory.entries() if entry.step > step]
        if later:
            rank_zero_warn(
                f"{os.fspath(self.folder)!r} has checkpoints of later steps than {step}, up to {max(later)}. They stay "
                "there, but `resume` will go on from the one that is being saved now. If this run was to go on from "
                "them, call `resume` before training."
            )

    def _warn_of_metric(self, metrics: Mapping[str, float]) -> None:
        best = self._keep_best
        if best is not None and metrics and best.metric not in metrics:
            rank_zero_warn(
                f"The best checkpoints are to be kept by the metric {best.metric!r}, but `metrics` has "
                f"{sorted(metrics)}. This one cannot be among them."
            )

    def _retain(self) -> None:
        try:
            self._directory.retain()
        except OSError as error:  # what was saved is safe
            rank_zero_warn(f"Old checkpoints could not be deleted: {error}. The next save will try again.")

    # -- reading

    def resume(
        self,
        state: dict[str, Any],
        *,
        strict: bool = True,
        weights_only: bool | None = None,
        verify: bool = True,
    ) -> int | None:
        """Collective: restore everything in ``state`` from the newest good checkpoint, and return its step.

        Damaged ones are passed over; a warning names the file. ``None``: there is no checkpoint.

        On as many ranks as have saved, each gets back its random states and its position in the loaders. On another
        number, ranks that have saved do; others get random states that follow from the seed, the step and their rank,
        and the positions of loaders are converted, as a warning says where they cannot be.

        Args:
            state: objects are restored in place, plain values are replaced in this dict.
            strict: every name of ``state`` must be in the checkpoint, and every parameter of a module.
            weights_only: as for ``fabric.load``.
            verify: compare the checksums of the files; ``False`` compares their sizes alone.

        Raises:
            DamagedCheckpointError: if there are checkpoints, and none is good.
            RuntimeError: if a random state cannot be restored.

        """
        with all_or_none(self._strategy, f"resuming from {os.fspath(self.folder)!r}"):
            _check_state(state, "resume")
            no_plain_loaders(state)
            self._strategy.wait_for_saves()
        if not self.entries():
            return None
        with self._strategy.opened_checkpoint(self.folder, verify) as found:
            path = found if os.fspath(found) != os.fspath(self.folder) else self.entries()[0].path
            step = _step_in(Path(path))
            loaders = _loaders(state)
            values = {key: None if key in loaders else value for key, value in state.items()}
            rest = self._load(path, values, strict, weights_only=weights_only, verify=False)
        state.update({key: value for key, value in values.items() if key not in loaders})
        self._restore_own_part(rest.get(KEY), loaders, {key: values[key] for key in loaders}, step)
        self._is_sure = True
        return step

    def _restore_own_part(
        self,
        own: Mapping[str, Any] | None,
        loaders: Mapping[str, _FabricDataLoader],
        saved: Mapping[str, Any],
        step: int,
    ) -> None:
        own = self._peers.share(own)
        if own is None:
            rank_zero_warn(
                f"The checkpoint of step {step} was not saved by `fabric.checkpoints(...)`: it has no random states."
            )
        agreed(self._peers, f"resuming step {step}", lambda: self._restore_on_rank(own, loaders, saved))

    def _restore_on_rank(
        self, own: Mapping[str, Any] | None, loaders: Mapping[str, _FabricDataLoader], saved: Mapping[str, Any]
    ) -> None:
        rank = self._peers.rank
        part = own["ranks"][rank] if own is not None and rank < own["world_size"] else None
        for key, loader in loaders.items():
            position = saved[key] if part is None else part["loaders"].get(key, saved[key])
            if position is not None:
                loader.load_state_dict(position)
        if own is None:
            return
        self._seed = own["seed"]
        self._strategy.precision.load_state_dict(own["precision"])
        if part is None:
            seed_for(own["seed"], own["step"], rank)
        else:
            set_random_state(part["random"], rank)

    # -- asking

    @property
    def folder(self) -> Path | str:
        """Where the checkpoints are; a URL as text."""
        return self._directory.folder

    @property
    def latest(self) -> Path | str | None:
        """The path of the checkpoint that was committed last; None if there is none."""
        return self._from_rank_0(self._directory.latest)

    def entries(self) -> list[Entry]:
        """Return the checkpoints that there are, the newest first: step, path, and what the manifest says."""
        return self._from_rank_0(self._directory.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries())

    @property
    def _peers(self) -> Peers:
        return self._strategy._peers()

    def _from_rank_0(self, ask: Callable[[], Any]) -> Any:
        peers = self._peers
        return peers.share(agreed(peers, f"looking into {os.fspath(self.folder)!r}", ask, on_rank_0=True))


def _directory(folder: _PATH, keep_last: int | None, keep_best: Best | None) -> Any:
    if _is_local_file_protocol(folder):
        # wherever the process will be when it saves
        return CheckpointDirectory(_local_path(folder).absolute(), keep_last, keep_best)
    from lightning.fabric.checkpoint.remote import RemoteDirectory

    return RemoteDirectory(str(folder), keep_last, keep_best)


def _best(given: BestLike | None) -> Best | None:
    if given is None or isinstance(given, Best):
        return given
    if isinstance(given, tuple) and len(given) in (2, 3) and isinstance(given[0], str):
        return Best(*given)
    raise TypeError(
        f"`keep_best` is the name of a metric with 'min' or 'max', and perhaps how many to keep, but got {given!r}. "
        "Pass e.g. ('val_loss', 'min') or ('val_loss', 'min', 3)."
    )


def _checked_step(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"`step` must be an integer, but got {step!r}.") from None
    if number < 0:
        raise ValueError(f"`step` must be 0 or more, but got {step!r}.")
    return number


def _checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"`metrics` must be a dict of numbers by name, but got {metrics!r}.")
    numbers = {}
    for name, value in (metrics or {}).items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor of several elements is a RuntimeError
            raise TypeError(
                f"metrics[{name!r}] must be a number or a tensor of one element, but got {value!r}."
            ) from None
    return numbers


def _check_state(state: Any, verb: str) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"`{verb}` needs a dict such as {{'model': model}}, but got {state!r}.")
    if KEY in state:
        raise ValueError(f"The key {KEY!r} of the state is for what the library adds to it. Choose another one.")


def _step_in(path: Path) -> int:
    name = next(part for part in reversed(path.parts) if part.startswith("step-"))
    return int(name.removeprefix("step-"))


def _loaders(state: Mapping[str, Any]) -> dict[str, _FabricDataLoader]:
    return {key: value for key, value in state.items() if isinstance(value, _FabricDataLoader)}


def _part_of_rank(step: int, state: Mapping[str, Any]) -> dict[str, Any]:
    loaders = {key: loader.state_dict() for key, loader in _loaders(state).items()}
    return {"step": step, "random": random_state(), "loaders": loaders}


def _check_agreement(steps: list[int]) -> None:
    if len(set(steps)) > 1:
        raise ValueError(f"All ranks must save the same `step`, but they have {steps}. Count alike on all of them.")
