"""An update after each optimizer step that is actually taken."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .state import TeacherState


def follow_optimizer(
    update: Callable[..., None], state: TeacherState, optimizer: Optimizer, student: nn.Module, every: int, start: int
) -> RemovableHandle:
    """Register update(student, found_inf=...) as a post-step hook. state: of the teacher, or of the first of several.

    A fused optimizer reports a skipped step through its ``found_inf`` on the device.
    """
    if every < 1 or start < 0:
        raise ValueError(f"every must be at least 1 and start at least 0, but they are {every} and {start}")
    inner = _unwrap_optimizer(optimizer)
    if every == 1 and not start:

        def update_after_step(optimizer: Optimizer, *_: Any) -> None:
            update(student, found_inf=getattr(optimizer, "found_inf", None))

        return inner.register_step_post_hook(update_after_step)
    return inner.register_step_post_hook(_CountingHook(update, state, student, every, start))


class _CountingHook:
    """The hook if not every step is followed by an update.

    Counts the steps that are taken: on the device, if the optimizer's kernels decide there to skip one.
    """

    def __init__(
        self, update: Callable[..., None], state: TeacherState, student: nn.Module, every: int, start: int
    ) -> None:
        self.update, self.state, self.student = update, state, student
        self.every, self.start = every, start
        self.steps: int | Tensor | None = None

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if self.steps is None:
            if int(self.state.step):  # resumed training, which has begun to average already
                self.start = 0
            self.steps = 0
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            self.steps += 1
        else:
            self.steps = self.steps + (found_inf.reshape(()) == 0).long()
            found_inf = found_inf.reshape(()) + self._is_between_updates()  # on the device, without a synchronization
        if found_inf is not None or not self._is_between_updates():
            self.update(self.student, found_inf=found_inf)

    def _is_between_updates(self) -> bool | Tensor:
        return (self.steps <= self.start) | (self.steps % self.every != 0)


def _unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrappers of accelerate, Lightning and others, which is the one that runs hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer) and isinstance(optimizer, Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"follow(optimizer, student): the first must be a torch.optim.Optimizer, not a {type(optimizer).__name__}"
        )
    return optimizer
