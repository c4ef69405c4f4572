"""Modules that cache values derived from their weights in eval mode; an update makes the cache stale.

timm's LeViT, TinyViT and EfficientFormer cache attention biases, and drop or renew them in ``train(mode)``: up to
1.0.29 in ``train(True)`` only.
"""

from collections.abc import Iterable
from functools import partial
from weakref import ref

from torch import nn

from ..backends.interrupts import call_all, prepare_calls

# train() methods that only pass the mode on to child modules, and cache nothing.
_PLAIN_TRAIN = {"torch.nn.modules.module.Module.train", "transformers.modeling_utils.PreTrainedModel.train"}


def find_caching_modules(network: nn.Module) -> list[ref[nn.Module]]:
    """Modules whose class overrides train(). It calls train() of the modules inside, so those are not listed."""
    train = type(network).train
    if f"{train.__module__}.{train.__qualname__}" not in _PLAIN_TRAIN:
        return [ref(network)]
    return [found for child in network.children() for found in find_caching_modules(child)]


def renew_caches(modules: Iterable[ref[nn.Module]]) -> None:
    """Switch the modules to training mode and back, upon which they drop their caches. Safe to repeat after an
    interrupt, which leaves every module in the mode that it was in."""
    for reference in modules:
        module = reference()
        if module is not None:
            restore = prepare_calls(
                *(partial(vars(each).__setitem__, "training", each.training) for each in module.modules())
            )
            training = module.training
            try:
                module.train()
                if not training:
                    module.train(False)
            finally:
                call_all(restore)
