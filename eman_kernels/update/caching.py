"""Modules that cache values derived from their weights in eval mode; any write to the weights makes the cache stale.

timm's LeViT, TinyViT and EfficientFormer cache attention biases, and drop or renew them in ``train(mode)``: up to
1.0.29 in ``train(True)`` only.

FSDP1 caches too: after a forward its root keeps the gathered parameters, and the next forward reads them instead of the
shards that an update writes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode

from ..backends.interrupts import call_all, prepare_calls
from ..networks.tensors import fsdp1_class, storage_key

# train() methods that only pass the mode on to child modules, and cache nothing.
_PLAIN_TRAIN = {"torch.nn.modules.module.Module.train", "transformers.modeling_utils.PreTrainedModel.train"}


def find_caching_modules(network: nn.Module) -> list[ref[nn.Module]]:
    """Modules whose class overrides train(), and those of FSDP1. The former call train() of the modules inside, so
    those are not listed.

    Raises ValueError, and changes nothing, if the train() of one of them writes parameters.
    """
    found = dict(_find_overridden_train(network, ""))
    for name, module in found.items():
        if not isinstance(module, fsdp1_class()) and _writes_parameters(module):
            raise ValueError(
                f"train() of {name or 'the network'} ({type(module).__name__}) changes parameters, so teacher and "
                "student would hold different things under one name. Keep its weights as they are in both modes: "
                "loralib's layers need merge_weights=False. Nothing was written."
            )
    return list(map(ref, found.values()))


def _find_overridden_train(network: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    train = type(network).train
    if isinstance(network, fsdp1_class()):
        yield name, network
    elif f"{train.__module__}.{train.__qualname__}" not in _PLAIN_TRAIN:
        yield name, network
        return
    for key, child in network.named_children():
        yield from _find_overridden_train(child, f"{name}.{key}".lstrip("."))


def renew_caches(modules: Iterable[ref[nn.Module]]) -> None:
    """Switch the modules to training mode and back, upon which they drop their caches. Safe to repeat after an
    interrupt, which leaves every module in the mode that it was in. FSDP1 frees what it has gathered."""
    for reference in modules:
        module = reference()
        if isinstance(module, fsdp1_class()):
            _free_gathered_parameters(module)
        elif module is not None:
            _switch_modes(module, [True] if module.training else [True, False])


def _switch_modes(module: nn.Module, modes: list[bool]) -> None:
    """Call train(mode) for each of these, and leave every module inside in the mode that it was in."""
    restore = prepare_calls(*(partial(vars(each).__setitem__, "training", each.training) for each in module.modules()))
    try:
        for mode in modes:
            module.train(mode)
    finally:
        call_all(restore)


class _ParameterWritten(Exception):
    pass


class _RefuseWrites(TorchDispatchMode):
    """Raises before an operation writes one of these storages, also through ``.data`` and other views."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | (
            kwargs or {}
        )
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = given.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor) and storage_key(tensor) in self._storages:
                        raise _ParameterWritten
        return function(*args, **(kwargs or {}))


def _writes_parameters(module: nn.Module) -> bool:
    """Whether train() writes or replaces parameters. If it does, the module is left as it was."""
    attributes = [(own, dict(own)) for each in module.modules() for own in (vars(each), each._parameters)]
    held = [(parameter, parameter.data, storage_key(parameter)) for parameter in module.parameters()]
    # Ends in the mode that the module was in, so that its caches are those of this mode.
    modes = [False, True] if module.training else [True, False]
    same = False
    refused = {storage for *_, storage in held}
    mode = _RefuseWrites(refused)
    try:
        with mode:
            _switch_modes(module, modes)
        same = [(id(p), storage_key(p)) for p in module.parameters()] == [(id(p), s) for p, _, s in held]
    except _ParameterWritten:
        pass
    finally:  # also after an interrupt, which can keep `with` from removing the mode
        refused.clear()
        if mode in _get_current_dispatch_mode_stack():
            _pop_mode()
        if not same:
            for parameter, data, storage in held:
                if storage_key(parameter) != storage:
                    parameter.data = data
            for own, recorded in attributes:
                own.clear()
                own.update(recorded)
    return not same


@contextmanager
def separate_caches(network: nn.Module, modules: list[ref[nn.Module]]) -> Iterator[None]:
    """For a call of the network with other tensors in place of its own: caches neither enter nor leave this context."""
    if not modules:
        yield
        return
    # As a hook, because train() itself may derive the cache from the tensors that the modules hold then.
    handle = network.register_forward_pre_hook(lambda *_: renew_caches(modules))
    try:
        yield
    finally:
        handle.remove()
        renew_caches(modules)


class CacheGuard:
    """The caching modules of a network, and the versions of their tensors when their caches were last renewed."""

    def __init__(self, network: nn.Module) -> None:
        self.network = ref(network)
        self.modules = find_caching_modules(network)
        self._versions: list[tuple[int, int | None]] | None = None

    def renew_if_stale(self) -> None:
        """Renew the caches if a tensor was written or replaced since, except for writes that torch does not track."""
        if self._versions is None or self._versions != self._current_versions():
            renew_caches(self.modules)
            self._versions = self._current_versions()

    def _current_versions(self) -> list[tuple[int, int | None]]:
        modules = [module for reference in self.modules if (module := reference()) is not None]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return [(id(tensor), None if tensor.is_inference() else tensor._version) for tensor in tensors]


def _free_gathered_parameters(module: nn.Module) -> None:
    handle = vars(module).get("_handle")
    if handle is None or module._is_root is None or not handle.uses_sharded_strategy:
        return  # it has no parameters, has not run yet, or has replicas instead of shards
    # Within summon_full_params the gathered parameters are what was written.
    if handle._training_state.name == "IDLE" and not handle.needs_unshard():
        from torch.distributed.fsdp._runtime_utils import _reshard

        _reshard(module, handle, free_unsharded_flat_param=True)
