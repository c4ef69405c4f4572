"""The numbers of elements, from which stochastic rounding draws."""

import torch

from eman_kernels.networks.pairing import Pair
from eman_kernels.networks.sharding import number_elements


def pair(numel, offset=0, whole=None):
    teacher, student = torch.zeros(2, numel)
    return Pair("", teacher, student, "ema", offset=offset, whole=whole)


def test_every_tensor_has_its_own_numbers_from_a_multiple_of_8():
    numels = [1, 7, 8, 9, 0, 15, 16, 17]
    numbered = number_elements([pair(numel) for numel in numels])
    assert [each.first for each in numbered] == [0, 8, 16, 24, 40, 56, 72]
    assert [each.teacher.numel() for each in numbered] == [1, 7, 8, 9, 15, 16, 17]


def test_a_shard_has_the_numbers_that_its_elements_have_in_the_whole_tensor():
    wholes = [pair(21), pair(33), pair(5)]
    numbers = [each.first for each in number_elements(wholes)]
    for rank in range(3):  # the last process has no element of the last tensor
        shards = [pair(8 if rank < 2 else 5, 8 * rank, 21), pair(16 if rank < 2 else 1, 16 * rank, 33)]
        shards.append(pair(0 if rank == 2 else 5, 0, 5))
        found = [each.first for each in number_elements(shards)]
        assert found == [numbers[0] + 8 * rank, numbers[1] + 16 * rank, numbers[2]][: len(found)]
