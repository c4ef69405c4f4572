"""A checkpoint that does not fit changes nothing: torch itself copies what fits before it refuses the rest."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

if TYPE_CHECKING:
    from .teacher import EMANTeacher


@contextmanager
def all_or_nothing(module: nn.Module, teachers: Iterable["EMANTeacher"]) -> Iterator[None]:
    """Where loading into the module raises, it is as it was, and so are the steps of these teachers in it."""
    was = [(teacher, teacher.step, teacher._turn.unrestored) for teacher in teachers]
    try:
        with _tensors_kept(module):
            yield
    except BaseException:
        for teacher, step, unrestored in was:
            teacher.step, teacher._turn.unrestored = step, unrestored
        raise


@contextmanager
def _tensors_kept(module: nn.Module) -> Iterator[None]:
    """Where loading into the module raises, every tensor is put back with its value. Holds a copy of all until then."""
    held = [(own, dict(own)) for child in module.modules() for own in (child._parameters, child._buffers)]
    tensors = {
        id(t): t for _, own in held for t in own.values() if not isinstance(t, UninitializedTensorMixin | NoneType)
    }
    values = [(t, _version(t), t.detach().clone()) for t in tensors.values()]
    try:
        yield
    except BaseException:
        for own, was in held:
            own.clear()
            own.update(was)
        with torch.no_grad():
            for tensor, version, value in values:
                if _version(tensor) != version or version is None:
                    tensor.copy_(value)
        raise


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
