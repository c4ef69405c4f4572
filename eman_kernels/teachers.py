"""EMANTeachers: several teachers of one student."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from .call import Nonfinite, Rounding
from .distributed import SyncBuffers
from .follow import follow
from .loading import all_or_nothing
from .pairing import Rule
from .plan import MAX_TEACHERS
from .step import update_locked
from .swap import Swapped
from .teacher import EMANTeacher, Momentum


class Options(TypedDict, total=False):
    """EMANTeacher's, but for what is one teacher's alone: its momentum and its network."""

    rules: Mapping[str, Rule] | None
    buffers: Rule
    backend: str | None
    dtype: torch.dtype | None
    rounding: Rounding
    seed: int
    cast: torch.dtype | None
    nonfinite: Nonfinite
    capturable: bool
    sync_buffers: SyncBuffers


class EMANTeachers(nn.Module):
    """Several teachers of one student, each with a momentum of its own, updated together in one pass that reads the
    student once.

    ``teachers[i]`` is an EMANTeacher; ``teachers(x)`` is the list of their outputs.

    Args:
        student: the network to follow.
        momenta: a momentum, or a schedule, for each teacher; 1 to 8 of them.
        options: those of EMANTeacher from ``rules`` on, for all.

    Raises:
        ValueError: as EMANTeacher, or there are no momenta or more than 8.

    >>> student = nn.Linear(4, 4)
    >>> teachers = EMANTeachers(student, momenta=[0.99, 0.999, 0.9999])
    >>> teachers.update(student)
    >>> [teacher.step for teacher in teachers]
    [1, 1, 1]
    """

    def __init__(self, student: nn.Module, momenta: Sequence[Momentum], **options: Unpack[Options]) -> None:
        super().__init__()
        if not 1 <= len(momenta) <= MAX_TEACHERS:
            raise ValueError(f"momenta must be 1 to {MAX_TEACHERS}, and are {len(momenta)}")
        self.teachers = nn.ModuleList(EMANTeacher(student, momentum, **options) for momentum in momenta)

    def update(self, student: nn.Module | None = None, *, found_inf: Tensor | None = None) -> None:
        """Let all teachers follow the student by one step: ``EMANTeacher.update``, in one pass."""
        if torch.compiler.is_compiling():
            from . import in_graph

            return in_graph.update(list(self.teachers), student, None, found_inf)
        update_locked(list(self.teachers), student, None, found_inf)

    def follow(self, optimizer: Optimizer, student: nn.Module, *, every: int = 1, start: int = 0) -> RemovableHandle:
        """``EMANTeacher.follow`` for all teachers."""
        return follow(self, optimizer, student, every, start)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's, but all or nothing, as an EMANTeacher's."""
        with all_or_nothing(self, self.teachers):
            return super().load_state_dict(state_dict, strict, assign)

    @property
    def skipped(self) -> Tensor | None:
        """With nonfinite="skip": how many elements of the student were."""
        return self.teachers[0].skipped

    def swapped(self, index: int, student: nn.Module | None = None) -> Swapped:
        """``teachers[index].swapped(student)``."""
        return self.teachers[index].swapped(student)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Each teacher's output."""
        return [teacher(*args, **kwargs) for teacher in self.teachers]

    def __getitem__(self, index: int) -> EMANTeacher:
        return self.teachers[index]

    def __len__(self) -> int:
        return len(self.teachers)

    def __iter__(self) -> Iterator[EMANTeacher]:
        return iter(self.teachers)
