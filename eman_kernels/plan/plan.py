"""A plan: how to update these pairs, made once and run many times."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.interface import Arguments, Backend, Work
from ..networks.errors import NOTHING_WRITTEN, raise_differences
from ..networks.pairing import Pair
from ..networks.sharding import number_elements, replace_by_shards
from ..networks.tensors import has_memory, local_part
from ..options import Options
from .chunks import HALF_DTYPES
from .overlaps import check_overlaps, drop_ties_and_empties
from .staging import Staging, needs_staging
from .work import build_work, short_dtype, why_reference, why_torch_cannot

# Below this weight (1 - momentum), elements within a tenth of the student's do not move when rounded to nearest: half
# an ulp is at least a quarter of epsilon of them.
_STALLING_WEIGHT = {dtype: 10 * torch.finfo(dtype).eps / 4 for dtype in HALF_DTYPES}

# How many names `describe` lists per kind: for a network of hundreds of tensors it still fits on a screen.
_LISTED = 5


class Plan:
    """How to update these pairs, as long as the guards find the tensors unchanged.

    A plan keeps no tensor alive except its chunk tables and staging buffers: `run` and `swaps` take the tensors again.

    Args:
        pairs: which teacher tensor follows which student tensor.
        tensors: all tensors that the pairs refer to, in the order in which the guards return them.
        options: of which a plan reads backend, rounding and nonfinite.
        left_out: how many tensors are "skipped" and "shared", for `describe`.

    Attributes:
        because: why tensors are copied although they could be averaged, by name.
        ineligible: why tensors are updated by the reference, by name.

    Raises:
        ValueError: teacher and student share memory, a teacher tensor overlaps itself or another one, or torch cannot
            compute with a tensor subclass.
        RuntimeError: the requested backend is not available, or a CUDA graph is being captured.
    """

    def __init__(
        self,
        pairs: list[Pair],
        tensors: Sequence[Tensor],
        options: Options | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        options = options or Options()
        self.left_out = left_out or {}
        index_of = {id(tensor): index for index, tensor in enumerate(tensors)}
        raise_differences(f"{pair.name}: {fault}" for pair in pairs if (fault := _find_plan_fault(pair, index_of)))
        written = _written_tensors(pairs)
        pairs = replace_by_shards(pairs)
        # A DTensor has a version counter besides that of its shard.
        written += _written_tensors(pairs)
        # The indices of all tensors that are written, for increment_versions.
        self.written = array("q", sorted({index_of[id(tensor)] for tensor in written}))
        self.staging: Staging | None = None
        if any(map(needs_staging, pairs)):
            self.staging = Staging(pairs, index_of)
            pairs = self.staging.replace_students(pairs, index_of)
        self.n_teachers = 1 + max((pair.group for pair in pairs), default=0)
        self.because = {pair.name: pair.because for pair in pairs if pair.because}
        pairs = number_elements(drop_ties_and_empties(pairs))
        check_overlaps(pairs)
        self.stalls_below = 0.0
        if options.rounding == "nearest":
            dtypes = {pair.teacher.dtype for pair in pairs if pair.rule == "ema"}
            self.stalls_below = max((_STALLING_WEIGHT.get(dtype, 0.0) for dtype in dtypes), default=0.0)
        self.ineligible: dict[str, str] = {}
        self.works: list[tuple[Backend, Work]] = self._divide(pairs, index_of, options)

    def _divide(self, pairs: list[Pair], index_of: dict[int, int], options: Options) -> list[tuple[Backend, Work]]:
        """One work per device for the pairs that its backend can take, and one for the reference with all others."""
        on_cuda = any(pair.teacher.is_cuda or pair.student.is_cuda for pair in pairs)
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the plan of this update must be made before a CUDA graph is captured, because its table is copied to "
                "the device: call update() once before the capture, and do not move tensors in between"
            )
        bundles: dict[str, list[Pair]] = {}
        for pair in pairs:
            bundles.setdefault(pair.name, []).append(pair)
        by_device: dict[torch.device, list[Pair]] = {}
        for name, bundle in bundles.items():
            if reason := why_reference(bundle, self.n_teachers, options.nonfinite == "skip"):
                self.ineligible[name] = reason
            else:
                by_device.setdefault(bundle[0].teacher.device, []).extend(bundle)
        rest = [bundles[name] for name in self.ineligible]
        raise_differences(
            (
                f"{bundle[0].name}: {fault}"
                for bundle in rest
                if (fault := why_torch_cannot(bundle, self.n_teachers, options))
            ),
            'Give it the rule "copy" or "skip", or keep a teacher of plain tensors of it.',
        )
        divided = [
            (backends.choose(device, options.backend), device, on_device) for device, on_device in by_device.items()
        ]
        if rest:
            divided.append((reference, rest[0][0].teacher.device, [pair for bundle in rest for pair in bundle]))
        return [
            (backend, build_work(device, backend, its, index_of, self.n_teachers, options))
            for backend, device, its in divided
        ]

    def run(self, arguments: Arguments, tensors: Sequence[Tensor]) -> None:
        """Update the teacher in place. Raises ValueError if a tensor among the arguments is on another device."""
        if self.staging is not None:
            tensors = self.staging.copy_students(arguments, tensors)
        if not arguments.is_by_value():
            if arguments.found_inf is not None and arguments.found_inf.device.type == "cpu":
                if arguments.found_inf:
                    return
                arguments.found_inf = None
            self._check_devices(arguments)
        for backend, work in self.works:
            backend.run(work, arguments, tensors)

    def _check_devices(self, arguments: Arguments) -> None:
        given = {
            "momentum": arguments.momenta,
            "found_inf": arguments.found_inf,
            "step": arguments.step,
            "counter": arguments.skipped,
        }
        for name, tensor in given.items():
            for _, work in self.works:
                if isinstance(tensor, Tensor) and work.device != tensor.device:
                    remedy = ", or give the momentum as a number" if name == "momentum" else ""
                    raise ValueError(
                        f"the {name} is on {tensor.device} and the teacher on {work.device}; move it there{remedy}. "
                        f"{NOTHING_WRITTEN}"
                    )

    def swaps(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Callable[[], object], ...]]:
        """Pieces of work that exchange the pairs' values in place: the calls of each must not be interrupted."""
        for backend, work in self.works:
            yield from backend.swaps(work, tensors)

    def describe(self) -> str:
        """What is updated how, by which backend; and what does not take the fast path, with the reason.

        At most a screen: of each kind a few names are listed; `because` and `ineligible` have all of them. The bytes
        are those of the tensors: each is read and written once. Temporaries of foreach and of the reference are extra.
        """
        lines = []
        for backend, work in self.works:
            kinds = [
                f"{len(places)} {rule} {short_dtype(teacher)} <- {short_dtype(student)}"
                for (rule, teacher, student), places in work.places.items()
            ]
            teachers = f" of {self.n_teachers} teachers" if self.n_teachers > 1 else ""
            chunks = f", {len(work.table)} chunks" if work.table is not None else ""
            lines.append(
                f"{work.device}: {backend.NAME} updates {sum(map(len, work.places.values()))} tensors{teachers}, "
                f"{work.numel} elements{chunks} ({', '.join(kinds)}); reads {_format_bytes(work.bytes_read)}, writes "
                f"{_format_bytes(work.bytes_written)}"
            )
        if self.left_out:
            lines.append(f"  {', '.join(f'{count} {verb}' for verb, count in self.left_out.items())}")
        lines += _list_some("copied", self.because)
        lines += _list_some("by the reference", self.ineligible)
        if self.staging is not None:
            lines += self.staging.describe()
        return "\n".join(lines)


