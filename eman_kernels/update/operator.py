"""``torch.ops.eman_kernels.ema_update_``: ``ema_update_`` as a torch operator, which a compiled graph can contain.

Its schema says what it writes, so that ``torch.compile`` keeps it in order between reads and other writes, without
copies that inductor finds unnecessary. It is registered through ``torch.library.Library`` and not through
``torch.library.custom_op``, which would import torch._dynamo, and that is slow.

>>> teacher = torch.zeros(2)
>>> torch.ops.eman_kernels.ema_update_([teacher], [torch.ones(2)], torch.tensor(0.75))
>>> teacher
tensor([0.2500, 0.2500])
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..options import TENSOR_OPTIONS, Options, make_options
from .arguments import check_step, make_arguments
from .eager import update_lists

# Inductor must neither change the layout of the tensors nor capture the operator in a CUDA graph: making a plan during
# a capture is an error, and inductor captures with other addresses than it warms up with.
_TAGS = [torch.Tag.needs_fixed_stride_order] + [
    getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)
]


def _schema_of_options() -> str:
    """The options for tensors as keyword arguments: str? backend=None, str rounding="nearest", ..."""
    defaults = {field.name: field.default for field in fields(Options)}
    return ", ".join(
        f"str? {name}=None" if defaults[name] is None else f'{type(defaults[name]).__name__} {name}="{defaults[name]}"'
        for name in TENSOR_OPTIONS
    )


_library = torch.library.Library("eman_kernels", "DEF")
_library.define(
    "ema_update_(Tensor(a!)[] teachers, Tensor[] students, Tensor momentum, *, Tensor? found_inf=None, "
    f"Tensor? step=None, Tensor(b!)? skipped=None, bool[]? copied=None, int seed=0, {_schema_of_options()}) -> ()",
    tags=_TAGS,
)


def _run_operator(
    teachers: list[Tensor],
    students: list[Tensor],
    momentum: Tensor,
    *,
    found_inf: Tensor | None = None,
    step: Tensor | None = None,
    skipped: Tensor | None = None,
    copied: Sequence[bool] | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    made = make_options(**options)
    check_step(made.rounding, step)
    # Numbers in CPU memory are passed by value, whatever the teacher's device.
    arguments = make_arguments([_read_on_cpu(momentum)], found_inf, seed, _read_on_cpu(step), skipped)
    update_lists(teachers, students, arguments, made, copied)


def _read_on_cpu(tensor: Tensor | None) -> Tensor | float | int | None:
    return tensor.item() if tensor is not None and tensor.device.type == "cpu" and not tensor.dim() else tensor


def _run_below_autograd(keys: torch._C.DispatchKeySet, *args: object, **kwargs: object) -> None:
    """Like an optimizer step: records no gradient, and accepts teachers that require grad."""
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.eman_kernels.ema_update_.default(*args, **kwargs)


_library.impl("ema_update_", _run_operator, "CompositeExplicitAutograd")
_library.impl("ema_update_", _run_below_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("eman_kernels::ema_update_", lambda *args, **kwargs: None, lib=_library)
