"""The options of an update: checked once, immutable, and the key under which its plan is cached."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, TypedDict, get_args

import torch

Rule = Literal["ema", "copy", "skip", "share"]
Rounding = Literal["nearest", "stochastic"]
Nonfinite = Literal["propagate", "skip"]
SyncBuffers = Literal["none", "mean", "rank0"]
BackendName = Literal["auto", "cuda", "cpu", "triton", "foreach", "reference"]


@dataclass(frozen=True)
class Options:
    """How a teacher follows its student. ``teacher.options`` holds them; equal options share one plan.

    Args:
        rules: name patterns (as in fnmatch) with "ema", "copy", "skip" or "share"; the first pattern that matches a
            name applies: ``{"predictor.*": "skip"}``. "share" is for tensors that teacher and student hold in common,
            such as a frozen base under trained adapters: they take no memory and no time, ``dtype`` does not convert
            them, and ``state_dict()`` contains them. A deep copy or an unpickled teacher has its own base; its update
            raises an error that says how to share it again.
        buffers: the rule of buffers that no pattern matches. "ema" (EMAN, default) averages floating-point buffers and
            copies integer and bool buffers, and also buffers for which an average is meaningless: the vectors of
            spectral norm, pruning masks, the ranges of quantization observers.
        backend: one of ``available_backends()``. Default: the EMAN_KERNELS_BACKEND environment variable, which is read
            when a teacher is created or a function is called, otherwise the fastest backend for the device.
        rounding: how results are rounded to bfloat16 and float16 teachers: "nearest" (default), or "stochastic", up or
            down at random such that the expected value is the exact average. Rounded to nearest, such a teacher barely
            moves at high momentum, because each step is below half an ulp. Stochastic rounding depends only on the seed
            and the step: runs are reproducible, with the same bits on every backend.
        nonfinite: "propagate" (default) NaNs and infinities of the student, or "skip" them: the teacher keeps such an
            element, and a counter counts it. A finite student element then replaces a non-finite teacher element. At
            momentum 1 nothing changes.
        sync_buffers: which floating-point buffers the teacher follows when several processes train one student, for
            BatchNorm statistics under DistributedDataParallel: "none" (default), those of its own process; "mean", the
            mean over all processes; "rank0", those of the first process. One collective operation per update, of the
            buffers' size (200 kB for ResNet-50), in which every process must take part. The student is only read.

    Raises:
        ValueError: a rule, a mode or a backend is unknown.

    >>> from dataclasses import replace
    >>> options = Options(rules={"predictor.*": "skip"})
    >>> replace(options, rounding="stochastic").rules
    (('predictor.*', 'skip'),)
    """

    rules: Mapping[str, Rule] | tuple[tuple[str, Rule], ...] = ()
    buffers: Rule = "ema"
    backend: str | None = None
    rounding: Rounding = "nearest"
    nonfinite: Nonfinite = "propagate"
    sync_buffers: SyncBuffers = "none"

    def __post_init__(self) -> None:
        if isinstance(self.rules, Mapping):
            object.__setattr__(self, "rules", tuple(self.rules.items()))
        for pattern, rule in (*self.rules, ("buffers", self.buffers)):
            if rule not in get_args(Rule):
                raise ValueError(f"unknown rule {rule!r} for {pattern!r}: {_one_of(Rule)}")
        for name, known in (("rounding", Rounding), ("nonfinite", Nonfinite), ("sync_buffers", SyncBuffers)):
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"unknown {name}={value!r}: {_one_of(known)}")
        if self.backend and self.backend not in get_args(BackendName):
            raise ValueError(f"unknown backend={self.backend!r}: {_one_of(BackendName)}")


class TeacherOptions(TypedDict, total=False):
    """The keyword options that the teachers of one student have in common: EMANTeacher's from ``rules`` on."""

    rules: Mapping[str, Rule] | None
    buffers: Rule
    backend: str | None
    dtype: torch.dtype | None
    rounding: Rounding
    seed: int
    cast: torch.dtype | None
    nonfinite: Nonfinite
    capturable: bool
    sync_buffers: SyncBuffers


# These concern networks. All others also apply to lists of tensors, and are arguments of the operator.
NETWORK_OPTIONS = ("rules", "buffers", "sync_buffers")
TENSOR_OPTIONS = tuple(field.name for field in fields(Options) if field.name not in NETWORK_OPTIONS)

_cached = lru_cache(Options)  # bounded


def make_options(
    rules: Mapping[str, Rule] | None = None,
    buffers: Rule = "ema",
    backend: str | None = None,
    rounding: Rounding = "nearest",
    nonfinite: Nonfinite = "propagate",
    sync_buffers: SyncBuffers = "none",
) -> Options:
    """The options, with the backend of the environment variable if none is given.

    Equal options are one object, so that a cached plan is found by identity. Raises ValueError as Options does, or if
    the environment variable names an unknown backend.
    """
    backend = backend or _backend_from_environment()
    items = tuple(rules.items()) if rules else ()
    try:
        return _cached(items, buffers, backend, rounding, nonfinite, sync_buffers)
    except TypeError:  # a value that cannot be hashed is not a known one: the check names it
        return Options(items, buffers, backend, rounding, nonfinite, sync_buffers)


def _backend_from_environment() -> str | None:
    backend = os.environ.get("EMAN_KERNELS_BACKEND") or None
    if backend and backend not in get_args(BackendName):
        raise ValueError(f"unknown EMAN_KERNELS_BACKEND={backend!r}: {_one_of(BackendName)}")
    return backend


def _one_of(names: Any) -> str:
    return f"it must be one of {', '.join(map(repr, get_args(names)))}"
