"""Several micro-batches as one step, whose gradient is that of the whole batch however it was split."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning.fabric.strategies.strategy import Strategy

Weight: TypeAlias = Callable[[Any], float | Tensor] | Sequence[float | Tensor]
Reduction: TypeAlias = Literal["mean", "sum"]

_FAILED = -1  # sent to the other ranks in place of a number of micro-batches


class Accumulation:
    """Hands out this rank's micro-batches one by one; :meth:`weigh` makes a loss the part of the step that it is.

    Args:
        batches: what is handed out.
        factors: by what the loss of each is multiplied.
        unsynchronised: a context in which backward leaves gradients unsynchronised; entered for all but the last.

    """

    def __init__(
        self,
        batches: Sequence[Any],
        factors: Sequence[float],
        unsynchronised: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._batches = batches
        self._factors = factors
        self._unsynchronised = unsynchronised
        self._factor = 0.0
        self._done = 0
        self._backwards = 0

    def __iter__(self) -> Generator[Any, None, None]:
        last = len(self._batches) - 1
        for index, (batch, factor) in enumerate(zip(self._batches, self._factors, strict=True)):
            self._factor, self._backwards = factor, 0
            with self._unsynchronised() if index < last else nullcontext():
                yield batch
            if not self._backwards:
                raise RuntimeError(
                    f"Micro-batch {index + 1} of {last + 1} went by without `fabric.backward(loss)`, so its gradient "
                    "is missing. Call it in each turn of the loop, in place of `loss.backward()`."
                )
            self._done += 1

    def weigh(self, loss: Tensor) -> Tensor:
        """Return what to differentiate in place of ``loss``."""
        self._backwards += 1
        return loss if self._factor == 1 else loss * self._factor

    def require_end(self) -> None:
        """Raise unless every micro-batch was gone through."""
        if self._done < len(self._batches):
            raise RuntimeError(
                f"`fabric.accumulate` was left after {self._done} of {len(self._batches)} micro-batches, so gradients "
                "are incomplete and differ from rank to rank. Loop over all of what it gives, without `break`."
            )


def factors_of(strategy: Strategy, batches: Sequence[Any], weight: Weight | None, reduction: Reduction) -> list[float]:
    """Collective: return by what the loss of each of this rank's micro-batches is to be multiplied.

    Ranks average gradients, so that a rank's loss counts for one part in ``num_replicas``; of the step it is to be the
    part that its weight is of all weights.

    Raises:
        ValueError, TypeError: for weights that are none; on the other ranks ``RuntimeError``.
        RuntimeError: if ranks have different numbers of micro-batches, which would wait for each other for ever.

    """
    error: Exception | None = None
    weights: list[float] = []
    try:
        weights = _weights(batches, weight, reduction)
    except (TypeError, ValueError) as raised:
        error = raised
    replica = (strategy.distributed_sampler_kwargs or {"rank": 0})["rank"]
    count = len(weights) if error is None else _FAILED
    ranks = _of_all_ranks(strategy, [count, math.fsum(weights), replica])
    if error is not None:
        raise error
    total = _agreed_total(ranks)
    scale = strategy.num_replicas / total
    return [scale * (1.0 if reduction == "sum" else part) for part in weights]


def _of_all_ranks(strategy: Strategy, numbers: list[float]) -> list[list[float]]:
    device = strategy.root_device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return strategy.all_gather(torch.tensor(numbers, dtype=dtype, device=device)).reshape(-1, len(numbers)).tolist()


def _agreed_total(ranks: list[list[float]]) -> float:
    """The sum of the weights of all replicas; the ranks of one replica see the same batch, and count once."""
    failed = [rank for rank, (count, _, _) in enumerate(ranks) if count == _FAILED]
    if failed:
        raise RuntimeError(f"`fabric.accumulate` failed on rank {failed[0]}; see its error for the cause.")
    counts = [int(count) for count, _, _ in ranks]
    if len(set(counts)) > 1:
        raise RuntimeError(
            "Every rank needs the same number of micro-batches for a step, because they compute together, but they "
            f"have, from rank 0 on: {', '.join(map(str, counts))}. Give the shorter ones a micro-batch of weight 0, or "
            "drop the incomplete step on all ranks."
        )
    by_replica: dict[float, float] = {}
    for rank, (_, own, replica) in enumerate(ranks):
        if by_replica.setdefault(replica, own) != own:
            raise RuntimeError(
                f"Ranks that compute on the same batch gave different weights: rank {rank} says {own:g} for all its "
                f"micro-batches, another one {by_replica[replica]:g}. Make the weights a function of the batch."
            )
    total = math.fsum(by_replica.values())
    if total == 0:
        raise ValueError("All weights of this step are 0 on every rank, so there is nothing to average. Skip the step.")
    return total


def _weights(batches: Sequence[Any], weight: Weight | None, reduction: Reduction) -> list[float]:
    if reduction not in get_args(Reduction):
        raise ValueError(f"`reduction` must be 'mean' or 'sum', but got {reduction!r}.")
    if not batches:
        raise ValueError("`fabric.accumulate` needs at least one micro-batch, but got none.")
    if weight is None:
        if reduction == "sum":
            raise ValueError(
                "With reduction='sum' the gradient is divided by the sum of the weights, so `weight` is needed, such "
                "as the number of tokens or samples in each micro-batch."
            )
        return [1.0] * len(batches)
    given: Iterable[Any] = [weight(batch) for batch in batches] if callable(weight) else list(weight)
    weights = [float(one) for one in given]
    if len(weights) != len(batches):
        raise ValueError(f"`weight` has {len(weights)} entries for {len(batches)} micro-batches. Give one for each.")
    for one in weights:
        if not (math.isfinite(one) and one >= 0):
            raise ValueError(f"The weight of a micro-batch must be finite and not negative, but got {one!r}.")
    return weights
