"""BatchNorm statistics that are estimated again: torch.optim.swa_utils.update_bn, and wrappers around a teacher.

update_bn resets the statistics, calls train(), sets every momentum to None, and calls the network on the data.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..networks.tensors import is_plain


def find_pending_norms(network: nn.Module, step: int | Tensor) -> list[nn.Module]:
    """The BatchNorms whose momentum tells whether a forward after train() is to estimate the statistics.

    If the momentum of all of them is None already, their statistics must have just been reset in a teacher that has
    been updated: in a new one they may never have been estimated.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
    changing = [norm for norm in norms if norm.momentum is not None]
    if changing or not norms:  # no synchronization in the usual case
        return changing
    return norms if int(step) and all(_has_no_batches(norm.num_batches_tracked) for norm in norms) else []


def will_estimate(pending_norms: list[nn.Module]) -> bool:
    """Whether a forward is to estimate the statistics."""
    return all(norm.momentum is None for norm in pending_norms)


def _has_no_batches(number: Tensor) -> bool:
    return is_plain(number) and not number.is_meta and int(number) == 0
