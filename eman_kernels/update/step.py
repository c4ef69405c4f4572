"""One eager step of a teacher, or of several teachers in one pass."""

from collections.abc import Sequence

from torch import Tensor, nn

from .arguments import check_found_inf, make_arguments
from .eager import update_networks
from .locks import hold_locks
from .state import TeacherState


def step_teachers(
    networks: Sequence[nn.Module],
    states: Sequence[TeacherState],
    student: nn.Module | None,
    momentum: float | Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Let the teachers' networks follow the student by one step, while holding every teacher's lock.

    momentum: for this step, instead of the teachers' own.
    """
    hold_locks([state.lock.lock for state in states], _update_locked, networks, states, student, momentum, found_inf)


def _update_locked(
    networks: Sequence[nn.Module],
    states: Sequence[TeacherState],
    student: nn.Module | None,
    momentum: float | Tensor | None,
    found_inf: Tensor | None,
) -> None:
    first = states[0]
    if student is None:
        student = first.find_student()
    if found_inf is not None:
        found_inf = check_found_inf(found_inf)
    momenta = []
    for network, state in zip(networks, states, strict=True):
        state.lock.check_can_update()
        if state is not first:
            _check_shared_options(first, state)
        state.prepare_counters(network, found_inf is not None and found_inf.device.type != "cpu")
        momenta.append(state.current_momentum() if momentum is None else momentum)
    copies = []
    # A copy that no forward has asked for yet is not written.
    if first.cast is not None and any(state.low_precision is not None for state in states):
        copies = [
            state.low_precision or state.refresh_low_precision(network)
            for network, state in zip(networks, states, strict=True)
        ]
    step = first.known_step() if first.options.rounding == "stochastic" else None
    arguments = make_arguments(momenta, found_inf, first.seed, step, first.skipped)
    update_networks(networks, student, arguments, first.options, copies)
    for state in states:
        state.count_step(found_inf)
        state.remember_student(student)


def _check_shared_options(first: TeacherState, other: TeacherState) -> None:
    ours, theirs = first.shared_options(), other.shared_options()
    differing = [name for name in ours if theirs[name] != ours[name]]
    if differing:
        values = (", ".join(repr(each[name]) for name in differing) for each in (theirs, ours))
        raise ValueError(
            "teachers that are updated in one pass must have equal options, but {} of one is {} and of the first "
            "{}; set it for all, or update each teacher by itself".format(", ".join(differing), *values)
        )
