"""Evaluation of a network: accuracy, linear probe, nearest neighbors, and the teacher's distance from the student."""

from collections.abc import Iterable
from typing import Any

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from eman_kernels import EMANTeacher


@torch.no_grad()
def outputs(
    networks: dict[str, nn.Module], loader: Iterable[Any], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs of each network in eval mode for all images, and the labels."""
    modes = {name: net.training for name, net in networks.items()}
    for net in networks.values():
        net.eval()
    made: dict[str, list[Tensor]] = {name: [] for name in networks}
    labels = []
    for images, label in loader:
        images = images.to(device)
        labels.append(label)
        for name, net in networks.items():
            made[name].append(net(images))
    for name, net in networks.items():
        net.train(modes[name])
    return {name: torch.cat(pieces) for name, pieces in made.items()}, torch.cat(labels).to(device)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (logits.argmax(dim=1) == labels).float().mean().item()


def linear_probe(bank: Tensor, bank_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """Accuracy, in percent, of logistic regression on standardized features, with an L2 penalty of 1 / (2 n)."""
    mean, std = bank.mean(dim=0), bank.std(dim=0).clamp_min(1e-6)
    bank, test = (bank - mean) / std, (test - mean) / std
    layer = nn.Linear(bank.shape[1], classes, device=bank.device)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(layer(bank), bank_labels) + layer.weight.square().sum() / (2 * len(bank))
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return accuracy(layer(test), test_labels)


def nearest_neighbors(
    bank: Tensor, bank_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, k: int = 20
) -> float:
    """Accuracy, in percent, of a weighted vote of the k nearest neighbors by cosine (Wu et al., 2018)."""
    bank, right = normalize(bank).T, 0
    for piece, labels in zip(normalize(test).split(500), test_labels.split(500), strict=True):
        predicted = knn_predict(piece, bank, bank_labels, classes, knn_k=min(k, bank.shape[1]))[:, 0]
        right += int((predicted == labels).sum())
    return 100 * right / len(test)


@torch.no_grad()
def distance(teacher: EMANTeacher, student: nn.Module) -> dict[str, float]:
    """The teacher's distance from its student, relative to the student: of weights and of running statistics."""
    found = {}
    for what, of in (("weights", nn.Module.named_parameters), ("statistics", nn.Module.named_buffers)):
        mine, theirs = dict(of(teacher.module)), dict(of(student))
        names = [name for name, tensor in theirs.items() if tensor.is_floating_point()]
        apart = sum((mine[name] - theirs[name]).square().sum() for name in names)
        found[f"{what}_apart"] = float((apart / sum(theirs[name].square().sum() for name in names)).sqrt())
    return found
