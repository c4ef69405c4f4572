"""How errors and warnings are reported: all differences in one message, attributed to the user's own line."""

import sys
import warnings
from collections.abc import Iterable

_MAX_LISTED = 20
_OURS = {__package__.partition(".")[0], "torch"}

NOTHING_WRITTEN = "Nothing was written."


def raise_differences(
    differences: Iterable[str],
    remedy: str = "",
    head: str = "the teacher cannot follow the student; nothing was written.",
) -> None:
    """Raises ValueError that lists all differences, if there are any."""
    listed = list(differences)
    if listed:
        hidden = len(listed) - _MAX_LISTED
        listed = listed[:_MAX_LISTED] + [f"and {hidden} more"] * (hidden > 0)
        raise ValueError("\n  ".join([head, *listed]) + f"\n{remedy}".rstrip())


def warn_user(message: str) -> None:
    """Attribute the warning to the first caller outside this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
