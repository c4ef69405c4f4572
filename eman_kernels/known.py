"""The plans that are known: each as long as what it is for lives, and used while it is true."""

from dataclasses import dataclass, field
from weakref import ref

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import distributed
from .pairing import check_network
from .plan import Plan
from .staging import StagedPlan
from .watch import Roots, Watch, is_plain

# Of one pair of networks, or one kind of lists: option sets in turn, or a buffer that alternates, need one each.
_PLANS = 8
# Kinds of lists. Loops that update a tensor at a time need many; a plan is some kilobytes.
_LISTS = 1024


@dataclass(slots=True)
class Followed:
    """A plan, and what it rests on."""

    options: tuple[object, ...]
    watch: Watch
    plan: Plan
    # For each low-precision copy, the numbers of the tensors that it is of, and which of its tensors the plan writes.
    masters: list[list[int]] = field(default_factory=list)
    along: list[list[int]] = field(default_factory=list)
    # The numbers of the student's buffers that are to be in step over several processes.
    buffers: list[int] = field(default_factory=list)
    caching: list[ref[nn.Module]] = field(default_factory=list)  # of the teachers: those that caches.renew is for


class Known:
    """The plans of one pair of networks, or one kind of lists, the last used first."""

    def __init__(self, *references: object) -> None:
        self.references = references
        self.plans: list[Followed] = []
        self.statistics: distributed.Statistics | None = None

    def find(self, options: tuple[object, ...], roots: Roots) -> tuple[Followed, list[Tensor]] | None:
        """The plan of these options that is true of what the roots hold, and the tensors that they hold."""
        for i, followed in enumerate(self.plans):
            if followed.options == options and (tensors := followed.watch.look(roots)) is not None:
                if i:
                    self.plans.insert(0, self.plans.pop(i))
                return followed, tensors
        return None

    def find_sharded(self, options: tuple[object, ...], roots: Roots) -> tuple[Followed, list[Tensor]] | None:
        """`find`, once what a forward pass left whole is sharded again."""
        return self.find(options, roots) if distributed.reshard(roots) else None

    def add(self, followed: Followed) -> None:
        # A plan that has been replaced may be true again some day; one with memory of the student's size may not wait.
        self.plans = [o for o in self.plans if o.options != followed.options or not isinstance(o.plan, StagedPlan)]
        self.plans.insert(0, followed)
        del self.plans[_PLANS:]


# By the ids of the first teacher and the student. Nothing here keeps a network alive, and what belongs to one goes with
# it. That an id may come again is no harm: a watch looks at all there is.
_networks: dict[tuple[int, int], Known] = {}
# By how many tensors there are and where the first ones lie; the last used last.
_lists: dict[tuple[object, ...], Known] = {}


def known_networks(teacher: nn.Module, student: nn.Module) -> Known:
    key = id(teacher), id(student)
    known = _networks.get(key)
    if known is None:
        check_network(teacher)
        check_network(student)

        def forget(_: object, networks: dict = _networks) -> None:
            networks.pop(key, None)

        known = _networks[key] = Known(ref(teacher, forget), ref(student, forget))
    return known


def known_lists(teachers: list[Tensor], students: list[Tensor]) -> Known:
    first = teachers[0]
    key = len(teachers), *(tensor.data_ptr() if is_plain(tensor) else 0 for tensor in (first, students[0]))
    known = _lists.pop(key, None)
    # Others may have come to lie where the dead ones were: they are warned anew.
    if known is None or any(reference.expired() for reference in known.references):
        for old in [old for old, its in _lists.items() if any(reference.expired() for reference in its.references)]:
            del _lists[old]
        if len(_lists) >= _LISTS:
            del _lists[next(iter(_lists))]
        known = Known(*(StorageWeakRef(first.untyped_storage()) for _ in range(is_plain(first))))
    _lists[key] = known
    return known


def networks_plan(teacher: nn.Module, student: nn.Module) -> Plan | None:
    """The plan that the last update of this pair of networks used."""
    known = _networks.get((id(teacher), id(student)))
    plans = known.plans if known is not None else []
    return next((followed.plan for followed in plans if followed.options[0] == "update"), None)
