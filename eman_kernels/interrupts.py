"""Ctrl-C at any moment: what was written and what is noted of it stay the same thing."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from operator import methodcaller
from threading import RLock
from typing import TypeVar

Result = TypeVar("Result")

_call, _acquire, _release = methodcaller("__call__"), methodcaller("acquire"), methodcaller("release")
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


def holding(locks: Sequence[RLock], action: Callable[..., Result], *args: object) -> Result:
    """Call it while these locks are held. `with lock:` has, from Python 3.14 on, a moment for an interrupt between the
    lock's being taken and the block that gives it back."""
    taken: list[bool] = []
    release = map(_release, compress(locks, taken))  # looks into the list when it is exhausted
    try:
        taken.extend(map(_acquire, locks))
        return action(*args)
    finally:
        exhaust(release)
