"""The interface of a method, the three teachers, and code shared by the self-supervised methods."""

from collections.abc import Iterable
from typing import Any, Literal

import timm
from image_data import Images, Order, Transform, batches
from recipes import Recipe
from torch import Tensor, nn

from eman_kernels import EMANTeacher, schedules

Kind = Literal["bn", "ema-bn", "eman"]
KINDS: tuple[Kind, ...] = ("bn", "ema-bn", "eman")
Metrics = dict[str, tuple[Tensor, Tensor | int]]  # name -> (sum, count)


class BatchNormTeacher(EMANTeacher):
    """ema-bn: weights are averaged, and BatchNorm normalizes with the teacher's own batch."""

    def __init__(self, student: nn.Module, momentum: Any) -> None:
        super().__init__(student, momentum, buffers="skip")

    def train(self, mode: bool = True) -> "BatchNormTeacher":
        return nn.Module.train(self, mode)


class Method(nn.Module):
    """A student, its teacher and a loss: forward(batch) returns the loss of one step and its metrics.

    The teacher follows ``student``. ``teacher`` is None for "bn": the student itself, in batch mode and without
    gradients, is the teacher.
    """

    classifies = False  # whether the student outputs class logits
    sync_batchnorm = False  # whether BatchNorm is synchronized over processes, as published (not with eman)
    student: nn.Module
    teacher: EMANTeacher | None

    def make_teacher(self, kind: Kind, recipe: Recipe, steps: int) -> None:
        """Create the teacher as a copy of the student; call this at the end of __init__."""
        momenta = {
            "constant": recipe.momentum,
            "warm-up": schedules.WarmUp(recipe.momentum),
            "cosine": schedules.Cosine(recipe.momentum, steps),
        }
        make = {"ema-bn": BatchNormTeacher, "eman": EMANTeacher}.get(kind)
        self.teacher = make(self.student, momenta[recipe.schedule]) if make else None

    def update_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.update(self.student)

    def after_the_step(self) -> None:
        """Called after each optimizer step."""

    def backbones(self) -> dict[str, nn.Module]:
        """The networks to evaluate: the student's backbone and, if there is a teacher, the teacher's."""
        networks = {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher.module})
        return {name: net[0] if isinstance(net, nn.Sequential) else net for name, net in networks.items()}

    @classmethod
    def steps_per_pass(cls, recipe: Recipe, images: Images, labelled: list[int]) -> float:
        return len(images.train_labels) / recipe.batch

    @classmethod
    def loader(
        cls,
        recipe: Recipe,
        images: Images,
        labelled: list[int],
        seed: int,
        classes_a_batch: int | None,
        **process: Any,
    ) -> Iterable[Any]:
        """Loader of the batches of the requested steps; for `process`, see image_data.batches."""
        order = Order(range(len(images.train_labels)), recipe.batch, seed, images.train_labels, classes_a_batch)
        return batches(images.train, cls.views(recipe, images), order, **process)

    @staticmethod
    def views(recipe: Any, images: Images) -> Transform:
        """The augmentation that creates two views of an image."""
        raise NotImplementedError


def network(recipe: Recipe, channels: int, classes: int = 0) -> nn.Module:
    """The recipe's network with a classifier for `classes` classes, or without a classifier if that is 0."""
    if recipe.network == "small":  # 0.3 M parameters in 10 layers, for images of some 30 pixels
        net = timm.create_model(
            "resnet10t", in_chans=channels, num_classes=classes, channels=(16, 32, 64, 128), stem_width=8
        )
        net.maxpool = nn.Identity()
        return net
    return timm.create_model(recipe.network, in_chans=channels, num_classes=classes)
