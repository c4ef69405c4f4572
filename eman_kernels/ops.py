"""``torch.ops.eman_kernels.ema_update_``: ``ema_update_`` as an operator of torch, which a compiled graph can hold.

Its schema says what it writes, so that ``torch.compile`` keeps it in its place between reads and other writes, and
without a copy where inductor finds that none is needed. Registered as it is here, and not by
``torch.library.custom_op``, it leaves torch._dynamo alone, which is slow to import.

>>> teacher = torch.zeros(2)
>>> torch.ops.eman_kernels.ema_update_([teacher], [torch.ones(2)], torch.tensor(0.75))
>>> teacher
tensor([0.2500, 0.2500])
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Nonfinite, Rounding, call_of, check_modes
from .functional import update_lists

# The graph's tensors may not be laid out anew. A CUDA graph of inductor's must leave it out: a plan that is first made
# while a graph is captured would be an error, and inductor calls with other addresses when it captures.
_TAGS = [torch.Tag.needs_fixed_stride_order] + [
    getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)
]

_library = torch.library.Library("eman_kernels", "DEF")
_library.define(
    "ema_update_(Tensor(a!)[] teachers, Tensor[] students, Tensor momentum, *, Tensor? found_inf=None, "
    'Tensor? step=None, Tensor(b!)? skipped=None, bool[]? copied=None, str? backend=None, str rounding="nearest", '
    'int seed=0, str nonfinite="propagate") -> ()',
    tags=_TAGS,
)


def _ema_update_(
    teachers: list[Tensor],
    students: list[Tensor],
    momentum: Tensor,
    *,
    found_inf: Tensor | None = None,
    step: Tensor | None = None,
    skipped: Tensor | None = None,
    copied: Sequence[bool] | None = None,
    backend: str | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    nonfinite: Nonfinite = "propagate",
) -> None:
    check_modes(rounding, seed, step is not None, nonfinite)
    # Whatever the teacher's device, numbers that the host has are numbers of the call.
    call = call_of([_number(momentum)], found_inf, seed, _number(step), skipped)
    update_lists(teachers, students, call, backend, rounding, nonfinite, copied)


def _number(tensor: Tensor | None) -> Tensor | float | int | None:
    return tensor.item() if tensor is not None and tensor.device.type == "cpu" and not tensor.dim() else tensor


def _without_autograd(keys: torch._C.DispatchKeySet, *args: object, **kwargs: object) -> None:
    """Like an optimizer's step: no gradient is recorded, and a teacher that requires grad is no error."""
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.eman_kernels.ema_update_.default(*args, **kwargs)


_library.impl("ema_update_", _ema_update_, "CompositeExplicitAutograd")
_library.impl("ema_update_", _without_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("eman_kernels::ema_update_", lambda *args, **kwargs: None, lib=_library)
