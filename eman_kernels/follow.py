"""An update after each real step of an optimizer."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .teacher import EMANTeacher
    from .teachers import EMANTeachers


def follow(
    teacher: "EMANTeacher | EMANTeachers", optimizer: Optimizer, student: nn.Module, every: int, start: int
) -> RemovableHandle:
    """EMANTeacher.follow and EMANTeachers.follow."""
    if every < 1 or start < 0:
        raise ValueError(f"every must be at least 1 and start at least 0, and they are {every} and {start}")
    inner = _unwrap(optimizer)
    if every == 1 and not start:

        def update(optimizer: Optimizer, *_: Any) -> None:
            teacher.update(student, found_inf=getattr(optimizer, "found_inf", None))

        return inner.register_step_post_hook(update)
    return inner.register_step_post_hook(_Counting(teacher, student, every, start))


class _Counting:
    """The hook where not every step is followed by an update. The steps that are real are counted where that is known:
    on the device, if the optimizer leaves it to its kernels to skip one."""

    def __init__(self, teacher: "EMANTeacher | EMANTeachers", student: nn.Module, every: int, start: int) -> None:
        self.teacher, self.student = teacher, student
        self.every, self.start = every, start
        self.steps: int | Tensor | None = None

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if self.steps is None:
            first = self.teacher if hasattr(self.teacher, "step") else self.teacher[0]
            # Training that is resumed has begun to average already.
            self.start = 0 if first.step else self.start
            self.steps = 0
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            self.steps += 1
        else:
            self.steps = self.steps + (found_inf.reshape(()) == 0).long()
            found_inf = found_inf.reshape(()) + self._is_between()  # there, so that nothing waits
        if found_inf is not None or not self._is_between():
            self.teacher.update(self.student, found_inf=found_inf)

    def _is_between(self) -> bool | Tensor:
        return (self.steps <= self.start) | (self.steps % self.every != 0)


def _unwrap(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside those of accelerate, Lightning and others: its hooks are the ones that are run."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer) and isinstance(optimizer, Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"follow(optimizer, student): the first must be an optimizer, and is a {type(optimizer).__name__}"
        )
    return optimizer
