"""A teacher and its student with their values exchanged, and exchanged back whatever happened meanwhile."""

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from threading import RLock
from types import TracebackType

import torch
from torch import Tensor, nn

from . import backends, distributed
from .caches import caching_modules, renew
from .interrupts import at_once, holding
from .known import Followed, known_networks
from .pairing import Pair, Rule, check, named_tensors, pair_modules
from .plan import Plan
from .watch import Watch, increment_versions, is_plain


class Turn:
    """Whose turn it is with a teacher's memory: an update's, or an exchange's until it is left."""

    def __init__(self, unrestored: str = "") -> None:
        self.lock = RLock()
        self.exchange: Exchange | None = None
        self.unrestored = unrestored  # what an exchange could not give back

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Turn, (self.unrestored,)  # a copy of the teacher is nobody's


class Exchange:
    """The values of two networks, exchanged from `enter` to `leave`, in one pass and without a temporary.

    It keeps the memory that it exchanged, so that leaving plans nothing and cannot fail, whatever became of the
    networks' tensors: first that memory gets its values back, then what the networks hold instead of it.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        rules: Mapping[str, Rule] | None,
        buffers: Rule,
        backend: str | None,
        turn: Turn,
    ) -> None:
        self._teacher, self._student = teacher, student
        self._options = "swap", tuple(rules.items()) if rules else (), buffers, backends.requested(backend)
        self._turn = turn
        self._swapped: set[int] = set()  # the pieces of work that are done, and not yet undone
        self._watch: Watch | None = None

    def enter(self) -> None:
        """Raises RuntimeError if another exchange has not been left, or ValueError as an update."""
        holding([self._turn.lock], self._enter)

    def leave(self) -> str:
        """Exchange back, if that has not been done. Returns what could not be given back, or nothing."""
        return holding([self._turn.lock], self._leave)

    def own(self, tensor: Tensor) -> Tensor | None:
        """Where this teacher tensor's own value is, while it holds the student's; None if it was not exchanged."""
        own = self._own.get(id(distributed.local(tensor)))
        return own if own is None else distributed.placed_as(tensor, own)

    def _enter(self) -> None:
        if self._turn.exchange is not None:
            raise RuntimeError("the teacher is swapped already")
        try:
            self._turn.exchange = self
            self._find()
            self._run(self._swapped.add, undo=False)
            self._renew()
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> str:
        if self._turn.exchange is not self:
            return ""
        lost = ""
        if self._watch is not None:
            if self._there.look([self._memory]) is None:
                lost = "while teacher and student were swapped, their memory was freed or resized"
            else:
                if self._swapped:
                    self._run(self._swapped.remove, undo=True)
                lost = self._give_back()
            self._renew()
            self._turn.unrestored = lost
        self._turn.exchange = None
        return lost

    def _find(self) -> None:
        networks = [self._teacher, self._student]
        known = known_networks(*networks)
        found = known.find(self._options, networks) or known.find_sharded(self._options, networks)
        if found is None:
            found = _follow(*networks, self._options)
            known.add(found[0])
        followed, self._tensors = found
        names = [named_tensors(network) for network in networks]
        with torch.inference_mode(False):
            # They keep the memory, where .data= or .half() would let it go.
            self._memory = [tensor.detach() for tensor in self._tensors]
        number = {id(tensor): i for i, tensor in enumerate(self._tensors)}
        places = [place for work in followed.plan.works for place in chain(*work.places.values())]
        exchanged = {place.teacher for place in places} | {place.student for place in places}
        self._names = [
            {name: number[id(t)] for name, t in its.items() if number.get(id(distributed.local(t))) in exchanged}
            for its in names
        ]
        self._own = {id(self._tensors[place.teacher]): self._memory[place.student] for place in places}
        self._plan, self._there = followed.plan, Watch([self._memory])
        self._caching = followed.caching
        self._watch = followed.watch

    def _run(self, note: Callable[[int], None], undo: bool) -> None:
        increment_versions(self._memory, self._plan.written)
        for piece, calls in enumerate(self._plan.swaps(self._memory)):
            if (piece in self._swapped) is undo:
                at_once(*calls, partial(note, piece))

    def _give_back(self) -> str:
        """To tensors that the networks hold now, and did not when they were exchanged."""
        networks = [self._teacher, self._student]
        if self._watch.look(networks) is not None:
            return ""
        if distributed.reshard(networks) and self._watch.look(networks) is not None:
            return ""
        lost = []
        for who, network, names in zip(
            ("teacher", "student"), (self._teacher, self._student), self._names, strict=True
        ):
            now = named_tensors(network)
            for name, number in names.items():
                value, tensor = self._memory[number], now.get(name)
                if tensor is None or _same_memory(tensor, value):
                    continue
                if fault := _copy(value, tensor):
                    lost.append(f"the {who}'s {name}: {fault}")
        if not lost:
            return ""
        return "while teacher and student were swapped, tensors were replaced by others that cannot take back what " + (
            "they held:\n  " + "\n  ".join(lost)
        )

    def _renew(self) -> None:
        # Within one autocast context torch keeps the casts of the values before.
        torch.clear_autocast_cache()
        renew(self._caching)


class Swapped:
    """The context manager that ``swapped`` returns. Also left when it is dropped."""

    _exchange: Exchange | None = None  # torch.compile makes, and drops, an object that __init__ has not seen

    def __init__(self, exchange: Callable[[], Exchange]) -> None:
        self._make = exchange

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            from . import in_graph

            return in_graph.outside(self.__enter__)
        self._exchange = self._make()
        self._exchange.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling():
            from . import in_graph

            return in_graph.outside(self.__exit__, kind, error, traceback)
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
        # An interrupt can come before __exit__ has begun. When Python ends, nobody needs the values any more.
        if self._exchange is not None and not sys.is_finalizing():
            self._exchange.leave()


def swapped(
    teacher: nn.Module,
    student: nn.Module,
    *,
    rules: Mapping[str, Rule] | None = None,
    buffers: Rule = "ema",
    backend: str | None = None,
) -> Swapped:
    """Within the context the student holds the teacher's values and the teacher the student's: to evaluate the average
    in the student's place. They are exchanged in one pass without a temporary, and back again on leaving, after an
    exception or an interrupt too. Evaluate in eval mode: BatchNorm in training mode would change the teacher's
    statistics.

    What is given another dtype or is replaced meanwhile (``student.half()``) gets its network's own value back too.

    Args:
        teacher, student: as in ``eman_update_``, and of the same dtypes.
        rules, buffers: tensors whose rule is "skip" or "share" stay where they are.
        backend: as in ``eman_update_``.

    Raises:
        ValueError: as ``eman_update_``, or a dtype differs: it would not come back as it was.
        RuntimeError: on leaving, where a tensor of another shape has taken the place of one that was exchanged.

    >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(teacher.weight), nn.init.ones_(student.weight)
    >>> with swapped(teacher, student):
    ...     student.weight.item()
    0.0
    >>> student.weight.item()
    1.0
    """
    return Swapped(partial(Exchange, teacher, student, rules, buffers, backend, Turn()))


def _follow(teacher: nn.Module, student: nn.Module, options: tuple) -> tuple[Followed, list[Tensor]]:
    _, rules, buffers, backend = options
    watch = Watch([teacher, student])
    tensors = watch.look([teacher, student])
    pairs = [replace(pair, rule="swap", because="") for pair in pair_modules(teacher, student, dict(rules), buffers)]
    check([], _differing(pairs), _REMEDY, head="what is exchanged would not come back as it was; nothing was written.")
    caching = caching_modules(teacher) + caching_modules(student)
    return Followed(options, watch, Plan(pairs, tensors, backend), caching=caching), tensors


_REMEDY = "Evaluate the teacher itself, or give both the same dtype."


def _differing(pairs: list[Pair]) -> list[str]:
    return [
        f"{pair.name}: the teacher is {pair.teacher.dtype}, the student {pair.student.dtype}"
        for pair in pairs
        if pair.teacher.dtype != pair.student.dtype
    ]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if not (is_plain(one) and is_plain(other)):
        return False
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
    )


def _copy(value: Tensor, tensor: Tensor) -> str:
    """Returns why it cannot be done, or nothing."""
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
        return "it holds no data now"
    if tensor.shape != value.shape:
        return f"its shape was {tuple(value.shape)}, and is {tuple(tensor.shape)}"
    try:
        tensor.detach().copy_(value)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return ""
