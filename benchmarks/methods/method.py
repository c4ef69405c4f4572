"""What a method is, the three teachers, and what the two self-supervised methods share."""

from collections.abc import Iterable
from typing import Any, Literal

import timm
from image_data import Images, Order, Transform, batches
from recipes import Recipe
from torch import Tensor, nn

from eman_kernels import EMANTeacher, schedules

Kind = Literal["bn", "ema-bn", "eman"]
KINDS: tuple[Kind, ...] = ("bn", "ema-bn", "eman")
Metrics = dict[str, tuple[Tensor, Tensor | int]]  # sums, and what they are taken over


class BatchNormTeacher(EMANTeacher):
    """ema-bn: the weights are averaged, and BatchNorm normalises with the teacher's own batch."""

    def __init__(self, student: nn.Module, momentum: Any) -> None:
        super().__init__(student, momentum, buffers="skip")

    def train(self, mode: bool = True) -> "BatchNormTeacher":
        return nn.Module.train(self, mode)


class Method(nn.Module):
    """A student, its teacher and a loss: forward(batch) is the loss of one step, and what else is to be known of it.

    ``student`` is what the teacher follows. ``teacher`` is None for "bn": the student itself, in batch mode and without
    gradients, takes its place.
    """

    classifies = False  # whether the student's outputs are logits of the classes
    sync_batchnorm = False  # whether, as published, a BatchNorm teacher and its student normalise over all processes
    student: nn.Module
    teacher: EMANTeacher | None

    def make_teacher(self, kind: Kind, recipe: Recipe, steps: int) -> None:
        """Last in __init__: the teacher begins as a copy of the student."""
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
        """What follows the optimizer's step."""

    def backbones(self) -> dict[str, nn.Module]:
        """What is evaluated: the student's and, where there is another, the teacher's."""
        networks = {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher.module})
        return {name: net[0] if isinstance(net, nn.Sequential) else net for name, net in networks.items()}

    @classmethod
    def steps_a_pass(cls, recipe: Recipe, images: Images, labelled: list[int]) -> float:
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
        """The batches of the steps asked for; see image_data.batches for `process`."""
        order = Order(range(len(images.train_labels)), recipe.batch, seed, images.train_labels, classes_a_batch)
        return batches(images.train, cls.views(recipe, images), order, **process)

    @staticmethod
    def views(recipe: Any, images: Images) -> Transform:
        """The augmentation that makes two views of an image."""
        raise NotImplementedError


def network(recipe: Recipe, channels: int, classes: int = 0) -> nn.Module:
    """The recipe's, with a classifier for so many classes, or without one: then its output is the features."""
    if recipe.network == "small":  # 0.3 M parameters in 10 layers, for images of some 30 pixels
        net = timm.create_model(
            "resnet10t", in_chans=channels, num_classes=classes, channels=(16, 32, 64, 128), stem_width=8
        )
        net.maxpool = nn.Identity()
        return net
    return timm.create_model(recipe.network, in_chans=channels, num_classes=classes)
