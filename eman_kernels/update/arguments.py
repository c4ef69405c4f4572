"""The arguments of one update, checked as far as possible without a device synchronization."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..backends.interface import Arguments, widest_float
from ..networks.tensors import has_memory, is_distributed, is_plain


def make_arguments(
    momenta: Sequence[float | Tensor],
    found_inf: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    skipped: Tensor | None = None,
) -> Arguments:
    """momenta: one per teacher.

    Raises TypeError or ValueError if a momentum is not a number in [0, 1] or a 0-d float tensor, if the seed is not in
    [0, 2^32), or if another tensor has the wrong shape or dtype.
    """
    if seed:
        check_seed(seed)
    momenta = [check_momentum(momentum) for momentum in momenta]
    for momentum in momenta:
        if type(momentum) is not float:
            momenta = momenta[0] if len(momenta) == 1 else _stack_on_device(momenta)
            break
    if found_inf is not None:
        found_inf = check_found_inf(found_inf)
    if step is None:
        step = 0
    elif isinstance(step, Tensor):
        step = _check_counter("step", step)
    if skipped is not None:
        skipped = _check_counter("skipped", skipped)
    return Arguments(momenta, found_inf, seed, step, skipped)


def check_step(rounding: str, step: object) -> None:
    """Raises ValueError if stochastic rounding lacks the number of the update."""
    if step is None and rounding == "stochastic":
        raise ValueError(
            "rounding='stochastic' needs step=, the number of this update, because each update must draw new random "
            "bits"
        )


def check_seed(seed: int) -> None:
    """Raises ValueError unless the seed of stochastic rounding is in [0, 2^32)."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be in [0, 2^32), but is {seed}")


def check_momentum(momentum: float | Tensor) -> float | Tensor:
    """The momentum as a float or a tensor. Raises TypeError or ValueError unless it is in [0, 1].

    The value of a tensor on a GPU is not checked, because reading it would synchronize with the device.
    """
    if type(momentum) is float and 0.0 <= momentum <= 1.0:
        return momentum
    if isinstance(momentum, Tensor):
        if momentum.dim() or momentum.dtype not in (torch.float32, torch.float64):
            kind = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
            raise TypeError(f"a momentum tensor must be 0-d and float32 or float64, but it is {kind}")
        momentum = _materialize("momentum", momentum)
        if momentum.device.type != "cpu":
            return momentum
    elif not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number in [0, 1] or a 0-d tensor, not a {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], but is {float(momentum)}")
    return momentum if isinstance(momentum, Tensor) else float(momentum)


def check_found_inf(found_inf: Tensor) -> Tensor:
    """found_inf as a 0-d float32 tensor. Raises TypeError or ValueError unless it is a tensor of one element.

    GradScaler's own tensor is returned as it is.
    """
    if not isinstance(found_inf, Tensor):
        raise TypeError(
            "found_inf must be a tensor of one element, or None if no update is to be skipped, but it is a "
            f"{type(found_inf).__name__}; a disabled GradScaler has no found_inf: omit it"
        )
    if found_inf.numel() != 1:
        raise ValueError(f"found_inf must have one element, but its shape is {tuple(found_inf.shape)}")
    found_inf = _materialize("found_inf", found_inf).detach().reshape(())
    # Compared instead of cast: a number may be too small for float32.
    return found_inf if found_inf.dtype == torch.float32 else (found_inf != 0).float()


def _materialize(name: str, tensor: Tensor) -> Tensor:
    """A tensor whose value is in its memory, where the kernels read it; that of a lazily negated tensor is not.

    A DTensor, such as the gradient norm of FSDP2, is gathered.
    """
    if is_distributed(tensor):
        tensor = tensor.full_tensor()
    if not is_plain(tensor):
        kind = (
            str(type(tensor)) if has_memory(tensor) else "tensor without memory, such as one of torch.func's transforms"
        )
        raise TypeError(f"the {name} must be a plain torch.Tensor, whose memory the kernel reads, not a {kind}")
    return tensor.resolve_conj().resolve_neg()


def _stack_on_device(momenta: list[float | Tensor]) -> Tensor:
    """One tensor on the device of those that are tensors. Numbers are written by the device, without a copy from the
    host, which would synchronize."""
    device = next(momentum.device for momentum in momenta if isinstance(momentum, Tensor))
    like = {"dtype": widest_float(device), "device": device}
    return torch.stack([m.to(like["dtype"]) if isinstance(m, Tensor) else torch.full((), m, **like) for m in momenta])


def _check_counter(name: str, counter: Tensor) -> Tensor:
    if not isinstance(counter, Tensor) or counter.dim() or counter.dtype != torch.int64 or counter.is_neg():
        kind = type(counter).__name__
        if isinstance(counter, Tensor):
            kind = f"{counter.dtype} of shape {tuple(counter.shape)}" + ", lazily negated" * counter.is_neg()
        raise TypeError(f"a {name} tensor must be 0-d and int64, but it is {kind}")
    return _materialize(name, counter)
