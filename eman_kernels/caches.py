"""Modules that keep, in eval mode, what they have computed from their weights: stale once those are written.

timm's LeViT, TinyViT and EfficientFormer keep attention biases so, and drop or renew them in ``train(mode)``: to 1.0.29
in ``train(True)`` alone.
"""

from collections.abc import Iterable
from functools import partial
from weakref import ref

from torch import nn

from .interrupts import exhaust, ready

# Methods that pass the mode on, as Module's own does, and keep nothing.
_PASS_ON = {"torch.nn.modules.module.Module.train", "transformers.modeling_utils.PreTrainedModel.train"}


def caching_modules(network: nn.Module) -> list[ref[nn.Module]]:
    """Those whose class has a ``train`` of its own. It calls that of the modules in it, so that those are left out."""
    train = type(network).train
    if f"{train.__module__}.{train.__qualname__}" not in _PASS_ON:
        return [ref(network)]
    return [found for child in network.children() for found in caching_modules(child)]


def renew(modules: Iterable[ref[nn.Module]]) -> None:
    """Let them notice, by way of training mode; each is then in the mode that it was in. After an interrupt it can be
    called again."""
    for reference in modules:
        module = reference()
        if module is not None:
            modes = ready(*(partial(vars(each).__setitem__, "training", each.training) for each in module.modules()))
            training = module.training
            try:
                module.train()
                if not training:
                    module.train(False)
            finally:
                exhaust(modes)
