"""A library that is not installed: an ImportError that names the extra."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("library", ["diffusers", "lightning", "transformers"])
def test_the_error_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"eman_kernels.integrations.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'eman_kernels\[{library}\]'"):
        importlib.import_module(f"eman_kernels.integrations.{library}")
