"""Ctrl-C at any moment: what was written and what is noted of it stay the same thing."""

from collections import deque
from collections.abc import Callable, Iterator
from operator import methodcaller

_call = methodcaller("__call__")
exhaust = deque(maxlen=0).extend  # to its end, keeping nothing


def ready(*calls: Callable[[], object]) -> Iterator[object]:
    """What `exhaust` calls at once. For a `finally`, where a function of ours would begin with a moment for an
    interrupt."""
    return map(_call, calls)


def at_once(*calls: Callable[[], object]) -> None:
    """Call these in turn, without a moment for an interrupt between them; an exception leaves out the rest.

    Python runs the handlers of signals, and raises KeyboardInterrupt, between two bytecodes. There are none here where
    each call is C's own: a function of the extension, of torch or of a dict, bound by functools.partial.
    """
    exhaust(map(_call, calls))
