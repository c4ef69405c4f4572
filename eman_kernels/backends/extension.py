"""The compiled extension, or why there is none. Import never fails for want of a compiler."""

from types import ModuleType

missing: str | None = None
C: ModuleType | None = None

try:
    from .. import _C as C  # noqa: F401  the other backends take it from here
except ImportError as error:
    missing = (
        "the compiled extension is not in this installation; install a C++ compiler and run "
        f"`pip install --force-reinstall --no-deps eman_kernels` again ({error})"
    )
