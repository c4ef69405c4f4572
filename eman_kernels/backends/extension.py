"""The compiled extension, or why there is none. Importing never fails just because no compiler was available."""

import platform
from importlib import import_module
from typing import Any

from torch import Tensor, float64

from .interface import Arguments, Work

_REINSTALL = "install the package again, as before but with `pip install -v --force-reinstall --no-deps`"

C: Any = None  # the module, or None
missing: str | None = None

try:
    C = import_module("eman_kernels._C")
except ModuleNotFoundError:
    missing = f"the compiled extension is not in this installation; with a C++ compiler in place, {_REINSTALL}"
    if platform.system() != "Linux":
        missing = f"the compiled extension is for Linux only, and this is {platform.system()}; use backend='auto'"
except ImportError as error:
    missing = f"the compiled extension does not load ({error}); {_REINSTALL}"


def pack_arguments(work: Work, arguments: Arguments) -> Any:
    """The arguments as the kernels take them, with addresses in the place of tensors."""
    table, momenta = work.table.data_ptr(), arguments.momenta  # type: ignore[union-attr]
    if type(momenta) is list:
        packed = C.Arguments(table, momenta[0])
        if len(momenta) > 1:
            packed.set_momenta(momenta)
    else:
        packed = C.Arguments(table, 0.0)
        packed.read_momenta(momenta.data_ptr(), work.n_teachers, momenta.dtype == float64)
    if arguments.found_inf is not None:
        packed.found_inf = arguments.found_inf.data_ptr()
    if work.general:
        packed.stochastic, packed.skip_nonfinite, packed.seed = work.stochastic, work.skip_nonfinite, arguments.seed
        if isinstance(arguments.step, Tensor):
            packed.step_address = arguments.step.data_ptr()
        else:
            packed.step = arguments.step & 0xFFFFFFFF
        if arguments.skipped is not None:
            packed.skipped = arguments.skipped.data_ptr()
    return packed
