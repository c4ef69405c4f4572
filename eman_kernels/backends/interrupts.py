"""Sequences of calls that a KeyboardInterrupt (Ctrl-C) cannot split.

Python runs signal handlers, and raises KeyboardInterrupt, only between two bytecodes. No bytecode runs between the
calls here, as long as each is a C function: of the extension, of torch or of a dict, bound by functools.partial.
"""

from collections import deque
from collections.abc import Callable, Iterator
from operator import methodcaller

_call = methodcaller("__call__")

# Takes an iterator and runs it to its end, without keeping the results.
_discarded: deque[object] = deque(maxlen=0)
call_all = _discarded.extend


def prepare_calls(*calls: Callable[[], object]) -> Iterator[object]:
    """Calls to run later with `call_all`. In a `finally` block use these two instead of `uninterrupted`, a Python
    function, which could be interrupted on entry."""
    return map(_call, calls)


def uninterrupted(*calls: Callable[[], object]) -> None:
    """Call these in turn, without an interrupt between them. After an exception the remaining calls are not made."""
    call_all(map(_call, calls))
