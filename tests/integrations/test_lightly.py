"""update_momentum with lightly's modules, compared with lightly's own function."""

import warnings

import pytest
import torch
from conftest import adapters_example, assert_same_bits, examples, lerp
from torch import nn

pytest.importorskip("lightly", reason="lightly is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lightly's own warnings on import
    from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
    from lightly.models import utils
    from lightly.models.modules import (
        BYOLPredictionHead,
        BYOLProjectionHead,
        DINOProjectionHead,
        MoCoProjectionHead,
    )

from eman_kernels.integrations import lightly as adapter
from eman_kernels.integrations.lightly import update_momentum

MOMENTUM = 0.9


def backbone():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(start_dim=1)
    )


class Method(nn.Module):
    def __init__(self, head, *sizes, **options):
        super().__init__()
        # DINO's head cannot be deep-copied.
        self.student, self.teacher = (nn.Sequential(backbone(), head(*sizes, **options)) for _ in range(2))
        self.teacher.load_state_dict(self.student.state_dict())
        utils.deactivate_requires_grad(self.teacher)

    def keys(self, images):
        with torch.no_grad():
            return self.teacher(images)


class MoCo(Method):
    def __init__(self):
        super().__init__(MoCoProjectionHead, 8, 16, 4)
        self.criterion = NTXentLoss(memory_bank_size=(16, 4))

    def loss(self, views):
        return self.criterion(self.student(views[0]), self.keys(views[1]))


class BYOL(Method):
    def __init__(self):
        super().__init__(BYOLProjectionHead, 8, 16, 4)
        self.predictor = BYOLPredictionHead(4, 16, 4)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, views):
        return self.criterion(self.predictor(self.student(views[0])), self.keys(views[1]))


class DINO(Method):
    def __init__(self):
        super().__init__(DINOProjectionHead, 8, 16, 4, 32, batch_norm=True, freeze_last_layer=1)
        self.criterion = DINOLoss(output_dim=32)

    def loss(self, views):
        return self.criterion([self.keys(view) for view in views], [self.student(view) for view in views], epoch=0)


def test_examples_run():
    names = {"backbone": backbone(), "torch": torch, "batches": torch.randn(3, 4, 3, 8, 8)}
    names["optimizer"] = torch.optim.SGD(names["backbone"].parameters(), lr=0.1)
    (example,) = examples(adapter.__doc__)
    exec(example, names)
    momentum = names["backbone_momentum"]
    assert momentum[1].num_batches_tracked == 2, "the last update is before the third forward pass"


def test_the_example_of_the_guide_runs():
    names = {}
    exec(adapters_example("lightly"), names)
    assert torch.equal(names["backbone_momentum"].fc.weight, names["backbone"].fc.weight)


@pytest.mark.parametrize("method_class", [MoCo, BYOL, DINO])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_weights_equal_lightlys_and_statistics_are_averaged(method_class):
    method = method_class()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        method.train()  # Lightning does this before each epoch, to the teacher too
        theirs, student = method_class().teacher, method.student
        theirs.load_state_dict(method.teacher.state_dict())
        before = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items()}
        utils.update_momentum(student, theirs, m=MOMENTUM)
        update_momentum(student, method.teacher, m=MOMENTUM)
        assert not any(module.training for module in method.teacher.modules())
        for our, their in zip(method.teacher.parameters(), theirs.parameters(), strict=True):
            # lightly computes m t + (1 - m) s, which rounds twice; ours is t + (1 - m)(s - t)
            torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)
        now = student.state_dict()
        for name, tensor in method.teacher.state_dict().items():
            if tensor.is_floating_point():
                assert_same_bits(tensor, lerp(before[name], now[name], MOMENTUM), name)
            else:
                assert torch.equal(tensor, now[name]), name
        statistics = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items() if "running" in name}
        assert statistics
        optimizer.zero_grad()
        method.loss(torch.randn(2, 6, 3, 8, 8)).backward()
        optimizer.step()
        for name, tensor in statistics.items():
            assert torch.equal(method.teacher.state_dict()[name], tensor), f"the teacher's forward pass changed {name}"
    assert all(theirs.state_dict()[name].ne(tensor).any() for name, tensor in statistics.items()), (
        "lightly's function does not update the statistics, which is why this adapter exists"
    )


def test_options_reach_eman_update():
    student, teacher = backbone(), backbone()
    before = teacher[0].weight.detach().clone()
    update_momentum(student, teacher, 0.5, found_inf=torch.ones(1))
    assert torch.equal(teacher[0].weight, before)
    update_momentum(student, teacher, 0.5, rules={"0.*": "skip"})
    assert torch.equal(teacher[0].weight, before)
    with pytest.raises(ValueError, match="momentum must be in"):
        update_momentum(student, teacher, 1.5)
