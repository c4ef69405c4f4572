"""Hyperparameters: as published for ResNet-50 on ImageNet, and small ones for two CPU cores.

Each field is also a command-line flag.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Parameters of every method. An epoch is a pass over the unlabeled images, if the method uses any."""

    network: str = "resnet50"  # "small", or any model name of timm
    size: int = 224  # side length of the network's input, in pixels
    crop: Literal["resized", "padded"] = "resized"  # RandomResizedCrop, or a shift by up to 1/8 of the size
    epochs: float = 200
    batch: int = 256  # images per step over all processes; in FixMatch, labeled images
    lr: float = 0.03
    warmup: float = 10  # epochs over which the learning rate rises linearly
    decay: Literal["cosine", "steps"] = "cosine"  # steps: divided by 10 after 60 % and after 80 % of the epochs
    optimizer: Literal["sgd", "lars"] = "sgd"
    weight_decay: float = 1e-4
    momentum: float = 0.999  # the teacher's
    schedule: Literal["constant", "warm-up", "cosine"] = "constant"  # of the teacher's momentum
    calibration: int = 0  # batches before the first step that move the running statistics from (0, 1) to the data's


@dataclass(frozen=True)
class FixMatchRecipe(Recipe):
    mu: int = 5  # unlabeled images per labeled image
    unlabelled_weight: float = 10.0  # lambda; 0: supervised training, unlabeled images are not loaded
    threshold: float = 0.7  # tau: minimum confidence of a pseudo-label
    cutout: float = 0.0  # probability of erasing a rectangle of the strongly augmented image


@dataclass(frozen=True)
class ByolRecipe(Recipe):
    hidden: int = 4096
    features: int = 256
    blur: float = 1.0  # 1: as published, always in the first view, with probability 0.1 in the second; 0: never


@dataclass(frozen=True)
class MocoRecipe(Recipe):
    queue: int = 65536  # keys in the memory bank
    temperature: float = 0.2
    hidden: int = 2048
    features: int = 128
    blur: float = 0.5


FIXMATCH_100 = FixMatchRecipe(epochs=100, batch=64, warmup=5, decay="steps")
BYOL_200 = ByolRecipe(
    batch=512, lr=1.8, warmup=5, optimizer="lars", weight_decay=1e-6, momentum=0.98, schedule="cosine"
)
MOCO_200 = MocoRecipe()

FIXMATCH = {
    "imagenet-100": FIXMATCH_100,
    "imagenet-300": replace(FIXMATCH_100, epochs=300, decay="cosine"),
    "small": replace(
        FIXMATCH_100,
        network="small",
        size=28,
        crop="padded",
        epochs=1.6,
        batch=16,
        warmup=0.1,
        decay="cosine",
        momentum=0.99,
        schedule="warm-up",
        threshold=0.95,
        cutout=0.5,
    ),
}
BYOL = {
    "imagenet-200": BYOL_200,
    "small": replace(
        BYOL_200,
        network="small",
        size=28,
        epochs=1.6,
        batch=128,
        warmup=0.2,
        calibration=50,
        hidden=512,
        features=64,
        blur=0.0,
    ),
}
MOCO = {
    "imagenet-200": MOCO_200,
    "imagenet-800": replace(MOCO_200, epochs=800),
    "small": replace(
        MOCO_200,
        network="small",
        size=28,
        epochs=1.6,
        batch=128,
        lr=0.1,
        warmup=0.2,
        momentum=0.99,
        calibration=50,
        queue=4096,
        temperature=0.1,
        hidden=128,
        features=64,
        blur=0.0,
    ),
}
