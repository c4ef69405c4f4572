"""What every adapter must have: an extra, an ImportError that names it, tests, and an entry in the guide."""

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

from eman_kernels import integrations

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
GUIDE = ROOT / "docs" / "adapters.md"
MODULES = [module.name for module in pkgutil.iter_modules(integrations.__path__)]
LIBRARIES = [name for name in MODULES if name != "torch"]  # torch is always installed
PACKAGES = {"ignite": "pytorch-ignite"}  # where PyPI has another name


@pytest.mark.parametrize("library", LIBRARIES)
def test_import_error_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"eman_kernels.integrations.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'eman_kernels\[{library}\]'"):
        importlib.import_module(f"eman_kernels.integrations.{library}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_extra_requires_a_tested_version_of_the_library(library: str):
    package = PACKAGES.get(library, library)
    assert re.search(rf'^{library} = \[.*"{package}>=[\d.]+"', PYPROJECT, re.M)


def test_test_extra_includes_every_adapter():
    (extras,) = re.findall(r'"eman_kernels\[(.*)\]"', PYPROJECT)
    assert sorted(extras.split(",")) == LIBRARIES


@pytest.mark.parametrize("module", MODULES)
def test_adapter_is_tested_and_listed_in_the_package(module: str):
    assert (Path(__file__).parent / f"test_{module}.py").exists()
    assert re.search(rf"\b{module}\b", integrations.__doc__)


@pytest.mark.parametrize("module", MODULES)
def test_adapter_has_a_heading_or_table_row_in_the_guide(module: str):
    assert re.search(rf"^[#|].*{module}", GUIDE.read_text(), re.M | re.I)
