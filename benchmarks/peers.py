"""Public libraries as released, each used as its documentation recommends, with its fastest documented option.

A library that is not installed is skipped, and the table shows the import error.
"""

import copy
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from models import tensors_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from updates import Following, Method, split_tensors


def timm_v2(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from timm.utils import ModelEmaV2

    ema = ModelEmaV2(teacher, decay=momentum)
    return Following(lambda: ema.update(student), tensors_of(ema.module))


def timm_v3(teacher: nn.Module, student: nn.Module, momentum: float, **options: bool) -> Following:
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(teacher, decay=momentum, **options)
    return Following(lambda: ema.update(student), tensors_of(ema.module))


def timm_v3_to_nearest(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from timm.utils import ModelEmaV3

    if "stochastic_rounding" not in signature(ModelEmaV3).parameters:
        raise ImportError("this timm always rounds to nearest; 1.0.31 and newer round stochastically by default")
    return timm_v3(teacher, student, momentum, stochastic_rounding=False)


def torch_averaged_model(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    return follow_with_averaged_model(get_ema_multi_avg_fn(momentum), teacher, student)


def follow_with_averaged_model(multi_avg_fn: Any, teacher: nn.Module, student: nn.Module) -> Following:
    averaged = AveragedModel(teacher, multi_avg_fn=multi_avg_fn, use_buffers=True)
    averaged.update_parameters(teacher)  # the first call copies
    return Following(lambda: averaged.update_parameters(student), tensors_of(averaged.module))


def lightning(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return follow_with_lightning(EMAWeightAveraging(decay=momentum), teacher, student)


def follow_with_lightning(callback: Any, teacher: nn.Module, student: nn.Module) -> Following:
    """Call the callback's hooks in the order in which a Trainer calls them."""
    from lightning.pytorch import LightningModule

    def wrapped(network: nn.Module) -> LightningModule:
        module = LightningModule()
        module.network = network
        return module.to(next(network.parameters()).device)  # .to() sets the module's `device` property

    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.0)
    trainer = SimpleNamespace(global_step=0, optimizers=[optimizer])  # all attributes that the hooks read
    callback.setup(trainer, wrapped(teacher), "fit")
    callback.on_train_start(trainer, wrapped(teacher))

    def after_a_batch(module: LightningModule) -> None:
        optimizer.step()
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, trainer.global_step)

    after_a_batch(wrapped(teacher))  # the first call of Lightning's own callback copies
    followed = wrapped(student)
    return Following(lambda: after_a_batch(followed), tensors_of(callback._average_model.module.network))


def ema_pytorch(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from ema_pytorch import EMA

    # min_value = beta disables the warm-up. coerce_dtype checks each tensor, so use it only for mixed dtypes.
    mixed = next(teacher.parameters()).dtype != next(student.parameters()).dtype
    schedule = {"beta": momentum, "min_value": momentum, "update_after_step": 0, "update_every": 1}
    ema = EMA(student, teacher, **schedule, include_online_model=False, use_foreach=True, coerce_dtype=mixed)
    before = {name: tensor.clone() for name, tensor in tensors_of(teacher).items()}
    ema.update()  # the first call copies
    for name, tensor in tensors_of(teacher).items():
        tensor.copy_(before[name])
    return Following(ema.update, tensors_of(teacher))


def torch_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(teacher.parameters(), decay=momentum, use_num_updates=False)
    shadows = dict(zip(parameter_names(teacher), ema.shadow_params, strict=True))
    return Following(lambda: ema.update(student.parameters()), add_tied_names(teacher, shadows))


def diffusers(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from diffusers.training_utils import EMAModel

    return follow_with_diffusers(EMAModel, teacher, student, momentum)


def follow_with_diffusers(kind: Any, teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    ema = kind(teacher.parameters(), decay=momentum, min_decay=momentum, foreach=True)
    ema.step(copy.deepcopy(teacher).requires_grad_(True).parameters())  # the first call copies
    shadows = dict(zip(parameter_names(teacher), ema.shadow_params, strict=True))
    return Following(lambda: ema.step(student.parameters()), add_tied_names(teacher, shadows))


def lightly(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from lightly.models.utils import update_momentum

    return Following(lambda: update_momentum(student, teacher, momentum), tensors_of(teacher))


def apex(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    try:
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier
    except ImportError as error:
        raise ImportError(
            f"{error}: NVIDIA's apex must be built from source; the apex package on PyPI is a different project"
        ) from None
    averaged, followed, copied, source = split_tensors(teacher, student)
    overflow = torch.zeros(1, dtype=torch.int, device=averaged[0].device)

    def update() -> None:
        lists = [averaged, followed, averaged]
        multi_tensor_applier(amp_C.multi_tensor_axpby, overflow, lists, momentum, 1.0 - momentum, -1)
        if copied:
            torch._foreach_copy_(copied, source)

    return Following(update, tensors_of(teacher), dispatched=False)


def parameter_names(teacher: nn.Module) -> list[str]:
    """The names in the order of parameters(), each tied parameter once."""
    return [name for name, _ in teacher.named_parameters()]


def add_tied_names(teacher: nn.Module, shadows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map all names of each parameter, including tied ones, to its shadow."""
    shadow_of = {id(parameter): shadows[name] for name, parameter in teacher.named_parameters()}
    return {name: shadow_of[id(p)] for name, p in teacher.named_parameters(remove_duplicate=False)}


def peers(dtype: str) -> dict[str, Method]:
    """Name -> method. `claims` lists only what the library's documentation promises."""
    parameters, floats = ("parameters",), ("parameters", "float buffers")
    found = {
        "timm ModelEmaV2": Method(timm_v2, floats),
        "timm ModelEmaV3": Method(timm_v3),
        "torch AveragedModel": Method(torch_averaged_model, floats),
        "lightning EMAWeightAveraging": Method(lightning, floats),
        "ema-pytorch EMA": Method(ema_pytorch, floats),
        "torch-ema": Method(torch_ema, parameters),
        "diffusers EMAModel": Method(diffusers, parameters),
        "lightly update_momentum": Method(lightly, parameters),
        "apex multi_tensor_axpby": Method(apex),
    }
    if dtype == "bfloat16":  # for other dtypes it is the same as timm ModelEmaV3
        found["timm ModelEmaV3, to nearest"] = Method(timm_v3_to_nearest)
    return found
