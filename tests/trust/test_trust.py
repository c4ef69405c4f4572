"""The seeded faults of faults.py apply to the current code. `make mutants` shows that the tests detect them."""

import pytest
from conftest import ROOT
from faults import FAULTS
from locating import find_code


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_applies_exactly_once(fault):
    found = find_code(ROOT, fault.where, fault.old)
    assert len(found) == 1, found
    assert fault.new.split() != fault.old.split()


def test_the_tests_of_each_fault_exist():
    files = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(set(files)) == len(files), "pytest imports test files by their name"
    for fault in FAULTS:
        names, _ = fault.selection()
        assert names, fault
        assert set(names) <= set(files), fault


def test_code_is_found_in_any_file_and_only_in_the_definition(tmp_path):
    package, csrc = tmp_path / "eman_kernels" / "deep", tmp_path / "csrc"
    package.mkdir(parents=True)
    csrc.mkdir()
    text = "LIMIT = 3\n\nclass A:\n    def f(self):\n        return  3\n\ndef f():\n    return 3 + LIMIT\n"
    (package / "some.py").write_text(text)
    (csrc / "some.h").write_text('int f(int x) {  // }\n  return g("{") + 3;\n}\nint g(int x) { return f(3); }\n')
    found = {where: [text[a:b] for p, a, b in find_code(tmp_path, where, "return 3") if p.suffix == ".py"]
             for where in ("A.f", "some.f", "f", "g")}  # fmt: skip
    assert found == {"A.f": ["return  3"], "some.f": ["return 3"], "f": ["return  3", "return 3"], "g": []}
    assert len(find_code(tmp_path, "LIMIT", "3")) == 1
    assert [path.name for path, *_ in find_code(tmp_path, "f", '") + 3')] == ["some.h"]
    assert [path.name for path, *_ in find_code(tmp_path, "g", "f(3)")] == ["some.h"]
