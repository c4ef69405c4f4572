"""EMANTeacher: the teacher as a module."""

import copy
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .backends import requested
from .functional import as_momentum, eman_update_
from .pairing import Rule, check_rules, unwrap


class EMANTeacher(nn.Module):
    """A teacher network that follows a student as an exponential moving average, BatchNorm statistics and all.

    A deep copy of the student: in eval mode (``train()`` does not change that), without gradients. Call it like the
    network; ``update(student)`` after the optimizer's step. ``teacher.module`` is the plain network.

    Args:
        student: the network to follow; DDP, DataParallel and torch.compile wrappers are looked through.
        momentum: a number in [0, 1], a 0-d tensor on the teacher's device (read there by the kernel), or a schedule
            ``step -> momentum`` (see eman_kernels.schedules); step counts the updates made, from 0. Default 0.999.
        rules: name patterns (as in fnmatch) and "ema", "copy" or "skip"; the first that matches a name counts.
        buffers: "ema" (EMAN, default), "copy" or "skip", for the buffers that no pattern names.
        backend: one of ``available_backends()``; default: EMAN_KERNELS_BACKEND, else the fastest for the device.
        dtype: the floating-point dtype of the teacher; default: the student's. ``torch.float32`` for a bf16 student:
            a bf16 teacher hardly moves at a high momentum, because its steps are less than half an ulp.

    Raises:
        ValueError: momentum is out of range, or a rule or backend is not known.

    state_dict() holds the network under ``module.`` and the step; training resumes exactly from it.

    >>> student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> teacher = EMANTeacher(student, momentum=0.99)
    >>> teacher.update(student)
    >>> teacher(torch.ones(1, 4)).requires_grad
    False
    """

    def __init__(
        self,
        student: nn.Module,
        momentum: float | Tensor | Callable[[int], float | Tensor] = 0.999,
        *,
        rules: Mapping[str, Rule] | None = None,
        buffers: Rule = "ema",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rules(rules or {}, buffers)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype, and is {dtype}")
        if not callable(momentum):
            as_momentum(momentum)
        requested(backend)
        self.module = copy.deepcopy(unwrap(student)).requires_grad_(False)
        if dtype is not None:
            self.module.to(dtype)
        self.momentum = momentum
        self.rules = dict(rules or {})
        self.buffer_rule = buffers
        self.backend = backend
        self.step = 0
        self._student: ref[nn.Module] | None = None
        self.eval()

    @torch.compiler.disable
    @torch.no_grad()
    def update(self, student: nn.Module | None = None, *, momentum: float | Tensor | None = None) -> None:
        """Follow the student by one step, in place and in one pass; see ``eman_update_`` for what is done and raised.

        Args:
            student: the network to follow; default: the one of the last update.
            momentum: for this update, instead of the teacher's own.
        """
        if student is None:
            student = self._student() if self._student is not None else None
            if student is None:
                raise RuntimeError("no student has been seen yet (or it is gone): call update(student)")
        if momentum is None:
            momentum = self.momentum(self.step) if callable(self.momentum) else self.momentum
        eman_update_(self.module, student, momentum, rules=self.rules, buffers=self.buffer_rule, backend=self.backend)
        self.step += 1
        if self._student is None or self._student() is not student:
            self._student = ref(student)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, without gradients. For gradients to the input, call ``teacher.module``."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "EMANTeacher":
        """Stays in eval mode whatever the mode: the teacher's BatchNorm never normalises with its own batch."""
        return super().train(False)

    def get_extra_state(self) -> Tensor:
        """The step, as a tensor: formats that know nothing else can store it."""
        return torch.tensor(self.step, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled, and a copy has not seen the student.
        return self.__dict__ | {"_student": None}

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, step={self.step}, buffers={self.buffer_rule!r}" + (
            f", rules={self.rules}" if self.rules else ""
        )
