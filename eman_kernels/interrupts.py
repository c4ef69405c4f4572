"""Ctrl-C at any moment: what was written and what is noted of it stay the same thing."""

from collections import deque
from collections.abc import Callable
from operator import methodcaller

_call = methodcaller("__call__")
_exhaust = deque(maxlen=0).extend  # which keeps nothing


def at_once(*calls: Callable[[], object]) -> None:
    """Call these in turn, without a moment for an interrupt between them; an exception leaves out the rest.

    Python runs the handlers of signals, and raises KeyboardInterrupt, between two bytecodes. There are none here where
    each call is C's own: a function of the extension, of torch or of a dict, bound by functools.partial.
    """
    _exhaust(map(_call, calls))
