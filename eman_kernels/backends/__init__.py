"""Who does the work. A backend is a module with

NAME            as it is asked for.
TAKES_TABLE     whether it runs the chunk table (else the tensors themselves).
unavailable(device_type) -> str | None      why it cannot work on such tensors here, and the remedy; None if it can.
run(work, call, tensors) -> None            updates a plan.Work in place, as a plan.Call says, whose tensors lie on the
                                            work's device and are not waited for.
                                            Calls call.counts with its last write, by interrupts.at_once.
swaps(work, tensors) -> iterator            of pieces of the work, done one after another, that exchange the values
                                            of its teachers and students: of each, the C functions to call at_once.

tensors are those of the plan as they are now: what works on tensors finds its own by their numbers in work.places, what
runs the table has its addresses.
"""

import os
from types import ModuleType

import torch

from . import cpu, cuda, foreach, reference, triton

# In the order in which auto prefers them.
_BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (cuda, cpu, triton, foreach, reference)}


# os.environ's own dict, where it has one: its get() runs five functions, a tenth of a step on a cold cache.
_environment, _VARIABLE = os.environ, "EMAN_KERNELS_BACKEND"
if isinstance(getattr(os.environ, "_data", None), dict) and hasattr(os.environ, "encodekey"):
    _environment, _VARIABLE = os.environ._data, os.environ.encodekey(_VARIABLE)


def requested(argument: str | None) -> str | None:
    """The backend that the argument or else EMAN_KERNELS_BACKEND asks for; None or "auto": the fastest there is."""
    name = argument
    if not name and _VARIABLE in _environment:
        name = os.environ["EMAN_KERNELS_BACKEND"]
    if name in (None, "", "auto"):
        return None
    if name not in _BACKENDS:
        where = "backend" if argument else "EMAN_KERNELS_BACKEND"
        raise ValueError(f"{where}={name!r} is none of auto, {', '.join(_BACKENDS)}")
    return name


def choose(device: torch.device, name: str | None) -> ModuleType:
    """The backend of this name, or the first that can. Raises RuntimeError if the named one cannot."""
    if name is None:
        return next(backend for backend in _BACKENDS.values() if backend.unavailable(device.type) is None)
    if reason := _BACKENDS[name].unavailable(device.type):
        raise RuntimeError(f"backend {name!r} cannot update tensors on {device}: {reason}. Nothing was written.")
    return _BACKENDS[name]


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with the reason why it is not available on this machine, or None where it is.

    >>> available_backends()  # doctest: +ELLIPSIS
    {'cuda': ..., 'cpu': ..., 'triton': ..., 'foreach': None, 'reference': None}
    """
    return {name: backend.unavailable(device_type_of(name)) for name, backend in _BACKENDS.items()}


def device_type_of(name: str) -> str:
    """The type of the tensors that this backend is for, on this machine."""
    if name == "triton" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    return "cuda" if name in ("cuda", "triton") else "cpu"
