"""Images, augmentations, and batches that depend only on (seed, step), so a resumed run sees the same ones."""

import gzip
import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from lightly.transforms import BYOLTransform, MoCoV2Transform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from PIL import Image
from recipes import ByolRecipe, FixMatchRecipe, MocoRecipe, Recipe
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

DEBIAN = Path("usr/share/datasets/fashion-mnist")  # installed by Debian's package
HOW_TO_GET = """Fashion-MNIST was not found in {raw} or {debian}. Get it with one of these commands:
  apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb {root}      (Debian, Ubuntu)
  python -c 'import torchvision; torchvision.datasets.FashionMNIST("{root}", download=True)'    (elsewhere)
Other data sets: --data CIFAR10 (or any class of torchvision.datasets) or --data imagefolder, with --root."""
STATISTICS = {1: ([0.286], [0.353]), 3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}  # by number of channels


@dataclass(frozen=True)
class Images:
    """A data set of PIL images and labels; unlabeled images have the label -1."""

    name: str
    train: Dataset
    test: Dataset
    train_labels: Tensor
    test_labels: Tensor
    classes: int
    channels: int

    @property
    def normalize(self) -> dict[str, list[float]]:
        mean, std = STATISTICS[self.channels]
        return {"mean": mean, "std": std}

    def labelled(self, per_class: int, seed: int) -> list[int]:
        """Indices of the training images whose labels may be used: `per_class` of each class, drawn with the seed."""
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for label in range(self.classes):
            where = (self.train_labels == label).nonzero().flatten()
            if len(where) < per_class:
                raise ValueError(
                    f"class {label} has only {len(where)} images, but {per_class} labels per class were requested"
                )
            chosen += where[torch.randperm(len(where), generator=generator)[:per_class]].tolist()
        return chosen


def load(name: str = "FashionMNIST", root: str | Path = "data") -> Images:
    """Load a data set by its name in torchvision.datasets, or "imagefolder" (root/train and root/val, as in ImageNet).

    Raises:
        FileNotFoundError: it is not in the root folder; the message tells how to get it.
        ValueError: torchvision has no such data set, or the data set has no separate training part.
    """
    root = Path(root)
    if name.lower() == "imagefolder":
        missing = [str(root / part) for part in ("train", "val") if not (root / part).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"{' and '.join(missing)} not found: --root must contain train/ and val/, with one folder per class"
            )
        return make_images(name, *(torchvision.datasets.ImageFolder(str(root / part)) for part in ("train", "val")))
    cls = getattr(torchvision.datasets, name, None)
    if cls is None:
        raise ValueError(f"torchvision.datasets has no {name!r}; for a folder of images: --data imagefolder")
    if name == "FashionMNIST":
        unpack_debian(root)
    parts = inspect.signature(cls).parameters
    if "train" in parts:
        arguments: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    elif "split" in parts:
        arguments = [{"split": "train+unlabeled" if name == "STL10" else "train"}, {"split": "test"}]
    else:
        raise ValueError(f"torchvision.datasets.{name} is not divided into training and test images")
    try:
        return make_images(name, *(cls(str(root), **argument) for argument in arguments))
    except (RuntimeError, FileNotFoundError) as error:
        if name == "FashionMNIST":
            how = HOW_TO_GET.format(raw=root / name / "raw", debian=f"/{DEBIAN}", root=root)
        else:
            how = f"{error}\npython -c 'import torchvision; torchvision.datasets.{name}(\"{root}\", download=True)'"
        raise FileNotFoundError(how) from None


def make_images(name: str, train: Dataset, test: Dataset) -> Images:
    labels = [torch.as_tensor(np.asarray(_labels(part)), dtype=torch.int64) for part in (train, test)]
    channels = 1 if train[0][0].mode == "L" else 3
    return Images(name, train, test, *labels, classes=int(labels[0].max()) + 1, channels=channels)


def _labels(part: Dataset) -> Sequence[int]:
    for name in ("targets", "labels", "_labels"):
        if hasattr(part, name):
            return getattr(part, name)
    return [part[i][1] for i in range(len(part))]


def unpack_debian(root: Path) -> None:
    """Unpack the files of Debian's package, if installed, to where torchvision looks for them."""
    raw = root / "FashionMNIST" / "raw"
    for source in (root / DEBIAN, Path("/") / DEBIAN):
        if source.is_dir() and not raw.is_dir():
            raw.mkdir(parents=True)
            for packed in source.glob("*-ubyte.gz"):
                with gzip.open(packed) as file, open(raw / packed.stem, "wb") as to:
                    shutil.copyfileobj(file, to)


# ---------------------------------------------------------------- augmentations

