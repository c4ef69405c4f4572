"""A teacher for a student whose parameters DeepSpeed's ZeRO-3 partitions over two processes."""

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


def train_in_one_process() -> None:
    rank, size = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, although the group already exists
    import deepspeed

    deepspeed.init_distributed("gloo")
    student, average = net(), net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=CONFIG)
    average_engine, *_ = deepspeed.initialize(model=average, config=CONFIG)

    def gather() -> deepspeed.zero.GatheredParameters:
        return deepspeed.zero.GatheredParameters([*average.parameters(), *student.parameters()], modifier_rank=0)

    def state(network: nn.Module) -> dict[str, Tensor]:
        with gather():
            return {n: t.detach().clone() for n, t in [*network.named_parameters(), *network.named_buffers()]}

    with pytest.raises(TypeError, match=r"ZeRO-3.*module=another_instance"):
        EMANTeacher(student)
    with pytest.raises(ValueError, match=r"empty.*ZeRO-3.*GatheredParameters"):
        EMANTeacher(student, module=average)
    with gather():
        teacher = EMANTeacher(student, 0.9, module=average)
    for step in range(3):
        engine.backward(engine(torch.randn(2, 7)).square().mean())
        engine.step()
        expected = state(average)
        for name, tensor in state(student).items():
            expected[name] = lerp(expected[name], tensor, 0.9) if tensor.is_floating_point() else tensor
        with pytest.raises(ValueError, match=r"empty.*ZeRO-3.*GatheredParameters"):
            teacher.update(student)
        with gather():
            teacher.update(student)
        for name, tensor in state(average).items():
            assert_same_bits(tensor, expected[name], name)
        assert student[0].weight.numel() == average[0].weight.numel() == 0
        assert teacher.step == step + 1
    unpartitioned = net().eval()
    unpartitioned.load_state_dict(expected)
    inputs = torch.randn(2, 7)
    torch.testing.assert_close(average_engine(inputs).detach(), unpartitioned(inputs).detach())


def test_teacher_of_a_zero3_student(tmp_path: Path) -> None:
    if reason := why_none("gloo", 2):
        pytest.skip(reason)
    world = World("gloo", 2, tmp_path)
    try:
        world.run(train_in_one_process)
    finally:
        world.stop()
