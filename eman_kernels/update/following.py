"""An update after each optimizer step that is actually taken."""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .state import TeacherState, counter_on_device

# Wrappers whose step() does nothing but call that of their ``optimizer``: by package and name, without an import.
_WRAPPERS = {
    ("accelerate", "AcceleratedOptimizer"),
    ("lightning", "LightningOptimizer"),
    ("lightning", "_FabricOptimizer"),
    ("pytorch_lightning", "LightningOptimizer"),
    ("lightning_fabric", "_FabricOptimizer"),
}
# The function that torch puts around step(), and which runs the hooks.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
# For each optimizer and teacher (or EMANTeachers), the handle of the hook.
_handles: WeakKeyDictionary[Optimizer, WeakKeyDictionary[nn.Module, RemovableHandle]] = WeakKeyDictionary()


def follow_optimizer(
    update: MethodType, state: TeacherState, optimizer: Optimizer, student: nn.Module, every: int, start: int
) -> RemovableHandle:
    """Register update(student, found_inf=...) as a post-step hook, in place of the teacher's hook on this optimizer.

    update: of the teacher, or of several in one pass. state: of the teacher, or of the first of several. A fused
    optimizer reports a skipped step through its ``found_inf`` on the device.
    """
    if every < 1 or start < 0:
        raise ValueError(f"every must be at least 1 and start at least 0, but they are {every} and {start}")
    optimizer = find_hooked_optimizer(optimizer)

    def update_after_step(optimizer: Optimizer, *_: Any) -> None:
        if not _is_inside_another_step(optimizer):
            update(student, found_inf=getattr(optimizer, "found_inf", None))

    counts = every > 1 or start > 0
    hook = _CountingHook(update, state, student, every, start) if counts else update_after_step
    handles, teacher = _handles.setdefault(optimizer, WeakKeyDictionary()), update.__self__
    if teacher in handles:
        handles[teacher].remove()
    handles[teacher] = optimizer.register_step_post_hook(hook)
    return handles[teacher]


def find_hooked_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrappers of accelerate, Lightning and Fabric, which is the one that runs hooks.

    The step of any other wrapper (Lookahead, float32 master weights) writes the student after that of the optimizer
    inside, so the wrapper itself must run the hooks. Raises TypeError if it does not.
    """
    while any((kind.__module__.partition(".")[0], kind.__name__) in _WRAPPERS for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    name = type(optimizer).__name__
    remedy = "Call teacher.update(student) after {} instead"
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"follow(optimizer, student): the first must be a torch.optim.Optimizer, not a {name}. "
            + remedy.format("the optimizer step")
        )
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise TypeError(
            f"{name} is stepped by first_step() and second_step(), after which torch runs no hooks. "
            + remedy.format("second_step()")
        )
    # In vars, because a wrapper may pass attributes on to the optimizer inside.
    if "_optimizer_step_post_hooks" not in vars(optimizer) or not hasattr(type(optimizer).step, "hooked"):
        inside = [key for key in ("original_optimizer", "optimizer", "base_optimizer") if hasattr(optimizer, key)]
        raise TypeError(
            f"{name} has not called Optimizer.__init__, so torch runs no hooks after its step(). "
            + remedy.format("step()")
            + "".join(f", or follow its {key} if step() ends with that one's step()" for key in inside[:1])
        )
    return optimizer


def _is_inside_another_step(optimizer: Optimizer) -> bool:
    """Whether a subclass's step() has called this one by super().step(): torch may run the hooks after both."""
    if torch.compiler.is_compiling():
        from .traced import break_graph

        return break_graph(_is_inside_another_step, optimizer)
    if sum(hasattr(vars(kind).get("step"), "hooked") for kind in type(optimizer).__mro__) < 2:
        return False
    # The calls of torch's function that are in progress, from this hook outwards. torch.compile replaces its code by
    # code with the same name but other variables.
    running, frame = 0, sys._getframe()
    while frame is not None and running < 2:
        code = frame.f_code
        if code.co_name == _HOOKED_STEP.co_name and code.co_filename == _HOOKED_STEP.co_filename:
            running += frame.f_locals.get("self", optimizer) is optimizer
        frame = frame.f_back
    return running == 2


class _CountingHook:
    """The hook if not every step is followed by an update.

    Counts the steps that are taken: on the device, if the optimizer's kernels decide there to skip one.
    """

    def __init__(
        self, update: Callable[..., None], state: TeacherState, student: nn.Module, every: int, start: int
    ) -> None:
        self.update, self.state, self.student = update, state, student
        self.every, self.start = every, start
        self.is_first = True
        if state.optimizer_steps is None:
            state.optimizer_steps = 0

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if _is_inside_another_step(optimizer):
            return
        state = self.state
        if self.is_first:  # not in __init__, because a checkpoint may be loaded after follow()
            self.is_first = False
            if int(state.step):  # resumed training, which has begun to average already
                self.start = 0
        steps = 0 if state.optimizer_steps is None else state.optimizer_steps
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            steps += 1
        else:
            found_inf = found_inf.reshape(())
            steps = counter_on_device(steps, found_inf.device)
            steps += found_inf == 0
        state.optimizer_steps = steps
        is_between_updates = (steps <= self.start) | (steps % self.every != 0)
        if found_inf is not None:
            # On the device, without a synchronization.
            self.update(self.student, found_inf=found_inf + is_between_updates)
        elif not is_between_updates:
            self.update(self.student)
