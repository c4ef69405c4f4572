"""The names of a network's tensors, without the prefixes that wrappers add."""

from collections.abc import Callable, Iterator
from inspect import signature
from itertools import chain

from torch import Tensor, nn

# Name components that wrappers insert. DDP and DataParallel insert "module", which a network may well use itself: it is
# stripped only where every name begins with it.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._orig_mod
        else:
            return module


def check_network(network: object) -> None:
    """Raises TypeError unless it is an nn.Module."""
    if not isinstance(network, nn.Module):
        raise TypeError(
            "teacher and student must be networks (nn.Module), not their parameters() or state_dict(); got a "
            f"{type(network).__name__}"
        )


def iterate_names(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name that they have in the module, as in its state_dict."""
    return chain.from_iterable(map(_iterate_all_names, (module.named_parameters, module.named_buffers)))


def _iterate_all_names(named: Callable[..., Iterator[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """The module's own method may have the signature that torch's had before version 2.0."""
    try:
        return named(remove_duplicate=False)
    except TypeError:
        if "remove_duplicate" in signature(named).parameters:
            raise
        return named()


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, non-persistent ones included, by their names in the unwrapped network.

    Raises ValueError if two different tensors have the same name there.
    """
    tensors: dict[str, Tensor] = {}
    full_names: dict[str, str] = {}
    for full_name, tensor in iterate_names(module):
        name = ".".join(part for part in full_name.split(".") if part not in _WRAPPERS)
        if name in tensors and tensors[name] is not tensor:
            raise ValueError(
                f"{full_names[name]} and {full_name} are two tensors, but both are called {name} once the wrapper's "
                "prefix is stripped; rename one of them. Nothing was written."
            )
        tensors[name], full_names[name] = tensor, full_name
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors
