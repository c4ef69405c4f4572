"""The seeded faults of trust/faults.py apply to the current code. `make mutants` shows that the tests detect them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "trust"))

from faults import FAULTS  # noqa: E402


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_applies(fault):
    text = (ROOT / fault.path).read_text()
    assert text.count(fault.old) == 1
    assert fault.new != fault.old
    assert all((ROOT / "tests" / file).exists() for file in fault.tests.partition(" -k ")[0].split())
