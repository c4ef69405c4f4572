"""eman_kernels through its adapters: each library is used as in peers.py, with one line changed."""

from models import tensors_of
from peers import follow_with_averaged_model, follow_with_diffusers, follow_with_lightning
from torch import nn
from updates import OURS, Following, Method


def averaged_model(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.torch import get_eman_multi_avg_fn

    return follow_with_averaged_model(get_eman_multi_avg_fn(momentum), teacher, student)


def timm(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.timm import ModelEman

    ema = ModelEman(teacher, decay=momentum)
    return Following(lambda: ema.update(student), tensors_of(ema.module))


def lightning(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.lightning import EMANWeightAveraging

    return follow_with_lightning(EMANWeightAveraging(momentum=momentum), teacher, student)


def diffusers(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.diffusers import EMANModel

    return follow_with_diffusers(EMANModel, teacher, student, momentum)


def lightly(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.lightly import update_momentum

    return Following(lambda: update_momentum(student, teacher, momentum), tensors_of(teacher))


def adapters() -> dict[str, Method]:
    return {
        f"{OURS} in timm": Method(timm),
        f"{OURS} in torch AveragedModel": Method(averaged_model),
        f"{OURS} in lightning": Method(lightning),
        f"{OURS} in lightly": Method(lightly),
        f"{OURS} in diffusers": Method(diffusers, ("parameters",)),
    }
