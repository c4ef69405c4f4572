"""Work for the backends: pairs that the kernels can take, and those that the reference must update instead."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import reference
from ..backends.interface import Arguments, Backend, Place, Work
from ..backends.interrupts import uninterrupted
from ..networks.errors import NOTHING_WRITTEN
from ..networks.pairing import Pair
from ..networks.tensors import effective_strides, extent, is_plain
from ..options import Options
from .chunks import GPU_CHUNK_BYTES, HALF_DTYPES, PAIR_CODES, build_table, find_pair_code


def build_work(
    device: torch.device,
    backend: Backend,
    pairs: Sequence[Pair],
    index_of: dict[int, int],
    n_teachers: int = 1,
    options: Options | None = None,
) -> Work:
    """What one backend does on one device. index_of: the index of each tensor among those that the plan runs on, by id.

    pairs: the pairs of one student tensor are adjacent, one per teacher.
    """
    options = options or Options()
    skip_nonfinite = options.nonfinite == "skip"
    places: dict[tuple[str, torch.dtype, torch.dtype], list[Place]] = {}
    for p in pairs:
        cast = None if p.cast is None else index_of[id(p.cast)]
        place = Place(index_of[id(p.teacher)], index_of[id(p.student)], cast, p.rule, p.group, p.first)
        places.setdefault((p.rule, p.teacher.dtype, p.student.dtype), []).append(place)
    table = None
    if backend.TAKES_TABLE:
        chunk_bytes = None if device.type == "cpu" else GPU_CHUNK_BYTES
        table = build_table(pairs, n_teachers, skip_nonfinite, chunk_bytes).to(device)
        if not is_plain(table):
            raise RuntimeError(
                "a torch mode is active in which new tensors have no memory: the plan's table is a "
                f"{type(table).__name__}. Call update() outside of it. {NOTHING_WRITTEN}"
            )
    return Work(
        device,
        places,
        sum(pair.teacher.numel() for pair in pairs),
        table,
        n_teachers=n_teachers,
        bytes_read=sum(_bytes_read(pair, backend.TAKES_TABLE) for pair in pairs),
        bytes_written=sum(map(_bytes_written, pairs)),
        stochastic=options.rounding == "stochastic"
        and any(p.rule == "ema" and p.teacher.dtype in HALF_DTYPES for p in pairs),
        skip_nonfinite=skip_nonfinite,
        casts=any(pair.cast is not None for pair in pairs),
    )


def _bytes_read(pair: Pair, one_pass: bool) -> int:
    """one_pass: whether the student is read once for all its teachers."""
    student = pair.student.nbytes if pair.group == 0 or not one_pass else 0
    return student + (0 if pair.rule == "copy" else pair.teacher.nbytes)


def _bytes_written(pair: Pair) -> int:
    also = pair.student if pair.rule == "swap" else pair.cast
    return pair.teacher.nbytes + (0 if also is None else also.nbytes)


def why_reference(bundle: list[Pair], n_teachers: int, skip_nonfinite: bool) -> str | None:
    """Why the reference must update these pairs of one student tensor; None if they can be cut into chunks."""
    if reason := next(filter(None, map(why_ineligible, bundle)), None):
        return reason
    if len(bundle) < n_teachers or len({(p.teacher.dtype, p.teacher.device, p.rule) for p in bundle}) > 1:
        return "its teachers differ in dtypes, devices or ties"
    dtype = bundle[0].teacher.dtype
    if skip_nonfinite and dtype.is_floating_point and ("ema", dtype, dtype) not in PAIR_CODES:
        return f"no kernel checks whether {dtype} is finite"
    return None


def why_ineligible(pair: Pair) -> str | None:
    """Why the reference must update this pair; None if it can be cut into chunks."""
    teacher, student, cast = pair.teacher, pair.student, pair.cast
    if not (is_plain(teacher) and is_plain(student)):
        return f"it is a {type(teacher).__name__} that follows a {type(student).__name__}"
    if teacher.device != student.device:
        return f"the teacher is on {teacher.device}, the student on {student.device}"
    if find_pair_code(pair) is None:
        return f"no kernel supports {pair.rule} of {short_dtype(student.dtype)} into {short_dtype(teacher.dtype)}"
    if teacher.is_conj() or student.is_conj() or teacher.is_neg() or student.is_neg():
        return "it is a lazy conjugate or negative view"
    if differ_in_strides(pair):
        return f"the teacher's strides are {teacher.stride()}, the student's {student.stride()}"
    if cast is not None and effective_strides(teacher) != effective_strides(cast):
        return f"the teacher's strides are {teacher.stride()}, its low-precision copy's {cast.stride()}"
    if extent(teacher) != teacher.numel():
        return f"it is not dense: shape {tuple(teacher.shape)}, strides {teacher.stride()}"
    if teacher.data_ptr() % teacher.element_size() or student.data_ptr() % student.element_size():
        return "its address is not a multiple of its element size"
    return None


def differ_in_strides(pair: Pair) -> bool:
    """Whether a pair of plain tensors on one device has different strides."""
    teacher, student = pair.teacher, pair.student
    plain = is_plain(teacher) and is_plain(student) and teacher.device == student.device
    return plain and effective_strides(teacher) != effective_strides(student)


def why_torch_cannot(bundle: list[Pair], n_teachers: int, options: Options) -> str | None:
    """Why torch cannot do what these pairs of one student tensor need. Tensor subclasses support what they like, so the
    operation is tried on copies before anything is written."""
    first = bundle[0]
    if all(is_plain(pair.teacher) and is_plain(pair.student) for pair in bundle):
        return None
    try:
        with torch.no_grad():
            copies = [
                replace(p, teacher=p.teacher.detach().clone(), student=p.student.detach().clone(), cast=None)
                for p in bundle
            ]
            tensors = [tensor for p in copies for tensor in (p.teacher, p.student)]
            index_of = {id(tensor): i for i, tensor in enumerate(tensors)}
            work = build_work(first.teacher.device, reference, copies, index_of, n_teachers, options)
            _run_reference(work, tensors, first.rule)
    except Exception as error:  # a subclass may raise anything
        kinds = f"the teacher is a {type(first.teacher).__name__}, the student a {type(first.student).__name__}"
        verb = {"ema": "average", "copy": "copy", "swap": "exchange"}[first.rule]
        return f"{kinds}, which torch cannot {verb} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None


def _run_reference(work: Work, tensors: list[Tensor], rule: str) -> None:
    if rule == "swap":
        for calls in reference.swaps(work, tensors):
            uninterrupted(*calls)
    else:
        reference.run(work, Arguments([0.5] * work.n_teachers), tensors)


def short_dtype(dtype: torch.dtype) -> str:
    """float32 instead of torch.float32."""
    return str(dtype).removeprefix("torch.")
