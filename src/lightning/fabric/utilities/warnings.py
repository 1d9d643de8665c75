"""The category of warnings that may be false alarms, and the switch that turns them off."""

import os
import warnings


class PossibleUserWarning(UserWarning):
    """Something that is often, but not always, a mistake."""


def disable_possible_user_warnings(module: str = "") -> None:
    """Silence every :class:`PossibleUserWarning`, or only those raised in modules that match the regex ``module``.

    The environment variable ``POSSIBLE_USER_WARNINGS=off`` (or ``0``) does the same without a change to the script.
    """
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


if os.environ.get("POSSIBLE_USER_WARNINGS", "").strip().lower() in ("off", "0"):
    disable_possible_user_warnings()
