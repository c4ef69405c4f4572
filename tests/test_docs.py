"""The API reference: every public name has an example, every example is run, and `make docs` finds all of them."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import eman_kernels

# No docstrings can be given to these.
ALIASES = {"Momentum", "Rule"}


def public():
    """Each public name, the classes and functions of public modules among them."""
    for name in eman_kernels.__all__:
        thing = getattr(eman_kernels, name)
        if isinstance(thing, ModuleType):
            own = vars(thing).items()
            for inner, one in own:
                if not inner.startswith("_") and getattr(one, "__module__", None) == thing.__name__:
                    yield f"{name}.{inner}", one
        if name not in ALIASES and name != "schedules":
            yield name, thing


@pytest.mark.parametrize(("name", "thing"), public())
def test_every_public_name_has_an_example(name, thing):
    assert ">>> " in inspect.getdoc(thing)


def modules():
    walked = pkgutil.walk_packages(eman_kernels.__path__, "eman_kernels.")
    return sorted(module.name for module in walked if module.name.rpartition(".")[2] not in ("__main__", "_C"))


@pytest.mark.parametrize("name", modules())
def test_the_examples_give_what_they_show(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    done = doctest.testmod(module)
    assert done.failed == 0


def test_the_reference_has_every_public_name(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install '.[test]'")
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", tmp_path, "eman_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(eman_kernels.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    page = (tmp_path / "eman_kernels.html").read_text()
    for name in eman_kernels.__all__:
        assert f'id="{name}"' in page or (tmp_path / "eman_kernels" / f"{name}.html").exists(), name
