"""The backends, and which one updates which tensors. interface.py defines what a backend provides."""

import torch

from . import cpu, cuda, foreach, reference, triton
from .interface import Backend

# In the order in which `auto` prefers them.
_ALL: tuple[Backend, ...] = (cuda, cpu, triton, foreach, reference)
BACKENDS = {backend.NAME: backend for backend in _ALL}


def choose(device: torch.device, name: str | None) -> Backend:
    """The backend of this name; for None and "auto" the first available one.

    Raises RuntimeError if the named one is not available.
    """
    if name in (None, "auto"):
        return next(backend for backend in BACKENDS.values() if backend.unavailable(device.type) is None)
    if reason := BACKENDS[name].unavailable(device.type):
        raise RuntimeError(f"backend {name!r} cannot update tensors on {device}: {reason}. Nothing was written.")
    return BACKENDS[name]


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with the reason why it is not available on this machine, or None if it is.

    >>> available_backends()  # doctest: +ELLIPSIS
    {'cuda': ..., 'cpu': ..., 'triton': ..., 'foreach': None, 'reference': None}
    """
    return {name: backend.unavailable(device_type_of(name)) for name, backend in BACKENDS.items()}


def device_type_of(name: str) -> str:
    """The type of device that this backend works on, on this machine."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "triton" and accelerator is not None:
        return accelerator.type
    return "cuda" if name in ("cuda", "triton") else "cpu"
