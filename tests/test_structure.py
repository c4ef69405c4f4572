"""The structure of the package: imports go downwards only, names are unique, and a forgotten list entry is found."""

import ast
import inspect
from collections import Counter
from dataclasses import fields
from pathlib import Path

import grimp
import pytest
import torch
from conftest import EMA_PAIRS, assert_same_bits
from torch import nn

import eman_kernels
from eman_kernels import EMANTeacher, EMANTeachers, Options, backends, ema_update_, eman_update_
from eman_kernels.backends.interface import Backend
from eman_kernels.integrations.torch import get_eman_multi_avg_fn
from eman_kernels.options import NETWORK_OPTIONS, TENSOR_OPTIONS, BackendName, TeacherOptions
from eman_kernels.plan.chunks import PAIR_CODES
from eman_kernels.update.state import TeacherState

PACKAGE = Path(eman_kernels.__file__).parent
# From the top. Modules of one level do not import each other.
LEVELS = [
    {"__main__", "integrations"},
    {"checkpoints"},
    {"functional", "teacher"},
    {"update"},
    {"plan"},
    {"networks"},
    {"backends", "options", "schedules"},
]


@pytest.fixture(scope="module")
def graph():
    """All imports, those under TYPE_CHECKING and inside functions included."""
    return grimp.build_graph("eman_kernels", cache_dir=None)


def test_imports_go_downwards_only(graph):
    children = {module.rpartition(".")[2] for module in graph.find_children("eman_kernels")} - {"_C"}
    assert children == set().union(*LEVELS), "each module at the top of the package is on one level"
    assert len(children | {"__init__"}) <= 12
    assert len(LEVELS) <= 7
    levels = [grimp.Layer(*level, independent=True) for level in LEVELS]
    upwards = graph.find_illegal_dependencies_for_layers(layers=levels, containers={"eman_kernels"})
    assert not upwards, [(each.importer, each.imported) for each in upwards]


def test_no_import_cycles(graph):
    cycles = [
        (module, imported)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if graph.chain_exists(importer=imported, imported=module)
    ]
    assert not cycles


def trees():
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def test_modules_are_short():
    assert {path.name: n for path in trees() if (n := len(path.read_text().splitlines())) > 400} == {}


def test_function_names_are_unique():
    """Except for the functions of an interface, those that every backend has, and the overloads of one function."""
    interface = {name for name in vars(Backend) if not name.startswith("_")}
    names = Counter(
        node.name
        for tree in trees().values()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in interface
        if not any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_private_attributes_are_read_in_their_own_module():
    """No module reads a private attribute that only another module of the package defines."""
    defined, read = {}, {}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                places = defined if isinstance(node.ctx, ast.Store) else read
                places.setdefault(node.attr, set()).add(path)
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                defined.setdefault(node.name, set()).add(path)
    inherited = {*dir(nn.Module), "_device"}  # _device is an attribute of Lightning's WeightAveraging too
    foreign = {name: paths - defined[name] for name, paths in read.items() if name in defined and name not in inherited}
    assert {name: paths for name, paths in foreign.items() if paths} == {}


# ---------------------------------------------------------------- lists that must be complete


def keywords(function):
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind == p.KEYWORD_ONLY}


def test_every_option_is_everywhere():
    """An option that is added to Options must be an argument of each function, an attribute of the teacher, and in the
    schema of the operator."""
    options = {field.name for field in fields(Options)}
    given = {"found_inf", "seed", "step", "skipped"}
    assert keywords(eman_update_) == options | given
    assert keywords(ema_update_) == options - set(NETWORK_OPTIONS) | given
    assert keywords(get_eman_multi_avg_fn) == options - set(NETWORK_OPTIONS) | {"seed"}
    own = set(inspect.signature(TeacherState).parameters) - {"momentum", "options"}
    assert keywords(EMANTeacher) == options | own | {"module", "keep_values", "dtype"}
    assert set(TeacherOptions.__annotations__) == options | own | {"dtype"}
    schema = torch.ops.eman_kernels.ema_update_.default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    assert {name: defaults[name] for name in TENSOR_OPTIONS} == {
        field.name: field.default for field in fields(Options) if field.name in TENSOR_OPTIONS
    }


OTHERS = {
    "rules": {"0.*": "copy"},
    "buffers": "copy",
    "backend": "reference",
    "rounding": "stochastic",
    "nonfinite": "skip",
    "sync_buffers": "mean",
}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).bfloat16()
        with torch.no_grad():
            net[1].running_mean.normal_()
            net[0].bias[3] = torch.nan
    return net


@pytest.mark.parametrize("name", [field.name for field in fields(Options)])
def test_every_option_reaches_the_update_and_the_graph(name):
    """Given to the constructor or assigned later, eager or compiled: the same bits, and other bits than by default."""
    student, results = network(), {}
    attribute = "buffer_rule" if name == "buffers" else name
    for how in ("default", "constructor", "assigned", "compiled"):
        given = {name: OTHERS[name]} if how in ("constructor", "compiled") else {}
        teacher = EMANTeacher(network(), 0.9, seed=3, **given)
        with torch.no_grad():
            for tensor in (*teacher.module.parameters(), teacher.module[1].running_mean):
                tensor.fill_(0.37)
        if how == "assigned":
            setattr(teacher, attribute, OTHERS[name])
        update = torch.compile(teacher.update, backend="eager") if how == "compiled" else teacher.update
        update(student)
        results[how] = teacher.module.state_dict()
        assert how == "default" or Options(**{name: OTHERS[name]}) == teacher.options
    changed = [not torch.equal(results["default"][n], t) for n, t in results["constructor"].items()]
    assert any(changed) or name in ("backend", "sync_buffers")  # the same bits by design, or in one process
    for how in ("assigned", "compiled"):
        for tensor_name, tensor in results["constructor"].items():
            assert_same_bits(results[how][tensor_name], tensor, f"{how}: {tensor_name}")


@pytest.mark.parametrize("name", [*(field.name for field in fields(Options)), "seed", "cast", "capturable"])
def test_every_option_is_shared_by_teachers_that_are_updated_together(name):
    student = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    teachers = EMANTeachers(student, [0.9, 0.99])
    other = OTHERS | {"seed": 5, "cast": torch.bfloat16, "capturable": True}
    setattr(teachers[1], "buffer_rule" if name == "buffers" else name, other[name])
    with pytest.raises(ValueError, match=f"equal options, but {name} of one is"):
        teachers.update(student)
    assert [teacher.step for teacher in teachers] == [0, 0]


def test_every_backend_can_be_requested():
    assert set(BackendName.__args__) == {"auto", *backends.BACKENDS}


def test_every_dtype_pair_of_the_kernels_is_tested():
    assert {pair[1:] for pair in PAIR_CODES} == set(EMA_PAIRS)
