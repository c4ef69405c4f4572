"""Averages of any length, made after the training from the networks in a folder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..networks.errors import warn_user
from ..schedules import PowerFunction
from .folders import StoredNetwork, check_same_network, read_folder
from .profiles import gamma_of_half_life, integrate_profile, solve_coefficients

Length = float | Sequence[float]

# Errors of the profile: above the first a warning, above the second an exception.
NOTICEABLE = 0.05
UNUSABLE = 0.5


@dataclass(frozen=True)
class Combination:
    """How the networks of a folder add up to averages.

    Attributes:
        networks: those that take part, by increasing step.
        step: the number of updates of the averages.
        gammas: the exponent of each average.
        coefficients: float64 [networks, averages].
        errors: of each average's profile, relative to its norm; None for a run's own checkpoints, where it is unknown.
    """

    networks: list[StoredNetwork]
    step: int
    gammas: list[float]
    coefficients: Tensor
    errors: list[float] | None


@overload
def synthesize(
    folder: str | Path,
    sigma_rel: float | None = None,
    *,
    gamma: float | None = None,
    half_life: float | None = None,
    step: int | None = None,
    stored_sigma_rels: Sequence[float] = (),
    progress: bool = False,
) -> dict[str, Tensor]: ...


@overload
def synthesize(
    folder: str | Path,
    sigma_rel: Sequence[float] | None = None,
    *,
    gamma: Sequence[float] | None = None,
    half_life: Sequence[float] | None = None,
    step: int | None = None,
    stored_sigma_rels: Sequence[float] = (),
    progress: bool = False,
) -> list[dict[str, Tensor]]: ...


def synthesize(
    folder: str | Path,
    sigma_rel: Length | None = None,
    *,
    gamma: Length | None = None,
    half_life: Length | None = None,
    step: int | None = None,
    stored_sigma_rels: Sequence[float] = (),
    progress: bool = False,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """The average of another length than those stored in a folder: weights, BatchNorm statistics and counters.

    Memory: the results in float32, and one stored network, which is mapped from its file.

    Args:
        folder: the folder of ``Snapshots``, or of ema-pytorch's PostHocEMA, or of a run's own checkpoints (see below).
        sigma_rel: the length of the average as in ``schedules.PowerFunction``: the standard deviation of its weights
            over the updates, as a fraction of the updates. A sequence of lengths is computed in one pass over the
            files.
        gamma: the length as an exponent, instead of sigma_rel.
        half_life: the length as the number of last updates that have half of the weight, instead of sigma_rel.
        step: the number of updates after which the average is taken; default: the last one stored. Snapshots of later
            steps do not take part, except for the next one if the step is between two.
        stored_sigma_rels: for a folder of PostHocEMA, its ``sigma_rels``, which its files do not store.
        progress: show a progress bar.

    Returns:
        The state_dict of the averaged network, on the CPU; for a sequence of lengths, a list of them. Averaged tensors
        are float32, or float64 if they were; counters and other copied tensors are those of the last network that
        takes part.

    The result is a linear combination with the coefficients of ``solve_coefficients``. Some of them are negative, so a
    variance that fell by orders of magnitude may be negative by a little: it is set to 0, with a warning.

    A folder of a run's own checkpoints (the student's, full networks or LoRA adapters) is accepted too. The last number
    in a file's name is its step, in steps or epochs. The average is then that of a student that moves linearly between
    the files, which is a much coarser approximation: see the guide.

    Raises:
        ValueError: the stored averages cannot represent the length (the message gives the range that they can), the
            step is outside of what is stored, or the files are of different networks.
        ImportError: safetensors is not installed.

    Warns if the combined profile differs from the requested one by more than 5 % of its norm, and names damaged files,
    which are left out.

    >>> from tempfile import mkdtemp
    >>> from torch import nn
    >>> from eman_kernels import EMANTeachers, Snapshots
    >>> student, folder = nn.Linear(4, 4), mkdtemp()
    >>> teachers = EMANTeachers(student, momenta=[PowerFunction(0.05), PowerFunction(0.10)])
    >>> with Snapshots(teachers, folder, every=10) as snapshots:
    ...     for _ in range(200):
    ...         teachers.update(student)
    ...         snapshots.store_if_due()
    >>> average = synthesize(folder, 0.07)
    >>> torch.allclose(average["weight"], student.weight, atol=1e-3)
    True
    """
    given = {"sigma_rel": sigma_rel, "gamma": gamma, "half_life": half_life}
    lengths = {name: length for name, length in given.items() if length is not None}
    if len(lengths) != 1:
        raise ValueError(f"pass one of sigma_rel, gamma and half_life, not {' and '.join(lengths) or 'none'}")
    ((kind, length),) = lengths.items()
    several = isinstance(length, Sequence)
    networks = read_folder(folder, stored_sigma_rels)
    combination = combine(networks, kind, length if several else [length], step)
    averages = add_up(combination, progress)
    return averages if several else averages[0]


def select_networks(networks: list[StoredNetwork], step: int | None) -> tuple[list[StoredNetwork], int]:
    """The networks that take part, and the step of the average."""
    steps = sorted({network.step for network in networks})
    if not steps:
        raise ValueError("the folder has no snapshots and no checkpoints that can be read")
    step = steps[-1] if step is None else step
    if not max(1, steps[0]) <= step <= steps[-1]:
        raise ValueError(f"step is {step}, but what is stored is of step {steps[0]} to {steps[-1]}")
    if networks[0].sigma_rel is None and step not in steps:
        raise ValueError(f"there is no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    end = next(each for each in steps if each >= step)
    return [network for network in networks if network.step <= end], step


def list_missing(networks: list[StoredNetwork]) -> list[str]:
    """Snapshots that must have been lost, because the other average is stored at the same step."""
    stored = {(network.sigma_rel, network.step) for network in networks}
    lengths, steps = ({pair[i] for pair in stored} for i in (0, 1))
    lost = sorted((length, step) for length in lengths for step in steps if (length, step) not in stored)
    return [f"the snapshot with sigma_rel {length:g} of step {step} is missing" for length, step in lost]


def combine(networks: list[StoredNetwork], kind: str, lengths: Sequence[float], step: int | None) -> Combination:
    """Find the networks that take part, and their coefficients. kind: what the lengths are, as in ``synthesize``.

    Raises ValueError, and warns, as ``synthesize``.
    """
    networks, step = select_networks(networks, step)
    check_same_network(networks[-1].shapes, networks[:-1], networks[-1].path.name)
    gammas = [_to_gamma(kind, length, step) for length in lengths]
    if networks[0].sigma_rel is None:
        steps = [network.step for network in networks]
        columns = [integrate_profile(steps, gamma) for gamma in gammas]
        return Combination(networks, step, gammas, torch.stack(columns, dim=1), None)
    if missing := list_missing(networks):
        warn_user(f"{'; '.join(missing)}: the others are used")
    coefficients, errors = solve_for_networks(networks, step, gammas)
    for name, error in zip(lengths, errors.tolist(), strict=True):
        if error > NOTICEABLE:
            message = (
                f"the {len(networks)} snapshots do not represent the average with {kind} {name} at step {step}: its "
                f"profile would differ by {error:.0%} of its norm. {describe_range(networks, step)}"
            )
            if error > UNUSABLE:
                raise ValueError(message)
            warn_user(message)
    return Combination(networks, step, gammas, coefficients, errors.tolist())


def solve_for_networks(networks: list[StoredNetwork], step: int, gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``solve_coefficients`` for stored averages."""
    return solve_coefficients([each.step for each in networks], [each.gamma for each in networks], step, gammas)


