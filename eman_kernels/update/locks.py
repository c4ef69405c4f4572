"""Exclusive access to a teacher's memory: by one update at a time, or by a swap until it ends."""

from collections.abc import Callable, Sequence
from itertools import compress
from operator import methodcaller
from threading import RLock
from typing import Any, TypeVar

from ..backends.interrupts import call_all

Result = TypeVar("Result")

_acquire, _release = methodcaller("acquire"), methodcaller("release")


class TeacherLock:
    """The lock of one teacher, and the swap that holds its memory, if any. A copied teacher starts unlocked."""

    def __init__(self, unrestored: str = "") -> None:
        self.lock = RLock()
        self.exchange: Any = None
        self.unrestored = unrestored  # what a swap could not give back

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return TeacherLock, (self.unrestored,)

    def check_can_update(self) -> None:
        """Raises RuntimeError while the teacher is swapped, or if a swap could not restore it."""
        if self.exchange is not None:
            raise RuntimeError("the teacher is swapped with its student: update it after the swap has ended")
        if self.unrestored:
            raise RuntimeError(f"{self.unrestored}\nload_state_dict() restores the teacher")


def hold_locks(locks: Sequence[RLock], action: Callable[..., Result], *args: object) -> Result:
    """Call the action while these locks are held.

    Not `with lock:`, because from Python 3.14 on an interrupt can come between the acquisition of the lock and the
    block that releases it. Here both are single calls of C functions.
    """
    acquired: list[bool] = []
    releases = map(_release, compress(locks, acquired))  # lazy: reads the list when it is consumed
    try:
        acquired.extend(map(_acquire, locks))
        return action(*args)
    finally:
        call_all(releases)
