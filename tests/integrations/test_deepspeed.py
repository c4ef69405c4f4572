"""A teacher of a student whose parameters DeepSpeed's ZeRO-3 has partitioned over two processes."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits, lerp
from processes import World, why_none
from torch import Tensor, nn

from eman_kernels import EMANTeacher

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def follow() -> None:
    rank, size = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # looked at, the group being there already
    import deepspeed

    deepspeed.init_distributed("gloo")
    student, other = net(), net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=CONFIG)
    teachers_engine, *_ = deepspeed.initialize(model=other, config=CONFIG)

    def gathered() -> deepspeed.zero.GatheredParameters:
        return deepspeed.zero.GatheredParameters([*other.parameters(), *student.parameters()], modifier_rank=0)

    def state(network: nn.Module) -> dict[str, Tensor]:
        with gathered():
            return {n: t.detach().clone() for n, t in [*network.named_parameters(), *network.named_buffers()]}

    with pytest.raises(TypeError, match=r"ZeRO-3.*module=another_instance"):
        EMANTeacher(student)
    with pytest.raises(ValueError, match=r"empty.*ZeRO-3.*GatheredParameters"):
        EMANTeacher(student, module=other)
    with gathered():
        teacher = EMANTeacher(student, 0.9, module=other)
    for step in range(3):
        engine.backward(engine(torch.randn(2, 7)).square().mean())
        engine.step()
        expected = state(other)
        for name, tensor in state(student).items():
            expected[name] = lerp(expected[name], tensor, 0.9) if tensor.is_floating_point() else tensor
        with pytest.raises(ValueError, match=r"empty.*ZeRO-3.*GatheredParameters"):
            teacher.update(student)
        with gathered():
            teacher.update(student)
        for name, tensor in state(other).items():
            assert_same_bits(tensor, expected[name], name)
        assert student[0].weight.numel() == other[0].weight.numel() == 0
        assert teacher.step == step + 1
    plain = net().eval()
    plain.load_state_dict(expected)
    inputs = torch.randn(2, 7)
    torch.testing.assert_close(teachers_engine(inputs).detach(), plain(inputs).detach())


def test_a_teacher_of_what_zero_3_has_partitioned(tmp_path: Path) -> None:
    if reason := why_none("gloo", 2):
        pytest.skip(reason)
    world = World("gloo", 2, tmp_path)
    try:
        world.run(follow)
    finally:
        world.stop()
