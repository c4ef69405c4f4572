"""The plan cache: plans live as long as the networks they were made for, and are used while their guards hold."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import ref

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..networks.guards import Guards, Roots
from ..networks.names import check_network
from ..networks.sharding import reshard
from ..networks.tensors import is_plain
from .plan import Plan

# Plans per pair of networks, or per kind of lists: options used in turn, or a buffer that alternates, need one each.
_MAX_PLANS = 8
# Kinds of lists. Loops that update one tensor at a time need many; a plan takes some kilobytes.
_MAX_LISTS = 1024


@dataclass(slots=True)
class CachedPlan:
    """A plan, the guards that say whether it is still valid, and what an update needs besides."""

    key: tuple[object, ...]
    guards: Guards
    plan: Plan
    # For each low-precision copy: the indices of the tensors that it copies, and which of its copies the plan writes.
    masters: list[list[int]] = field(default_factory=list)
    written_copies: list[list[int]] = field(default_factory=list)
    # The indices of the student's buffers that are synchronized over processes.
    synced_buffers: list[int] = field(default_factory=list)
    # Modules of the networks that cache values derived from their weights.
    caching: list[ref[nn.Module]] = field(default_factory=list)


Found: TypeAlias = tuple[CachedPlan, list[Tensor]]


class PlanCache:
    """The plans of one pair of networks, or of one kind of lists, most recently used first."""

    def __init__(self, *references: object) -> None:
        self.references = references
        self.plans: list[CachedPlan] = []
        self.warned_of_layouts = False
        self.buffer_sync: Any = None  # collective buffers of the updates of this pair, owned by update/

    def find_or_make(
        self, key: tuple[object, ...], roots: Roots, make: Callable[..., Found], *arguments: object
    ) -> Found:
        """The plan with this key whose guards hold, and the tensors that the roots hold now.

        If there is none: reshard what a forward of FSDP2 left unsharded, and if that does not help, make a new plan.
        """
        found = self._find(key, roots)
        if found is None and reshard(roots):
            found = self._find(key, roots)
        if found is None:
            found = make(*arguments)
            self._add(found[0])
        return found

    def _find(self, key: tuple[object, ...], roots: Roots) -> Found | None:
        for i, cached in enumerate(self.plans):
            if cached.key == key and (tensors := cached.guards.check(roots)) is not None:
                if i:
                    self.plans.insert(0, self.plans.pop(i))
                return cached, tensors
        return None

    def _add(self, cached: CachedPlan) -> None:
        # A replaced plan may become valid again, so it stays; one with staging buffers of the student's size does not.
        self.plans = [other for other in self.plans if other.key != cached.key or other.plan.staging is None]
        self.plans.insert(0, cached)
        del self.plans[_MAX_PLANS:]


# By the ids of the first teacher and the student. An entry keeps no network alive and goes when one of them does. A
# reused id is harmless, because the guards compare everything.
_networks: dict[tuple[int, int], PlanCache] = {}
# By the number of tensors and the addresses of the first ones, least recently used first.
_lists: dict[tuple[object, ...], PlanCache] = {}


def cache_of_networks(teacher: nn.Module, student: nn.Module) -> PlanCache:
    """The plans of this pair. Raises TypeError unless both are networks."""
    key = id(teacher), id(student)
    cache = _networks.get(key)
    if cache is None:
        check_network(teacher)
        check_network(student)

        def forget(_: object, networks: dict = _networks) -> None:
            networks.pop(key, None)

        cache = _networks[key] = PlanCache(ref(teacher, forget), ref(student, forget))
    return cache


def cache_of_lists(teachers: list[Tensor], students: list[Tensor]) -> PlanCache:
    """The plans of lists with these first tensors."""
    first = teachers[0]
    key = len(teachers), *(tensor.data_ptr() if is_plain(tensor) else 0 for tensor in (first, students[0]))
    cache = _lists.pop(key, None)
    # A new tensor may reuse a freed address: it gets a new cache, so that its warnings are shown again.
    if cache is None or any(reference.expired() for reference in cache.references):
        for old in [old for old, its in _lists.items() if any(reference.expired() for reference in its.references)]:
            del _lists[old]
        if len(_lists) >= _MAX_LISTS:
            del _lists[next(iter(_lists))]
        cache = PlanCache(*(StorageWeakRef(first.untyped_storage()) for _ in range(is_plain(first))))
    _lists[key] = cache
    return cache


def last_plan(teacher: nn.Module, student: nn.Module) -> Plan | None:
    """The plan that the last update of this pair of networks used."""
    cache = _networks.get((id(teacher), id(student)))
    plans = cache.plans if cache is not None else []
    return next((cached.plan for cached in plans if cached.key[0] == "update"), None)
