"""``fabric run --explain`` and ``--dry-run``: the explanation at the first step of an optimizer, and perhaps the end.

Other programs that start processes ask for it by the variable ``LT_EXPLAIN``: ``1`` or ``dry-run``.
"""

import os
from collections.abc import Callable, Mapping
from multiprocessing import util
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.strategy import Strategy

if TYPE_CHECKING:
    from lightning.fabric.observe.explanation import Explanation

VARIABLE = "LT_EXPLAIN"
_END = "dry run: this would be the first step of an optimizer, so the run ends here"
_WITHOUT_STEP = "no optimizer has taken a step; this is how it was after the last set-up"
_OFF, _ON, _DRY_RUN = ("", "0", "false", "off"), ("1", "true", "on"), "dry-run"


class DryRunIsOver(SystemExit):
    """Ends a rank well, where its first step would be."""

    def __init__(self) -> None:
        super().__init__(0)


class Ended:
    """What a launched function returns in a dry run that has ended it."""


class AtFirstStep:
    """Shows an explanation once: at the first step of any optimizer, or when the process ends without one.

    For the latter, what was set up is looked at after each set-up, as it may be gone in the end.
    """

    def __init__(self, ends_there: bool) -> None:
        self._ends_there = ends_there
        self._is_done = False
        self._latest: Explanation | None = None
        self._process: int | None = None  # whose end is waited for

    @classmethod
    def as_asked(cls, variables: Mapping[str, str]) -> "AtFirstStep | None":
        """Return what ``LT_EXPLAIN`` asks for; None: nothing. ``ValueError`` for a value that it cannot have."""
        given = variables.get(VARIABLE, "").strip().lower()
        if given in _OFF:
            return None
        if given not in (*_ON, _DRY_RUN):
            raise ValueError(f"The environment variable {VARIABLE} must be 1, {_DRY_RUN} or 0, but it is {given!r}.")
        return cls(ends_there=given == _DRY_RUN)

    def wait_for(self, wrapped: Any, explain: "Callable[[], Explanation]", strategy: Strategy) -> None:
        """Come first in the first step of ``wrapped``, an optimizer that was set up."""
        if not self._is_done:
            wrapped.step = _Step(self, wrapped, explain, strategy)

    def has_set_up(self, explanation: "Explanation", strategy: Strategy) -> None:
        """Remember what is set up now, to be shown in the end if nothing steps."""
        if self._is_done:
            return
        self._latest = explanation
        if self._process != os.getpid():
            self._process = os.getpid()
            # unlike `atexit`, this is also run where a process is one of `multiprocessing`
            util.Finalize(None, self._without_step, args=(strategy.is_global_zero,), exitpriority=0)

    def steps(self, explain: "Callable[[], Explanation]", strategy: Strategy) -> None:
        """Show it, and end the process if it is a dry run. All ranks come here, as they do to a step."""
        self._is_done = True
        if strategy.is_global_zero:
            print(f"{explain()}\n", flush=True)
        if self._ends_there:
            if strategy.is_global_zero:
                print(_END, flush=True)
            strategy.barrier("the end of the dry run")  # who leaves early takes the connections of the others along
            raise DryRunIsOver

    def _without_step(self, is_global_zero: bool) -> None:
        if is_global_zero and not self._is_done and os.getpid() == self._process:
            self._is_done = True
            print(f"{self._latest}\n\n{_WITHOUT_STEP}", flush=True)

    def ranks_have_ended(self, result: Any) -> None:
        """In the process that has started all ranks elsewhere: nothing will step here."""
        self._is_done = True
        if isinstance(result, Ended):
            raise DryRunIsOver


class _Step:
    """Stands for the ``step`` of an optimizer until it is called."""

    _wrapped_by_lr_sched = True  # as the step inside says of itself: schedulers leave it alone

    def __init__(
        self, watch: AtFirstStep, optimizer: Any, explain: "Callable[[], Explanation]", strategy: Strategy
    ) -> None:
        self._watch, self._optimizer, self._explain, self._strategy = watch, optimizer, explain, strategy
        self._inside = optimizer.step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._optimizer.step is self:
            self._optimizer.step = self._inside
        if not self._watch._is_done:
            self._watch.steps(self._explain, self._strategy)
        return self._inside(*args, **kwargs)
