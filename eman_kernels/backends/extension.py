"""The compiled extension, or why there is none. Import never fails for want of a compiler."""

from importlib import import_module
from types import ModuleType

_AGAIN = "install the package again (`pip install -v --force-reinstall --no-deps .`)"

C: ModuleType | None = None
missing: str | None = None

try:
    C = import_module("eman_kernels._C")
except ModuleNotFoundError:
    missing = f"the compiled extension is not in this installation; with a C++ compiler in place, {_AGAIN}"
except ImportError as error:
    missing = f"the compiled extension does not load ({error}); {_AGAIN}"
