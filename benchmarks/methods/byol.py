"""BYOL: the student predicts the teacher's output for another view of the same image.

Grill et al., "Bootstrap your own latent", 2020; with EMAN: Cai et al., 2021.
Run: python benchmarks/methods/byol.py --teacher eman --recipe small
"""

from image_data import Images, byol_views
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from method import Kind, Method, Metrics, network
from recipes import BYOL, ByolRecipe
from torch import Tensor, nn


class Byol(Method):
    recipes = BYOL
    sync_batchnorm = True
    views = staticmethod(byol_views)

    def __init__(self, recipe: ByolRecipe, images: Images, teacher: Kind, steps: int) -> None:
        super().__init__()
        backbone = network(recipe, images.channels)
        projector = BYOLProjectionHead(backbone.num_features, recipe.hidden, recipe.features)
        self.student = nn.Sequential(backbone, projector)
        self.predictor = BYOLPredictionHead(recipe.features, recipe.hidden, recipe.features)  # not averaged
        self.similarity = NegativeCosineSimilarity()
        self.make_teacher(teacher, recipe, steps)

    def forward(self, batch: tuple[tuple[Tensor, Tensor], Tensor]) -> tuple[Tensor, Metrics]:
        views, _ = batch
        projected = [self.student(view) for view in views]
        targets = [p.detach() for p in projected] if self.teacher is None else [self.teacher(view) for view in views]
        first, second = (self.predictor(p) for p in projected)
        # The squared distance of unit vectors, for both directions.
        return 4 + 2 * (self.similarity(first, targets[1]) + self.similarity(second, targets[0])), {}

    def after_the_step(self) -> None:
        self.update_teacher()


if __name__ == "__main__":
    from training import main

    main(Byol)
