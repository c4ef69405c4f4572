"""How errors and warnings are reported: all differences in one message, attributed to the user's own line."""

import sys
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

_MAX_LISTED = 20
_OURS = {__package__.partition(".")[0], "torch"}

NOTHING_WRITTEN = "Nothing was written."

_KEPT = "pass momentum={0}, if {0} is the share of its own value that the teacher keeps"
_TAKEN = "pass momentum=1 - {0}, if {0} is the share that the teacher takes of the student"
# What other libraries call the momentum.
_SYNONYMS = dict.fromkeys(("decay", "ema_decay", "ema_rate", "polyak", "m", "beta"), _KEPT) | {
    "tau": _TAKEN,
    "alpha": f"{_KEPT}; {_TAKEN}",
}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


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


def explain_synonyms(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """For a function with a momentum: if it is given by another name, the TypeError says how the two are related."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except TypeError:
            for name in kwargs:
                if name in _SYNONYMS:
                    raise TypeError(
                        f"{function.__qualname__}() has no {name}=, but a momentum: teacher <- momentum * teacher + "
                        f"(1 - momentum) * student. So {_SYNONYMS[name].format(name)}. (mmengine's momentum is "
                        "1 - momentum.)"
                    ) from None
            raise

    return call
