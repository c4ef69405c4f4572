"""MoCo, BYOL and FixMatch follow the publications (teachers, order of events, losses), and runs are reproducible."""

import gzip
import itertools
import json
import math
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

REMEDY = "pip install '.[bench]'"
for package in ("lightly", "matplotlib", "tabulate", "timm", "torchvision", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed: {REMEDY}")

from torchvision.datasets import FakeData  # noqa: E402

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "methods")]
import byol  # noqa: E402
import evaluation  # noqa: E402
import findings  # noqa: E402
import fixmatch  # noqa: E402
import image_data  # noqa: E402
import method  # noqa: E402
import moco  # noqa: E402
import recipes  # noqa: E402
import share  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
import training  # noqa: E402

from eman_kernels import EMANTeacher, schedules  # noqa: E402

CPU = torch.device("cpu")
MAKES = [fixmatch.FixMatch, byol.Byol, moco.Moco]
by_method = pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
STEPS = 6


class Grey(FakeData):
    """`count` images of 10 classes, each class with its own brightness (FakeData would draw random labels)."""

    def __init__(self, count: int) -> None:
        super().__init__(count, (1, 28, 28), num_classes=10)
        self.targets = [index % 10 for index in range(count)]

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        label = self.targets[index]
        return image.convert("L").point(lambda value: value // 8 + 20 * label), label


@pytest.fixture(scope="module")
def images() -> image_data.Images:
    return image_data.make_images("Grey", Grey(400), Grey(100))


def small(make, images: image_data.Images, steps: int = STEPS, **changes):
    """The small recipe, reduced so that a run takes about a second."""
    sizes = {"batch": 8, "warmup": 0.0, "calibration": 0}
    if make is not fixmatch.FixMatch:
        sizes |= {"hidden": 32, "features": 16}
    if make is moco.Moco:
        sizes |= {"queue": 32}
    recipe = replace(make.recipes["small"], **sizes | changes)
    return replace(recipe, epochs=steps / make.steps_per_pass(recipe, images, images.labelled(13, 0)))


def batch_of(make, recipe, images: image_data.Images, step: int = 0):
    loader = make.loader(recipe, images, images.labelled(13, 0), 0, None, steps=range(step, step + 1))
    return next(iter(loader))


# ---------------------------------------------------------------- recipes, data, batches


def test_the_recipes_are_the_published_ones():
    """See Cai et al., 2021, sections 4 and 5, and the published commands."""
    byol_200, moco_200, moco_800 = recipes.BYOL["imagenet-200"], *(recipes.MOCO[f"imagenet-{n}"] for n in (200, 800))
    for one in (byol_200, moco_200, moco_800, *(recipes.FIXMATCH[f"imagenet-{n}"] for n in (100, 300))):
        assert (one.network, one.size, one.crop) == ("resnet50", 224, "resized")
    common = ("epochs", "batch", "lr", "weight_decay", "optimizer", "momentum", "schedule", "decay", "warmup")

    def values(recipe, *more):
        return tuple(getattr(recipe, name) for name in common + more)

    expected = (200, 256, 0.03, 1e-4, "sgd", 0.999, "constant", "cosine", 10, 65536, 0.2)
    assert values(moco_200, "queue", "temperature") == expected
    assert values(moco_800, "queue", "temperature") == (800, *expected[1:])
    assert values(byol_200) == (200, 512, 1.8, 1e-6, "lars", 0.98, "cosine", "cosine", 5)
    expected = (100, 64, 0.03, 1e-4, "sgd", 0.999, "constant", "steps", 5, 5, 10.0, 0.7)
    assert values(recipes.FIXMATCH["imagenet-100"], "mu", "unlabelled_weight", "threshold") == expected
    assert values(recipes.FIXMATCH["imagenet-300"])[::7] == (300, "cosine")


@by_method
def test_the_published_network_is_a_resnet50_and_its_teacher_can_follow(make, images):
    made = make(make.recipes["imagenet-200" if make is not fixmatch.FixMatch else "imagenet-100"], images, "eman", 10)
    assert sum(p.numel() for p in made.student.parameters()) > 23e6
    made.update_teacher()
    assert made.teacher.step == 1


def test_byol_uses_the_published_views(images):
    first, second = image_data.byol_views(recipes.BYOL["imagenet-200"], images).transforms
    found = []
    for view in (first, second):
        steps = {type(step).__name__: step for step in view.transform.transforms}
        crop = steps["RandomResizedCrop"]
        probabilities = steps["GaussianBlur"].prob, steps["RandomSolarization"].prob
        found.append((tuple(crop.size), tuple(crop.scale), *probabilities))
    assert found == [((224, 224), (0.2, 1.0), 1.0, 0.0), ((224, 224), (0.2, 1.0), 0.1, 0.2)]


def write_idx(path: Path, array: np.ndarray) -> None:
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture(scope="module")
def debian(tmp_path_factory) -> Path:
    """A root folder with the files of Debian's package, with 400 and 100 images."""
    root = tmp_path_factory.mktemp("root")
    folder = root / image_data.DEBIAN
    folder.mkdir(parents=True)
    for part, count in (("train", 400), ("t10k", 100)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pictures = np.random.default_rng(0).integers(0, 30, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pictures + 20 * labels[:, None, None])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return root


def test_fashion_mnist_is_read_from_debians_package(debian):
    images = image_data.load("FashionMNIST", debian)
    assert (images.classes, images.channels, len(images.train), len(images.test)) == (10, 1, 400, 100)
    assert images.train_labels.tolist() == [k % 10 for k in range(400)]
    image, label = images.train[13]
    assert label == 3
    assert 60 <= np.asarray(image).min() <= np.asarray(image).max() < 90


def test_the_error_for_missing_data_tells_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"apt-get download dataset-fashion-mnist && dpkg-deb -x(?s:.*)download"
    ):
        image_data.load("FashionMNIST", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"torchvision.datasets.CIFAR10\(.*download=True"):
        image_data.load("CIFAR10", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train and .*val not found.*one folder per class"):
        image_data.load("imagefolder", tmp_path)
    with pytest.raises(ValueError, match="no 'MNISTY'"):
        image_data.load("MNISTY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["byol.py", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^Fashion-MNIST was not found in"):
        training.main(byol.Byol)


def test_an_image_folder_is_read(tmp_path, images):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            images.train[0][0].convert("RGB").save(tmp_path / part / name / "0.png")
    read = image_data.load("imagefolder", tmp_path)
    assert (read.classes, read.channels, read.train_labels.tolist()) == (2, 3, [0, 1])


def test_labels_are_balanced_over_the_classes_and_drawn_with_the_seed(images):
    chosen = images.labelled(13, seed=1)
    assert images.train_labels[chosen].bincount().tolist() == [13] * 10
    assert len(set(chosen)) == 130
    assert chosen == images.labelled(13, seed=1) != images.labelled(13, seed=2)
    with pytest.raises(ValueError, match="class 0 has only 40 images, but 41 labels"):
        images.labelled(41, seed=0)


@pytest.mark.parametrize(("count", "batch"), [(40, 8), (40, 7), (5, 12)])
def test_each_pass_contains_each_image_once(count, batch):
    order = image_data.Order(range(100, 100 + count), batch, seed=3)
    stream = [index for step in range(math.ceil(3 * count / batch)) for index in order.at(step)]
    passes = [stream[k : k + count] for k in (0, count, 2 * count)]
    assert all(sorted(one) == list(range(100, 100 + count)) for one in passes)
    assert passes[0] != passes[1]
    assert all(len(order.at(step)) == batch for step in range(5))


def test_unlabeled_images_are_used_for_training_only(images):
    train = Grey(400)
    train.targets = [label if index < 200 else -1 for index, label in enumerate(train.targets)]
    train.__class__ = type(
        "Partly", (Grey,), {"__getitem__": lambda self, index: (Image.new("L", (28, 28)), self.targets[index])}
    )
    partly = image_data.make_images("partly", train, Grey(100))
    assert partly.classes == 10
    assert max(partly.labelled(13, 0)) < 200
    for make in (fixmatch.FixMatch, byol.Byol):
        record = training.train(make, small(make, partly, 2), partly, training.Run("eman", evaluations=1))
        assert math.isfinite(record["results"]["loss"])


def test_batches_of_few_classes(images):
    order = image_data.Order(range(50, 400), 30, 0, images.train_labels, classes_a_batch=2)
    drawn = [order.at(step) for step in range(20)]
    assert all(len(images.train_labels[one].unique()) == 2 and min(one) >= 50 for one in drawn)
    assert len({tuple(images.train_labels[one].unique().tolist()) for one in drawn}) > 10


def test_a_batch_does_not_depend_on_the_worker_and_is_divided_among_the_processes(images):
    recipe = small(byol.Byol, images, batch=6)
    made, state = {}, torch.get_rng_state()
    for name, options in {"all": {}, "late": {"steps": range(2, 3)}, "workers": {"workers": 2}}.items():
        options = {"steps": range(3)} | options
        made[name] = list(byol.Byol.loader(recipe, images, [], 5, None, **options))[-1]
    (first, second), labels = made["all"]
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not used
    for name in ("late", "workers"):
        assert torch.equal(made[name][0][0], first)
        assert torch.equal(made[name][0][1], second)
    assert not torch.equal(first, second)
    order = image_data.Order(range(400), 6, 5)
    assert labels.tolist() == images.train_labels[order.at(2)].tolist()
    split = [byol.Byol.loader(recipe, images, [], 5, None, steps=range(2, 3), rank=rank, world=2) for rank in (0, 1)]
    shares = [next(iter(loader)) for loader in split]
    assert [share[1].tolist() for share in shares] == [labels[0::2].tolist(), labels[1::2].tolist()]
    same = [
        next(iter(image_data.batches(images.train, byol.byol_views(recipe, images), order, range(1), rank, 2)))
        for order in [image_data.Order([7], 2, 0)]
        for rank in (0, 1)
    ]
    assert not torch.equal(same[0][0][0], same[1][0][0])  # the same image, augmented differently


def test_fixmatch_uses_labels_of_the_labeled_images_only(images, monkeypatch):
    seen = []
    monkeypatch.setattr(fixmatch, "batches", lambda images, transform, order, **process: seen.append(order) or [])
    recipe, labelled = small(fixmatch.FixMatch, images), images.labelled(13, 0)
    list(fixmatch.FixMatch.loader(recipe, images, labelled, 0, 2, steps=range(1)))
    with_label, without = seen
    assert (set(with_label.indices), with_label.batch) == (set(labelled), 8)
    assert (set(without.indices), without.batch) == (set(range(400)) - set(labelled), 40)
    assert without.classes_a_batch == 2


# ---------------------------------------------------------------- the teachers


@by_method
def test_the_eman_teachers_output_for_an_image_does_not_depend_on_the_rest_of_the_batch(make, images):
    recipe = small(make, images)
    pictures = torch.randn(8, 1, 28, 28)
    others = torch.cat([pictures[:1], 3 * torch.randn(7, 1, 28, 28) + 1])
    for kind, independent in (("eman", True), ("ema-bn", False)):
        made = make(recipe, images, kind, STEPS).train()
        made.student(pictures)
        made.update_teacher()
        one, other = made.teacher(pictures)[0], made.teacher(others)[0]
        apart = float((one - other).abs().max() / one.abs().max())
        assert (apart < 1e-5) if independent else (apart > 0.05), kind


@by_method
def test_the_averaged_statistics_match_their_closed_form(make, images):
    """After k steps: prod(m) x_0 + sum of (1 - m_i) prod(m_j, j > i) x_i; x_i: the student's statistics in float64."""
    recipe = small(make, images, momentum=0.9, schedule="warm-up")
    made = make(recipe, images, "eman", STEPS).train()
    student, teacher = made.student, made.teacher
    names = [name for name, _ in student.named_buffers() if "running" in name]
    assert len(names) >= 24
    seen = [{name: tensor.double().clone() for name, tensor in student.named_buffers()}]
    momenta = []

    def after_the_update():
        seen.append({name: tensor.double().clone() for name, tensor in student.named_buffers()})
        momenta.append(teacher.momentum(teacher.step - 1))

    update = made.update_teacher
    made.update_teacher = lambda: (update(), after_the_update())
    optimizer = training.make_optimizer(recipe, made)
    for step in range(STEPS):
        loss, _ = made(batch_of(make, recipe, images, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.after_the_step()
    weights = [math.prod(momenta)]
    weights += [(1 - m) * math.prod(momenta[i + 1 :]) for i, m in enumerate(momenta)]
    assert len(weights) == STEPS + 1
    assert sum(weights) == pytest.approx(1)
    for name, tensor in teacher.module.named_buffers():
        if name in names:
            expected = sum(w * x[name] for w, x in zip(weights, seen, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, dict(student.named_buffers())[name])


@by_method
def test_the_statistics_of_the_ema_bn_teacher_come_from_its_own_batches(make, images):
    made = make(small(make, images), images, "ema-bn", STEPS).train()
    before = {name: tensor.clone() for name, tensor in made.teacher.module.named_buffers()}
    made.student(torch.randn(8, 1, 28, 28))
    made.update_teacher()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.teacher.module.named_buffers())
    made.teacher(torch.randn(8, 1, 28, 28))
    assert not any(
        torch.equal(tensor, before[name]) for name, tensor in made.teacher.module.named_buffers() if "running" in name
    )


EVENTS = {
    ("FixMatch", "eman"): ["student 48", "teacher 40", "optimizer", "update"],
    ("FixMatch", "ema-bn"): ["student 48", "teacher 40", "optimizer", "update"],
    ("FixMatch", "bn"): ["student 88", "optimizer", "update"],
    ("Byol", "eman"): ["student 8", "student 8", "teacher 8", "teacher 8", "optimizer", "update"],
    ("Byol", "ema-bn"): ["student 8", "student 8", "teacher 8", "teacher 8", "optimizer", "update"],
    ("Byol", "bn"): ["student 8", "student 8", "optimizer", "update"],
    ("Moco", "eman"): ["student 8", "update", "teacher 8", "optimizer"],
    ("Moco", "ema-bn"): ["student 8", "update", "shuffle", "teacher 8", "optimizer"],
    ("Moco", "bn"): ["student 8", "update", "shuffle", "student 8", "optimizer"],
}


@pytest.mark.parametrize("kind", method.KINDS)
@by_method
def test_the_order_of_events_is_as_published(make, kind, images, monkeypatch):
    events = []

    class Spied(make):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for who in ("student", "teacher"):
                if net := getattr(self, who):
                    net.register_forward_pre_hook(lambda _, x, who=who: events.append(f"{who} {len(x[0])}"))

        def update_teacher(self):
            events.append("update")
            super().update_teacher()

    shuffle = moco.batch_shuffle
    monkeypatch.setattr(moco, "batch_shuffle", lambda *of: events.append("shuffle") or shuffle(*of))
    make_optimizer = training.make_optimizer
    monkeypatch.setattr(training, "make_optimizer", lambda *of: spy_on(make_optimizer(*of), events))
    monkeypatch.setattr(training, "Evaluation", lambda *of: lambda *of, final: {})
    training.train(Spied, small(make, images, steps=2), images, training.Run(kind, evaluations=1))
    assert events == 2 * EVENTS[make.__name__, kind]


def spy_on(optimizer, events):
    optimizer.register_step_post_hook(lambda *_: events.append("optimizer"))
    return optimizer


def test_byols_predictor_is_not_averaged_and_the_momentum_rises_to_one(images):
    recipe = small(byol.Byol, images)
    made = byol.Byol(recipe, images, "eman", 10)
    assert made.teacher.momentum == schedules.Cosine(0.98, 10)
    assert made.teacher.momentum(0) == pytest.approx(0.98)
    assert made.teacher.momentum(10) == 1
    followed = {name.removeprefix("module.") for name in made.teacher.state_dict() if "extra_state" not in name}
    assert followed == set(made.student.state_dict())
    learned = {id(p) for group in training.make_optimizer(recipe, made).param_groups for p in group["params"]}
    assert learned == {id(p) for p in [*made.student.parameters(), *made.predictor.parameters()]}


def test_lars_does_not_adapt_batchnorm_and_biases(images):
    recipe = small(byol.Byol, images)
    made = byol.Byol(recipe, images, "eman", 10)
    groups = training.make_optimizer(recipe, made).param_groups
    left = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    norms = [
        m
        for net in (made.student, made.predictor)
        for m in net.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    expected = {id(p) for norm in norms for p in norm.parameters()}
    expected |= {
        id(p) for net in (made.student, made.predictor) for n, p in net.named_parameters() if n.endswith("bias")
    }
    assert left == expected


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("kind", ["bn", "eman"])
def test_fixmatchs_loss_and_its_metrics(kind, images):
    """Compared with a computation element by element from the logits."""
    recipe = small(fixmatch.FixMatch, images, threshold=0.15)
    made = fixmatch.FixMatch(recipe, images, kind, STEPS).train()
    with torch.no_grad():
        for net in made.backbones().values():
            net.fc.weight.mul_(20 if kind == "eman" else 1)
    ((labelled, labels), ((weak, strong), truth)) = batch = batch_of(fixmatch.FixMatch, recipe, images)
    truth[:10] = -1  # images without labels
    if kind == "bn":
        logits = made.student(torch.cat([labelled, strong, weak])).detach().double().log_softmax(1)
        judged = logits[48:].exp()
    else:
        logits = made.student(torch.cat([labelled, strong])).detach().double().log_softmax(1)
        judged = made.teacher(weak).double().softmax(1)
    expected = sum(-logits[i, labels[i]] for i in range(8)) / 8
    used, right, known = 0, 0, 0
    for i in range(40):
        if judged[i].max() >= 0.15:
            used += 1
            known += i >= 10
            right += bool(judged[i].argmax() == truth[i])
            expected += recipe.unlabelled_weight * -logits[8 + i, judged[i].argmax()] / 40
    assert 0 < known < used < 40
    loss, metrics = made(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert {name: (int(a), int(b)) for name, (a, b) in metrics.items()} == {
        "mask_rate": (used, 40),
        "precision": (right, known),
    }


def test_without_unlabelled_weight_fixmatch_is_supervised(images):
    recipe = small(fixmatch.FixMatch, images, unlabelled_weight=0.0)
    made = fixmatch.FixMatch(recipe, images, "bn", STEPS).train()
    (pictures, labels), nothing = batch = batch_of(fixmatch.FixMatch, recipe, images)
    assert nothing is None
    loss, metrics = made(batch)
    assert not metrics
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(made.student(pictures), labels).item(), rel=1e-4)


def test_byols_loss_is_the_squared_distance_of_unit_vectors(images):
    made = byol.Byol(small(byol.Byol, images), images, "eman", STEPS).train()
    (first, second), _ = batch = batch_of(byol.Byol, small(byol.Byol, images), images)

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    targets = [unit(made.teacher(view)) for view in (first, second)]
    loss, _ = made(batch)
    predicted = [unit(made.predictor(made.student(view))) for view in (first, second)]
    apart = (predicted[0] - targets[1]).square().sum(1) + (predicted[1] - targets[0]).square().sum(1)
    assert loss.item() == pytest.approx(apart.mean().item(), rel=1e-4)


def test_mocos_keys_enter_the_queue_after_the_loss_is_computed(images):
    recipe = small(moco.Moco, images)
    made = moco.Moco(recipe, images, "eman", STEPS).train()
    queue = made.loss.memory_bank.bank.clone()
    (query, key), _ = batch = batch_of(moco.Moco, recipe, images)
    loss, _ = made(batch)
    keys = nn.functional.normalize(made.teacher(key))
    queries = nn.functional.normalize(made.student(query))
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / recipe.temperature
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[:, 0].mean().item(), rel=1e-4)
    torch.testing.assert_close(made.loss.memory_bank.bank[:8], keys)
    assert torch.equal(made.loss.memory_bank.bank[8:], queue[8:])


@pytest.mark.parametrize("kind", method.KINDS)
def test_each_key_belongs_to_its_image_after_shuffling(kind, images):
    made = moco.Moco(small(moco.Moco, images), images, kind, STEPS).train()
    pictures = torch.randn(8, 1, 28, 28)
    keys = made.keys(pictures)
    expected = (made.student if kind == "bn" else made.teacher)(pictures).detach()
    torch.testing.assert_close(keys, expected, rtol=1e-3, atol=1e-5)


def test_the_learning_rate_rises_and_falls():
    recipe = recipes.FixMatchRecipe(warmup=2, decay="steps")
    at = [training.learning_rate(recipe, step, 100, 10.0) for step in range(100)]
    assert at[0] == pytest.approx(1 / 20)
    assert at[19:60] == [1.0] * 41
    assert at[60:] == pytest.approx([0.1] * 20 + [0.01] * 20)
    recipe = replace(recipe, decay="cosine", warmup=0)
    at = [training.learning_rate(recipe, step, 100, 10.0) for step in range(101)]
    assert at[::25] == pytest.approx([1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4, 0])


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "make",
    [fixmatch.FixMatch, *(pytest.param(make, marks=pytest.mark.slow) for make in (byol.Byol, moco.Moco))],
    ids=lambda make: make.__name__,
)
def test_an_interrupted_run_gives_the_same_numbers(make, images, tmp_path):
    recipe = small(make, images)

    def run(path: Path, kind: str = "ema-bn") -> training.Run:
        return training.Run(kind, seed=3, evaluations=3, checkpoint=path)

    class Broken(make):
        def after_the_step(self):
            super().after_the_step()
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == STEPS - 1:
                raise KeyboardInterrupt

    Broken.__name__ = make.__name__
    whole = training.train(make, recipe, images, run(tmp_path / "whole.pt"))
    with pytest.raises(KeyboardInterrupt):
        training.train(Broken, recipe, images, run(tmp_path / "cut.pt"))
    assert torch.load(tmp_path / "cut.pt")["step"] == 4
    resumed = training.train(make, recipe, images, run(tmp_path / "cut.pt"))
    assert resumed["curve"] == whole["curve"]
    assert [point["step"] for point in whole["curve"]] == [2, 4, 6]
    ends = [torch.load(tmp_path / f"{name}.pt")["method"] for name in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(ValueError, match="checkpoint of another run: teacher was ema-bn"):
        training.train(make, recipe, images, run(tmp_path / "cut.pt", "eman"))


@pytest.mark.parametrize("kind", method.KINDS)
@by_method
def test_calibration_changes_only_the_statistics(make, kind, images):
    recipe = small(make, images)
    made = make(recipe, images, kind, STEPS).train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items() if "extra_state" not in name}
    loader = make.loader(recipe, images, images.labelled(13, 0), 0, None, steps=range(-4, 0))
    training.calibrate(made, loader)
    for name, tensor in made.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert not torch.equal(tensor, before[name]), name
        elif "extra_state" not in name:
            assert torch.equal(tensor, before[name]), name
    if made.teacher is not None:
        assert made.teacher.step == 0
        student = made.student.state_dict()
        assert all(torch.equal(tensor, student[name]) for name, tensor in made.teacher.module.state_dict().items())


def test_a_nonfinite_loss_ends_the_run(images):
    with pytest.raises(FloatingPointError, match="in the steps before 3: lower --lr"):
        training.train(
            fixmatch.FixMatch, small(fixmatch.FixMatch, images, lr=1e30), images, training.Run("bn", evaluations=2)
        )


def test_a_run_can_start_from_the_backbone_of_another_run(images, tmp_path):
    path = tmp_path / "moco.pt"
    training.train(moco.Moco, small(moco.Moco, images), images, training.Run("eman", checkpoint=path, evaluations=1))
    trained = torch.load(path)["method"]
    made = fixmatch.FixMatch(small(fixmatch.FixMatch, images), images, "eman", 10)
    classifier = made.student.fc.weight.clone()
    training.start_from(path, made)
    for net in (made.student, made.teacher.module):
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, classifier if name == "fc.weight" else trained.get(f"student.0.{name}", tensor))
    assert sum(name.removeprefix("student.0.") in made.student.state_dict() for name in trained) > 80
    other = replace(small(fixmatch.FixMatch, images), network="resnet18")
    with pytest.raises(ValueError, match="the checkpoint is of another network"):
        training.start_from(path, fixmatch.FixMatch(other, images, "eman", 10))


TWO = """
import json, sys, torch
sys.path += sys.argv[1:3]
import test_methods as t
torch.set_num_threads(1)
images = t.image_data.make_images("Grey", t.Grey(400), t.Grey(100))
with t.training.processes() as process:
    for make in t.MAKES:
        for kind in ("eman", "ema-bn"):
            kept = []
            class Kept(make):
                def __init__(self, *of):
                    super().__init__(*of)
                    kept.append(self)
            record = t.training.train(Kept, t.small(make, images), images, t.training.Run(kind, evaluations=1), process)
            name = f"{make.__name__}-{kind}-{process.rank}.pt"
            torch.save((json.dumps(record), dict(kept[0].state_dict())), f"{sys.argv[3]}/{name}")
    # ShuffleBN: a teacher sees images of the other process, and each key returns to its image.
    made = t.moco.Moco(t.small(t.moco.Moco, images), images, "ema-bn", 5).eval()
    mine, seen = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(process.rank)), []
    made.teacher.register_forward_pre_hook(lambda _, x: seen.extend(x[0]))
    keys = made.keys(mine)
    strangers = [x for x in seen if not any(torch.equal(x, one) for one in mine)]
    assert 0 < len(strangers) < 8 == len(seen), len(strangers)
    torch.testing.assert_close(keys, made.teacher(mine))
"""


def test_a_batch_must_be_divisible_by_the_number_of_processes(images):
    recipe = small(byol.Byol, images, batch=7)
    with pytest.raises(ValueError, match="a batch of 7 cannot be divided among 2 processes"):
        training.train(byol.Byol, recipe, images, training.Run("eman"), training.Process(0, 2, CPU))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder with the results of two processes that trained together."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        folder / "two.py",
    ]
    paths = [Path(__file__).parent, BENCHMARKS / "methods", folder]
    told = subprocess.run(
        [*map(str, command), *map(str, paths)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eman", "ema-bn"])
@by_method
def test_two_processes_train_one_student(make, kind, images, two_processes):
    (first, mine), (second, theirs) = (torch.load(two_processes / f"{make.__name__}-{kind}-{r}.pt") for r in (0, 1))
    first, second = json.loads(first), json.loads(second)
    assert first["world"] == second["world"] == 2
    assert math.isfinite(first["results"]["loss"])
    assert first["steps"] == STEPS
    assert not second["curve"]  # only rank 0 evaluates
    learned = [name for name in mine if "running" not in name and "num_batches" not in name]
    assert any("teacher" in name for name in learned)
    assert all(torch.equal(mine[name], theirs[name]) for name in learned)
    if make is moco.Moco:
        queue = mine["loss.memory_bank.bank"]
        assert "loss.memory_bank.bank" in learned
        assert len(queue.unique(dim=0)) == len(queue) == 32  # both processes' keys, each once
    # Each process has seen a different half of the batches, so the student's statistics differ.
    running = [name for name in mine if name.startswith("student") and "running_mean" in name]
    assert not all(torch.equal(mine[name], theirs[name]) for name in running)
    alone = training.train(make, small(make, images), images, training.Run(kind, evaluations=1))
    assert alone["world"] == 1


def test_the_command_line_trains_and_writes_a_record(debian, tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs.jsonl"
    command = ["fixmatch.py", "--root", str(debian), "--out", str(out)]
    command += ["--batch", "4", "--epochs", "0.1", "--threshold", "0.05", "--evaluations", "2", "--teacher", "ema-bn"]
    monkeypatch.setattr(sys, "argv", command)
    training.main(fixmatch.FixMatch)
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["recipe"] == asdict(replace(recipes.FIXMATCH["small"], batch=4, epochs=0.1, threshold=0.05))
    assert (record["method"], record["teacher"], record["labels"], record["seed"]) == ("fixmatch", "ema-bn", 13, 0)
    assert record["steps"] == round(0.1 * (400 - 130) / 20)
    assert record["results"] == json.loads(capsys.readouterr().out)
    wanted = {
        "loss",
        "mask_rate",
        "precision",
        "student_accuracy",
        "teacher_accuracy",
        "weights_apart",
        "statistics_apart",
    }
    assert set(record["results"]) == wanted
    assert {"cpu", "torch", "date", "eman_kernels", "lightly"} <= set(record)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byol", "fixmatch", "moco", "study"])
def test_the_scripts_run_as_programs(name):
    script = BENCHMARKS / "methods" / f"{name}.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--root" in shown.stdout


# ---------------------------------------------------------------- evaluation


def test_linear_probe_and_nearest_neighbors_on_separable_classes():
    centres = 4 * torch.randn(10, 32)
    labels = torch.arange(300) % 10
    scale, shift = 100 * torch.rand(32) + 1, torch.tensor(500.0)  # features may have any scale and offset
    bank, test = (centres[labels] + torch.randn(300, 32) for _ in range(2))
    shuffled = labels[torch.randperm(300)]
    for score in (evaluation.linear_probe, evaluation.nearest_neighbors):
        assert score(bank, labels, test, labels, 10) == 100
        if score is evaluation.linear_probe:
            assert score(scale * bank + shift, labels, scale * test + shift, labels, 10) == 100
        assert score(bank, labels, test, shuffled, 10) < 30
        assert score(bank, shuffled, test, labels, 10) < 40


def test_the_linear_probe_reaches_the_optimum_of_its_loss():
    """Two one-dimensional points, standardized to -a and a: for weights -w and w, 2a sigmoid(-2aw) = w."""
    bank, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    seen = []
    original = torch.optim.LBFGS.step

    def spy(self, closure):
        original(self, closure)
        seen.extend(p.detach().clone() for group in self.param_groups for p in group["params"])

    torch.optim.LBFGS.step, kept = spy, torch.optim.LBFGS.step
    try:
        evaluation.linear_probe(bank, labels, bank, labels, 2)
    finally:
        torch.optim.LBFGS.step = kept
    weight, bias = seen
    a = 1 / math.sqrt(2)
    w = weight[1].item()
    assert weight[0].item() == pytest.approx(-w, abs=1e-4)
    assert bias.abs().max().item() < 1e-4
    assert 2 * a / (1 + math.exp(2 * a * w)) == pytest.approx(w, abs=1e-3)


def test_the_distance_of_a_teacher_from_its_student():
    student = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    teacher = EMANTeacher(student)
    with torch.no_grad():
        for parameter in teacher.module.parameters():
            parameter.mul_(1.5)
        teacher.module[1].running_var.fill_(4)
    apart = evaluation.distance(teacher, student)
    assert apart["weights_apart"] == pytest.approx(0.5)
    # Four variances differ by |4 - 1|, relative to |1|; the means are 0.
    assert apart["statistics_apart"] == pytest.approx(3)


@pytest.mark.parametrize("kind", ["ema-bn", "eman"])
def test_evaluation_uses_eval_mode_and_restores_the_modes(kind, images):
    made = fixmatch.FixMatch(small(fixmatch.FixMatch, images), images, kind, 5).train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items() if tensor.dim()}
    judge = training.Evaluation(small(fixmatch.FixMatch, images), images, training.Run("ema-bn"), CPU)
    found = judge(made, final=True)
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in before.items())
    assert made.student.training
    assert made.teacher.module.training == (kind == "ema-bn")
    with torch.no_grad():
        test = image_data.evaluation_loader(images.test, judge.transform, range(100))
        (pictures, labels), *_ = test
        expected = 100 * (made.student.eval()(pictures).argmax(1) == labels).float().mean().item()
    assert found["student_accuracy"] == pytest.approx(expected)


# ---------------------------------------------------------------- the study


def test_the_study_has_paired_runs_with_every_teacher_and_five_seeds():
    jobs = study.full_study(5)
    assert len({job.key for job in jobs}) == len(jobs)
    for setting, labels in {(job.setting, job.labels) for job in jobs}:
        found = [job for job in jobs if (job.setting, job.labels) == (setting, labels)]
        kinds = {job.teacher for job in found}
        added_later = setting.endswith("other seeds")
        assert kinds == ({"bn"} if "supervised" in setting else {"eman"} if added_later else set(method.KINDS))
        seeds = [200 * added_later + k for k in range(5)]
        assert all(sorted(job.seed for job in found if job.teacher == kind) == seeds for kind in kinds)
    assert {(job.method, job.labels) for job in jobs} >= {("fixmatch", 13), ("fixmatch", 128)}
    keys = {job.key for job in jobs}
    assert all(job.after in keys for job in jobs if job.after)


def test_a_study_skips_finished_runs_and_orders_the_others(tmp_path, monkeypatch):
    """Without processes and training: a job runs after the one whose backbone it starts from."""

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, context, **options):
            super().__init__(1)

    def run_job(job, folder):
        order.append(job.key)
        return {"key": job.key}

    order = []
    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(study, "run_job", run_job)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # run_jobs sets it; this restores it afterwards
    first, other = study.Job("MoCo", "moco", "eman", 0), study.Job("FixMatch", "fixmatch", "eman", 0)
    jobs = [study.Job("FixMatch from MoCo-EMAN", "fixmatch", "eman", 0, after=first.key), first, other]
    results = tmp_path / "results.jsonl"
    training.append(results, {"key": other.key})
    training.append(results, {"key": "a run of another study"})
    arguments = SimpleNamespace(work=tmp_path / "work", jobs=1, data="", root=tmp_path)
    records = study.run_jobs(jobs, results, arguments)
    assert order == [first.key, jobs[0].key]
    assert [record["key"] for record in records] == [other.key, *order]
    assert study.run_jobs(jobs, results, arguments) == records
    assert len(order) == 2, "nothing runs again"


@pytest.mark.slow
def test_a_whole_study_runs_once_and_prints_its_tables(debian, tmp_path, monkeypatch, capsys):
    brief = {"epochs": 0.1, "batch": 2, "calibration": 0}
    first = study.Job("MoCo", "moco", "eman", 0, changes=brief | {"queue": 8})
    jobs = [first, study.Job("FixMatch from MoCo-EMAN", "fixmatch", "eman", 0, changes=brief, after=first.key)]
    monkeypatch.setattr(study, "short_study", lambda: jobs)
    monkeypatch.setattr(study, "shares", lambda *of, rounds: share.shares([fixmatch.FixMatch], of[1], 2))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # run_jobs sets it; this restores it afterwards
    folders = ["--root", str(debian), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["study.py", "--short", "--jobs", "1", *folders])
    study.main()
    lines = (tmp_path / "out" / "methods-short.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [one["key"] for one in records] == [job.key for job in jobs]
    assert records[1]["init"] == str(study.checkpoint_of(first.key, tmp_path / "work"))
    assert records[0]["threads"] == 1
    printed = capsys.readouterr().out
    assert "| FixMatch from MoCo-EMAN" in printed
    assert "FixMatch, published EMAN loop" in printed
    assert (tmp_path / "out" / "methods-short.png").exists()
    monkeypatch.setattr(study, "run_job", None)  # nothing runs again
    study.main()
    assert (tmp_path / "out" / "methods-short.jsonl").read_text().splitlines() == lines
    assert capsys.readouterr().out == printed


def test_the_readme_shows_the_recorded_study():
    results = BENCHMARKS / "results"
    records = [json.loads(line) for line in (results / "methods.jsonl").read_text().splitlines()]
    rows = json.loads((results / "methods-shares.json").read_text())
    readme = (BENCHMARKS / "methods" / "README.md").read_text()
    assert readme == tables.embed(readme, "study.py", findings.block(records, rows, "methods.png"))
    seeds = {(one["setting"], one["labels"], one["teacher"], one["seed"]) for one in records}
    assert len(seeds) == len(records)


def record(setting="FixMatch", teacher="eman", seed=0, accuracy=70.0, method="fixmatch", **more):
    results = {"student_accuracy": accuracy, "precision": 0.5, "mask_rate": 0.25}
    found = {"key": f"{setting}{teacher}{seed}", "setting": setting, "teacher": teacher, "seed": seed, "labels": 13}
    found |= {"method": method, "results": results, "curve": [{"step": 10, **results}], "seconds": 1.0}
    return found | {"data": "fake", "device": "cpu", "cpu": "a cpu", "torch": "2", "date": "today"} | more


def test_the_table_shows_means_deviations_and_paired_differences(tmp_path):
    records = [record(seed=seed, accuracy=70 + 2 * seed) for seed in (0, 1)]
    records += [record(seed=seed, accuracy=60 + 4 * seed, teacher="bn") for seed in (1, 0)]
    records += [record("supervised only", "bn", accuracy=50.0)]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in findings.table(records, "fixmatch").splitlines()
    ]
    assert ["FixMatch", "13", "eman", "2", "71.0 ± 1.4", "", "50.0 ± 0.0", "25.0 ± 0.0", ""] in lines
    assert ["FixMatch", "13", "bn", "2", "62.0 ± 2.8", "", "50.0 ± 0.0", "25.0 ± 0.0", "9.0 ± 1.4"] in lines
    assert ["supervised only", "13", "", "1", "50.0", "", "50.0", "25.0", ""] in lines
    findings.draw(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "63.0" in findings.summary(records)


def test_the_shares_are_measured_for_the_published_loop_too(images, monkeypatch):
    ticks = itertools.count()
    # The clock is read at both ends of a step and of its update.
    monkeypatch.setattr(share, "synchronized_ms", lambda device: next(ticks))
    rows = share.shares([fixmatch.FixMatch], images, rounds=2)
    assert [row["method"] for row in rows] == [share.LOOP, share.OURS]
    for row in rows:
        assert (row["median_ms"], row["step_ms"]) == (1, 3)
        assert row["median_percent"] == pytest.approx(100 / 3)
    ways = [share.Timed(fixmatch.FixMatch, images, loop, CPU, 3) for loop in (True, False)]
    batch = batch_of(fixmatch.FixMatch, fixmatch.FixMatch.recipes["small"], images)
    for way in ways:
        way.step(batch)
        assert any(
            not torch.equal(t, s)
            for t, s in zip(way.method.teacher.module.parameters(), way.method.student.parameters(), strict=True)
        )
