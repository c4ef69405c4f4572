"""Ours through eman_kernels.integrations: as the libraries in peers.py are used, one line changed."""

from models import tensors_of
from peers import in_averaged_model, in_diffusers, in_lightning
from torch import nn
from updates import OURS, Following, Method


def averaged_model(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.torch import get_eman_multi_avg_fn

    return in_averaged_model(get_eman_multi_avg_fn(momentum), teacher, student)


def timm(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.timm import ModelEman

    ema = ModelEman(teacher, decay=momentum)
    return Following(lambda: ema.update(student), tensors_of(ema.module))


def lightning(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.lightning import EMANWeightAveraging

    return in_lightning(EMANWeightAveraging(momentum=momentum), teacher, student)


def diffusers(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.diffusers import EMANModel

    return in_diffusers(EMANModel, teacher, student, momentum)


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