def _list_some(what: str, reasons: Mapping[str, str]) -> list[str]:
    lines = [f"  {name}: {what}, because {reason}" for name, reason in list(reasons.items())[:_LISTED]]
    return lines + [f"  and {len(reasons) - _LISTED} more {what}"] * (len(reasons) > _LISTED)


def _format_bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size} bytes"


def _written_tensors(pairs: list[Pair]) -> list[Tensor]:
    return [pair.teacher for pair in pairs] + [pair.student for pair in pairs if pair.rule == "swap"]


def _find_plan_fault(pair: Pair, index_of: dict[int, int]) -> str | None:
    """What is wrong with a pair that its names do not show."""
    for who, tensor in (("teacher", pair.teacher), ("student", pair.student)):
        if id(tensor) not in index_of:
            return f"no module holds the {who} tensor that named_parameters() or named_buffers() returns"
    teacher, cast = pair.teacher, pair.cast
    for who, tensor in (("teacher", teacher), ("student", pair.student), ("low-precision copy", cast)):
        # torch can compute with its zero tensors (the gradients of torch.func), which have no memory.
        if tensor is not None and not has_memory(local := local_part(tensor)) and not local._is_zerotensor():
            return (
                f"the {who} has no memory: it belongs to a transform of torch.func (call the update outside of it), or "
                "its storage has been freed"
            )
    if cast is not None and (
        cast.shape != teacher.shape or cast.device != teacher.device or cast.dtype not in HALF_DTYPES
    ):
        kinds = [f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" for t in (teacher, cast)]
        return f"the teacher is {kinds[0]}, its low-precision copy {kinds[1]}"
    return None