def find_reachable(networks: list[StoredNetwork], step: int) -> list[tuple[float, float]]:
    """The intervals of sigma_rel in which the error of the profile is not noticeable, in steps of 2 %."""
    grid = [0.005 * 1.02**i for i in range(205)]  # to 0.284
    gammas = [PowerFunction(sigma_rel).gamma for sigma_rel in grid]
    _, errors = solve_for_networks(networks, step, gammas)
    intervals = []
    for reachable, group in groupby(zip(grid, errors.tolist(), strict=True), lambda pair: pair[1] <= NOTICEABLE):
        inside = [sigma_rel for sigma_rel, _ in group]
        if reachable:
            intervals.append((inside[0], inside[-1]))
    return intervals


def describe_range(networks: list[StoredNetwork], step: int) -> str:
    """A sentence with the lengths that these networks represent well."""
    intervals = find_reachable(networks, step)
    ranges = " and ".join(f"{low:.3f} to {high:.3f}" for low, high in intervals)
    return f"Within {NOTICEABLE:.0%}: sigma_rel {ranges}." if intervals else f"No length is within {NOTICEABLE:.0%}."


@torch.no_grad()
def add_up(combination: Combination, progress: bool = False) -> list[dict[str, Tensor]]:
    """Read the networks one after the other, and add them to all averages."""
    averages: list[dict[str, Tensor]] = [{} for _ in combination.gammas]
    last = combination.networks[-1]
    rows = zip(combination.networks, combination.coefficients.tolist(), strict=True)
    for network, row in _with_progress(rows, len(combination.networks), progress):
        for name, tensor in network.tensors():
            averaged = tensor.is_floating_point() or tensor.is_complex()
            if averaged and name not in last.copied:
                for average, coefficient in zip(averages, row, strict=True):
                    if name in average:
                        average[name].add_(tensor, alpha=coefficient)
                    else:
                        average[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * coefficient
            elif network is last:
                for average in averages:
                    average[name] = tensor.clone()
    for average in averages:
        _keep_variances_positive(average)
    return averages


def _to_gamma(kind: str, length: float, step: int) -> float:
    if kind == "half_life":
        return gamma_of_half_life(length, step)
    return PowerFunction.from_gamma(length).gamma if kind == "gamma" else PowerFunction(length).gamma


def _keep_variances_positive(average: dict[str, Tensor]) -> None:
    """Set negative variances to 0, and warn."""
    for name, tensor in average.items():
        if name.endswith("running_var") and (negative := tensor < 0).any():
            warn_user(
                f"{name}: {int(negative.sum())} of {tensor.numel()} variances were negative, down to "
                f"{float(tensor.min()):.1e}, and were set to 0. torch.optim.swa_utils.update_bn estimates them again."
            )
            tensor.clamp_(min=0)


def _with_progress(rows: Iterable[Any], total: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return rows
    from tqdm import tqdm

    return tqdm(rows, "snapshots", total, disable=None)  # shown on a terminal only
