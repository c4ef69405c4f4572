"""The compiled extension, or why there is none. Import never fails for want of a compiler."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import Tensor, float64

_AGAIN = "install the package again (`pip install -v --force-reinstall --no-deps .`)"

C: ModuleType | None = None
missing: str | None = None

try:
    C = import_module("eman_kernels._C")
except ModuleNotFoundError:
    missing = f"the compiled extension is not in this installation; with a C++ compiler in place, {_AGAIN}"
    if (Path(__file__).parents[2] / "setup.py").exists():
        missing += ". This is a clone, which in its folder hides a package that `pip install .` has installed"
except ImportError as error:
    missing = f"the compiled extension does not load ({error}); {_AGAIN}"


def call_of(work, call):
    """The call as the kernels take it: addresses of what lies on the device."""
    table, momenta = work.table.data_ptr(), call.momenta
    if not work.general and call.found_inf is None and type(momenta) is list:
        return C.Call(table, momenta[0])
    options = {}
    if isinstance(momenta, Tensor):
        options = {"momenta_address": momenta.data_ptr(), "momenta_are_double": momenta.dtype == float64}
        momenta = work.n_teachers * [0.0]
    if call.found_inf is not None:
        options["found_inf"] = call.found_inf.data_ptr()
    if work.general:
        options |= {"stochastic": work.stochastic, "skip_nonfinite": work.skip_nonfinite, "seed": call.seed}
        if isinstance(call.step, Tensor):
            options["step_address"] = call.step.data_ptr()
        else:
            options["step"] = call.step & 0xFFFFFFFF
        if call.skipped is not None:
            options["skipped"] = call.skipped.data_ptr()
    return C.Call(table, momenta, **options)
