"""FixMatch: the teacher labels weakly augmented images; the student learns these labels for strongly augmented ones.

Sohn et al., "FixMatch: Simplifying semi-supervised learning with consistency and confidence", 2020; with EMAN: Cai et
al., 2021. Run: python benchmarks/methods/fixmatch.py --teacher eman --recipe small --labels 13
"""

from collections.abc import Iterable
from typing import Any

import torch
from image_data import Images, Order, batches, weak_and_strong
from lightly.transforms.multi_view_transform import MultiViewTransform
from method import Kind, Method, Metrics, network
from recipes import FIXMATCH, FixMatchRecipe
from torch import Tensor
from torch.nn.functional import cross_entropy


class FixMatch(Method):
    recipes = FIXMATCH
    classifies = True

    def __init__(self, recipe: FixMatchRecipe, images: Images, teacher: Kind, steps: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = network(recipe, images.channels, images.classes)
        self.make_teacher(teacher, recipe, steps)

    def forward(self, batch: Any) -> tuple[Tensor, Metrics]:
        (images, labels), unlabelled = batch
        if unlabelled is None:
            return cross_entropy(self.student(images), labels), {}
        (weak, strong), truth = unlabelled
        if self.teacher is None:
            # As published: one joint batch, so all three parts share its BatchNorm statistics.
            logits = self.student(torch.cat([images, weak, strong]))
            judged = logits[len(images) : -len(strong)].detach()
        else:
            logits = self.student(torch.cat([images, strong]))
            judged = self.teacher(weak)
        confidence, pseudo = judged.softmax(dim=1).max(dim=1)
        kept = (confidence >= self.recipe.threshold).float()
        supervised = cross_entropy(logits[: len(images)], labels)
        # The mean is over all unlabeled images, including those below the threshold.
        unsupervised = (cross_entropy(logits[-len(strong) :], pseudo, reduction="none") * kept).mean()
        known = kept * (truth >= 0)
        metrics = {"mask_rate": (kept.sum(), len(kept)), "precision": ((known * (pseudo == truth)).sum(), known.sum())}
        return supervised + self.recipe.unlabelled_weight * unsupervised, metrics

    def after_the_step(self) -> None:
        self.update_teacher()

    @classmethod
    def steps_per_pass(cls, recipe: FixMatchRecipe, images: Images, labelled: list[int]) -> float:
        return (len(images.train_labels) - len(labelled)) / (recipe.batch * recipe.mu)

    @classmethod
    def loader(
        cls,
        recipe: FixMatchRecipe,
        images: Images,
        labelled: list[int],
        seed: int,
        classes_a_batch: int | None,
        **process: Any,
    ) -> Iterable[Any]:
        weak, strong = weak_and_strong(recipe, images)
        with_label = batches(images.train, weak, Order(labelled, recipe.batch, 2 * seed), **process)
        if recipe.unlabelled_weight == 0:
            return ((batch, None) for batch in with_label)
        others = sorted(set(range(len(images.train_labels))) - set(labelled))
        order = Order(others, recipe.batch * recipe.mu, 2 * seed + 1, images.train_labels, classes_a_batch)
        both = batches(images.train, MultiViewTransform([weak, strong]), order, **process)
        return zip(with_label, both, strict=True)


if __name__ == "__main__":
    from training import main

    main(FixMatch)
