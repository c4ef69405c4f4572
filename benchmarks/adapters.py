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

    return follow_with_lightning(EMANWeightAveraging(decay=momentum), teacher, student)


def diffusers(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.diffusers import EMANModel

    return follow_with_diffusers(EMANModel, teacher, student, momentum)


def lightly(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.lightly import update_momentum

    return Following(lambda: update_momentum(student, teacher, momentum), tensors_of(teacher))


def mmengine(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.mmengine import EMANExponentialMovingAverage

    average = EMANExponentialMovingAverage(teacher, momentum=1.0 - momentum)
    average.update_parameters(teacher)  # the first call copies
    return Following(lambda: average.update_parameters(student), tensors_of(average.module))


def ignite(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from ignite.engine import Engine, Events

    from eman_kernels.integrations.ignite import EMANHandler

    handler = EMANHandler(teacher, momentum=1.0 - momentum)
    handler.model = student
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    return Following(lambda: engine.fire_event(Events.ITERATION_COMPLETED), tensors_of(handler.ema_model))


def ultralytics(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    from eman_kernels.integrations.ultralytics import ModelEMAN

    ema = ModelEMAN(teacher, decay=momentum, tau=1e-9)  # without the ramp
    return Following(lambda: ema.update(student), tensors_of(ema.ema))


def adapters() -> dict[str, Method]:
    return {
        f"{OURS} in timm": Method(timm),
        f"{OURS} in torch AveragedModel": Method(averaged_model),
        f"{OURS} in lightning": Method(lightning),
        f"{OURS} in lightly": Method(lightly),
        f"{OURS} in diffusers": Method(diffusers, ("parameters",)),
        f"{OURS} in mmengine": Method(mmengine),
        f"{OURS} in ignite": Method(ignite),
        f"{OURS} in ultralytics": Method(ultralytics),
    }
