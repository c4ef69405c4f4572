"""MoCo v2: the student distinguishes the teacher's view of the same image from a queue of keys of other images.

Chen et al., "Improved baselines with momentum contrastive learning", 2020; with EMAN: Cai et al., 2021.
Run: python benchmarks/methods/moco.py --teacher eman --recipe small
"""

import torch
from image_data import Images, moco_views
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle
from lightly.utils.dist import world_size
from method import Kind, Method, Metrics, network
from recipes import MOCO, MocoRecipe
from torch import Tensor, nn


class Moco(Method):
    recipes = MOCO
    views = staticmethod(moco_views)

    def __init__(self, recipe: MocoRecipe, images: Images, teacher: Kind, steps: int) -> None:
        super().__init__()
        backbone = network(recipe, images.channels)
        head = MoCoProjectionHead(backbone.num_features, recipe.hidden, recipe.features)
        self.student = nn.Sequential(backbone, head)
        self.loss = NTXentLoss(recipe.temperature, (recipe.queue, recipe.features), gather_distributed=True)
        bank = self.loss.memory_bank
        for name, buffer in list(bank.named_buffers()):
            bank.register_buffer(name, buffer)  # persistent, unlike in lightly: checkpoints need the queue
        self.shuffle = teacher != "eman"
        self.make_teacher(teacher, recipe, steps)

    def forward(self, batch: tuple[tuple[Tensor, Tensor], Tensor]) -> tuple[Tensor, Metrics]:
        (query, key), _ = batch
        queries = self.student(query)
        self.update_teacher()  # as published: before the keys, with the statistics of this batch
        return self.loss(queries, self.keys(key)), {}

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        teacher = self.student if self.teacher is None else self.teacher
        if not self.shuffle:
            return teacher(images)
        # ShuffleBN: each process normalizes images from other processes, so its statistics do not reveal the match.
        distributed = world_size() > 1
        shuffled, order = batch_shuffle(images, distributed)
        return batch_unshuffle(teacher(shuffled), order, distributed)


if __name__ == "__main__":
    from training import main

    main(Moco)
