"""Swapping: a teacher and its student with their values exchanged, and exchanged back whatever happens meanwhile."""

import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.interrupts import call_all, prepare_calls, uninterrupted
from ..networks.errors import raise_differences
from ..networks.guards import Guards, increment_versions
from ..networks.names import iterate_names, named_tensors
from ..networks.pairing import pair_modules
from ..networks.sharding import reshard
from ..networks.tensors import local_part, memory_key, placed_like
from ..options import Options
from ..plan.cache import CachedPlan, Found, cache_of_networks
from ..plan.plan import Plan
from .caching import find_caching_modules, renew_caches
from .locks import TeacherLock, hold_locks


class Exchange:
    """The values of two networks, exchanged from `enter` to `leave` in one pass and without a temporary.

    It keeps the memory that it exchanged alive. So `leave` needs no new plan and cannot fail, whatever the networks
    hold by then: first that memory gets its values back, then any tensors that have replaced it.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, options: Options, lock: TeacherLock) -> None:
        self._teacher, self._student = teacher, student
        # A swap moves values as they are: how updates round them makes no difference to its plan.
        self._options = Options(options.rules, options.buffers, options.backend)
        self._lock = lock
        self._exchanged_pieces: set[int] = set()  # pieces of work that are done and not yet undone
        self._guards: Guards | None = None

    def enter(self) -> None:
        """Raises RuntimeError if another exchange has not been left, or ValueError like an update."""
        hold_locks([self._lock.lock], self._enter_locked)

    def leave(self) -> str:
        """Exchange back, if that has not been done. Returns what could not be given back, or an empty string."""
        return hold_locks([self._lock.lock], self._leave_locked)

    def save_own_values(self, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `save`, a state_dict() of the teacher, which meanwhile holds copies of its own values.

        So any hook reads them, under whatever name it saves them. There is one copy per tensor, which keeps ties.
        """
        return hold_locks([self._lock.lock], self._save_locked, save)

    def copy_teacher(self) -> nn.Module:
        """A deep copy of the teacher's network with its own values."""
        copied = deepcopy(self._teacher)
        for (_, tensor), (_, copy) in zip(iterate_names(self._teacher), iterate_names(copied), strict=True):
            if (own := self._find_own_value(tensor)) is not None:
                copy.detach().copy_(own)
        return copied

    def _find_own_value(self, tensor: Tensor) -> Tensor | None:
        """Where this teacher tensor's value is while it holds the student's; None if it was not exchanged."""
        own = self._own_values.get(id(local_part(tensor)))
        return own if own is None else placed_like(tensor, own)

    def _save_locked(self, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self._lock.exchange is not self:
            return save()
        reshard([self._teacher])
        copies: dict[int, Tensor] = {}
        replaced = []
        for module in self._teacher.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    own = None if tensor is None else self._find_own_value(tensor)
                    if own is not None:
                        replaced.append((held, name, tensor))
                        if id(tensor) not in copies:
                            copies[id(tensor)] = own.clone()
        restore = prepare_calls(*(partial(held.__setitem__, name, tensor) for held, name, tensor in replaced))
        try:
            for held, name, tensor in replaced:
                held[name] = copies[id(tensor)]
            return save()
        finally:
            call_all(restore)

    def _enter_locked(self) -> None:
        if self._lock.exchange is not None:
            raise RuntimeError("the teacher is swapped already")
        try:
            self._lock.exchange = self
            self._find_plan()
            self._run_pieces(self._exchanged_pieces.add, undo=False)
            self._invalidate_caches()
        except BaseException:
            self._leave_locked()
            raise

    def _leave_locked(self) -> str:
        if self._lock.exchange is not self:
            return ""
        lost = ""
        if self._guards is not None:
            if self._memory_guards.check([self._memory]) is None:
                lost = "while teacher and student were swapped, their memory was freed or resized"
            else:
                if self._exchanged_pieces:
                    self._run_pieces(self._exchanged_pieces.remove, undo=True)
                lost = self._restore_replaced_tensors()
            self._invalidate_caches()
            self._lock.unrestored = lost
        self._lock.exchange = None
        return lost

    def _find_plan(self) -> None:
        networks = [self._teacher, self._student]
        cached, self._tensors = cache_of_networks(*networks).find_or_make(
            ("swap", self._options), networks, _plan_swap, *networks, self._options
        )
        with torch.inference_mode(False):
            # Detached tensors keep the memory alive, which .data = ... or .half() would free.
            self._memory = [tensor.detach() for tensor in self._tensors]
        index_of = {id(tensor): i for i, tensor in enumerate(self._tensors)}
        places = [place for _, work in cached.plan.works for place in chain(*work.places.values())]
        exchanged = {place.teacher for place in places} | {place.student for place in places}
        # For each network, the exchanged tensors' indices by name, to find what has replaced them.
        self._names = [
            {name: index_of[id(t)] for name, t in its.items() if index_of.get(id(local_part(t))) in exchanged}
            for its in map(named_tensors, networks)
        ]
        self._own_values = {id(self._tensors[place.teacher]): self._memory[place.student] for place in places}
        self._plan, self._memory_guards = cached.plan, Guards([self._memory])
        self._caching = cached.caching
        self._guards = cached.guards  # last: from here on, leaving has something to do

    def _run_pieces(self, record: Callable[[int], None], undo: bool) -> None:
        increment_versions(self._memory, self._plan.written)
        for piece, calls in enumerate(self._plan.swaps(self._memory)):
            if (piece in self._exchanged_pieces) is undo:
                uninterrupted(*calls, partial(record, piece))

    def _restore_replaced_tensors(self) -> str:
        """Copy the values into tensors that the networks hold now and did not hold when they were exchanged."""
        networks = [self._teacher, self._student]
        if self._guards.check(networks) is not None:
            return ""
        if reshard(networks) and self._guards.check(networks) is not None:
            return ""
        lost = []
        for who, network, names in zip(("teacher", "student"), networks, self._names, strict=True):
            held = named_tensors(network)
            for name, index in names.items():
                value, tensor = self._memory[index], held.get(name)
                if tensor is None or memory_key(tensor) == memory_key(value):
                    continue
                if fault := _copy_if_possible(value, tensor):
                    lost.append(f"the {who}'s {name}: {fault}")
        if not lost:
            return ""
        return "while teacher and student were swapped, tensors were replaced by others that cannot take back the " + (
            "values:\n  " + "\n  ".join(lost)
        )

    def _invalidate_caches(self) -> None:
        # Within one autocast context torch keeps the casts of the previous values.
        torch.clear_autocast_cache()
        renew_caches(self._caching)


class Swapped:
    """The context manager that ``swapped`` returns. Also left when it is garbage collected."""

    _exchange: Exchange | None = None  # torch.compile creates, and drops, an object without calling __init__

    def __init__(self, make_exchange: Callable[[], Exchange]) -> None:
        self._make_exchange = make_exchange

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            from .traced import break_graph

            return break_graph(self.__enter__)
        self._exchange = self._make_exchange()
        self._exchange.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling():
            from .traced import break_graph

            return break_graph(self.__exit__, kind, error, traceback)
        try:
            lost = self._exchange.leave()
        except BaseException:
            self._exchange.leave()
            raise
        if lost and error is None:
            raise RuntimeError(lost)
        if lost:
            warnings.warn(lost, stacklevel=2)

    def __del__(self) -> None:
        # An interrupt can come before __exit__ has begun. When Python exits, the values are not needed any more.
        if self._exchange is not None and not sys.is_finalizing():
            self._exchange.leave()


def _plan_swap(teacher: nn.Module, student: nn.Module, options: Options) -> Found:
    guards = Guards([teacher, student])
    tensors = guards.check([teacher, student])
    pairs = [replace(pair, rule="swap", because="") for pair in pair_modules(teacher, student, options)]
    raise_differences(
        (
            f"{pair.name}: the teacher is {pair.teacher.dtype}, the student {pair.student.dtype}"
            for pair in pairs
            if pair.teacher.dtype != pair.student.dtype
        ),
        "Evaluate the teacher itself, or give both the same dtype.",
        head="exchanged values would not come back unchanged; nothing was written.",
    )
    caching = find_caching_modules(teacher) + find_caching_modules(student)
    return CachedPlan(("swap", options), guards, Plan(pairs, tensors, options), caching=caching), tensors


def _copy_if_possible(value: Tensor, tensor: Tensor) -> str:
    """Returns why the value cannot be copied, or an empty string."""
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
        return "it holds no data now"
    if tensor.shape != value.shape:
        return f"its shape was {tuple(value.shape)} and is now {tuple(tensor.shape)}"
    try:
        tensor.detach().copy_(value)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return ""