Transform = Callable[[Image.Image], Any]


def evaluation_transform(recipe: Recipe, images: Images) -> Transform:
    """Resizing and normalization without random augmentation."""
    tail = [transforms.ToTensor(), transforms.Normalize(**images.normalize)]
    if recipe.crop == "padded":
        return transforms.Compose([transforms.Resize(recipe.size), *tail])
    larger = transforms.Resize(round(recipe.size * 256 / 224))
    return transforms.Compose([larger, transforms.CenterCrop(recipe.size), *tail])


def weak_and_strong(recipe: FixMatchRecipe, images: Images) -> tuple[Transform, Transform]:
    """FixMatch's augmentations: crop and flip; the same plus RandAugment with 2 operations of magnitude 10."""
    if recipe.crop == "padded":
        crop = [transforms.Resize(recipe.size), transforms.RandomCrop(recipe.size, padding=recipe.size // 8)]
    else:
        crop = [transforms.RandomResizedCrop(recipe.size)]
    start = [*crop, transforms.RandomHorizontalFlip()]
    tail = [transforms.ToTensor(), transforms.Normalize(**images.normalize)]
    strong = [*start, transforms.RandAugment(2, 10), *tail, transforms.RandomErasing(recipe.cutout)]
    return transforms.Compose([*start, *tail]), transforms.Compose(strong)


def moco_views(recipe: MocoRecipe, images: Images) -> Transform:
    return MoCoV2Transform(input_size=recipe.size, gaussian_blur=recipe.blur, normalize=images.normalize)


def byol_views(recipe: ByolRecipe, images: Images) -> Transform:
    common = {"input_size": recipe.size, "min_scale": 0.2, "normalize": images.normalize}
    first = BYOLView1Transform(gaussian_blur=recipe.blur, **common)
    second = BYOLView2Transform(gaussian_blur=0.1 * recipe.blur, **common)
    return BYOLTransform(first, second)


# ---------------------------------------------------------------- batches


class Augmented(Dataset):
    """Loads whole batches by (seed, indices): a batch is seeded by itself, so it does not depend on the worker."""

    def __init__(self, images: Dataset, transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: tuple[int | None, list[int]]) -> list[tuple[Any, int]]:
        seed, indices = batch
        if seed is None:
            return [self._one(index) for index in indices]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # lightly uses NumPy's generator
            return [self._one(index) for index in indices]

    def _one(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return self.transform(image), int(label)


@dataclass(frozen=True)
class Order:
    """Which images are in which step: passes over all images, each in a new order, or, with `classes_a_batch`, batches
    that contain only that many classes, drawn for each step."""

    indices: Sequence[int]
    batch: int  # over all processes
    seed: int
    labels: Tensor | None = None
    classes_a_batch: int | None = None

    def at(self, step: int) -> list[int]:
        if self.classes_a_batch is not None:
            return self._of_few_classes(step)
        chosen: list[int] = []
        place = step * self.batch
        while len(chosen) < self.batch:
            turn, begin = divmod(place + len(chosen), len(self.indices))
            order = _permutation(len(self.indices), _mix(self.seed, turn))
            chosen += order[begin : begin + self.batch - len(chosen)].tolist()
        return [self.indices[k] for k in chosen]

    def _of_few_classes(self, step: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, step))
        labels = self.labels[torch.as_tensor(self.indices)]
        present = labels.unique()
        few = present[torch.randperm(len(present), generator=generator)[: self.classes_a_batch]]
        pool = torch.isin(labels, few).nonzero().flatten()
        drawn = pool[torch.randint(len(pool), (self.batch,), generator=generator)]
        return [self.indices[k] for k in drawn.tolist()]


def batches(
    images: Dataset, transform: Transform, order: Order, steps: range, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader:
    """Loader of this process's share of the batch of each step."""

    def plan() -> Iterator[tuple[int, list[int]]]:
        for step in steps:
            yield _mix(order.seed, step) * world + rank, order.at(step)[rank::world]

    class Plan:
        __iter__ = staticmethod(plan)
        __len__ = steps.__len__

    return DataLoader(
        Augmented(images, transform),
        batch_sampler=Plan(),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise it uses torch's global generator, and a resumed run differs
    )


def evaluation_loader(images: Dataset, transform: Transform, indices: Sequence[int], workers: int = 0) -> DataLoader:
    """Loader of these images in order, for evaluation."""
    pieces = [(None, list(indices[k : k + 250])) for k in range(0, len(indices), 250)]
    return DataLoader(Augmented(images, transform), batch_sampler=pieces, num_workers=workers)


@lru_cache(maxsize=4)  # the steps of a pass share a permutation
def _permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _mix(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**40
