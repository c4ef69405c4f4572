"""NaNs and infinities in teacher or student, on every backend: equal values, momentum 0 and 1, skipping and healing."""

import pytest
import torch
from conftest import (
    EMA_PAIRS,
    NUMBERS,
    Guarded,
    assert_same_bits,
    comparison,
    every_number,
    is_interpreted,
    lerp,
    skip_unless_selectable,
    tensors_of,
    update,
    work_of,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eman_kernels import EMANTeacher, ema_update_, eman_update_
from eman_kernels.backends import foreach
from eman_kernels.backends.interface import Arguments
from eman_kernels.networks.pairing import Pair

pytestmark = pytest.mark.filterwarnings("ignore:.*does not move")  # every dtype at every momentum

MOMENTA = [0.0, 0.3, 0.5, 0.999, 1.0]
INF, NAN = torch.inf, torch.nan
HALVES = (torch.bfloat16, torch.float16)
HALF_PAIRS = [pair for pair in EMA_PAIRS if pair[0] in HALVES]
FLOAT_PAIRS = [pair for pair in EMA_PAIRS if pair[0] == torch.float32]


def name_of(dtypes):
    return "<-".join(str(dtype)[6:] for dtype in dtypes)


every_pair = pytest.mark.parametrize("dtypes", EMA_PAIRS, ids=name_of)
every_momentum = pytest.mark.parametrize("momentum", MOMENTA)
as_what = pytest.mark.parametrize("in_tensor", [None, torch.float32, torch.float64], ids=["number", "float", "double"])


def with_payloads(tensor):
    """A copy in which each NaN has different payload bits."""
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.clone().view(as_integer)
    where = tensor.isnan().nonzero().flatten()
    bits[where] |= 1 + torch.arange(len(where)).to(as_integer) % 16
    return bits.view(tensor.dtype)


def bits_of(tensor):
    return tensor.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def given(momentum, in_tensor, device):
    return momentum if in_tensor is None else torch.tensor(momentum, dtype=in_tensor, device=device)


def as_held(momentum, in_tensor):
    return momentum if in_tensor is None else torch.tensor(momentum, dtype=in_tensor).item()


@every_pair
@every_momentum
@as_what
def test_every_number_against_every_other(backend_and_device, dtypes, momentum, in_tensor):
    """torch.lerp where both differ and 0 < momentum < 1; the teacher's bits at momentum 1; the cast student at 0."""
    backend, device = backend_and_device
    teacher, student = every_number(*dtypes)
    teacher = with_payloads(teacher)
    for offset in (0, 1):
        got = Guarded(teacher, offset, device)
        ema_update_([got.tensor], [student.to(device)], given(momentum, in_tensor, device), backend=backend)
        if momentum == 1:
            assert torch.equal(bits_of(got.tensor), bits_of(teacher))
        want = lerp(teacher, student, as_held(momentum, in_tensor))
        comparison(backend, device, *dtypes)(got.tensor, want)
        assert got.intact()


@every_pair
@every_momentum
def test_closed_answers(backend_and_device, dtypes, momentum):
    """Expected values written by hand, one element per rule."""
    backend, device = backend_and_device
    cases = [(INF, INF, INF), (-INF, -INF, -INF), (0.0, 0.0, 0.0), (-2.5, -2.5, -2.5)]
    if momentum == 0:
        cases += [(t, s, s) for t in NUMBERS for s in NUMBERS]
    elif momentum == 1:
        cases += [(t, s, t) for t in NUMBERS for s in NUMBERS]
    else:
        cases += [
            (NAN, 1.0, NAN),
            (1.0, NAN, NAN),
            (NAN, INF, NAN),
            (NAN, NAN, NAN),
            (INF, -INF, NAN),
            (-INF, INF, NAN),
        ]
        if momentum == 0.999:
            cases += [(1.0, INF, INF), (1.0, -INF, -INF), (INF, 1.0, NAN)]
    teacher, student, want = (torch.tensor(column, dtype=torch.float64) for column in zip(*cases, strict=True))
    got = teacher.to(device, dtypes[0], copy=True)
    ema_update_([got], [student.to(device, dtypes[1])], momentum, backend=backend)
    expected = want.to(dtypes[1]).to(dtypes[0]) if momentum == 0 else want.to(dtypes[0])
    comparison(backend, device, *dtypes)(got, expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float64)], ids=name_of)
def test_a_momentum_that_rounds_to_0_is_0(backend_and_device, dtypes):
    """Rounded in the precision of the arithmetic: 1 - 1e-9 is 1 in float32."""
    backend, device = backend_and_device
    teacher = torch.tensor([INF, -INF, NAN, 3.0]).to(device, dtypes[0])
    student = torch.tensor([1.0, INF, 2.0, -INF]).to(device, dtypes[1])
    for momentum in (1e-9, torch.tensor(1e-9, dtype=torch.float64, device=device)):
        got = teacher.clone()
        ema_update_([got], [student], momentum, backend=backend)
        exact = dtypes[0] == torch.float32
        assert_same_bits(got, student if exact else torch.lerp(teacher.cpu(), student.cpu(), 1 - 1e-9))


@every_pair
@as_what
def test_several_teachers(backend_and_device, dtypes, in_tensor):
    backend, device = backend_and_device
    start, student = every_number(*dtypes)
    start, shared = with_payloads(start), student.to(device)
    teachers = [start.clone().to(device) for _ in MOMENTA]
    pairs = [Pair("", teacher, shared, "ema", group) for group, teacher in enumerate(teachers)]
    update(
        backend,
        pairs,
        Arguments(MOMENTA if in_tensor is None else torch.tensor(MOMENTA, dtype=in_tensor, device=device)),
    )
    for momentum, teacher in zip(MOMENTA, teachers, strict=True):
        want = lerp(start, student, as_held(momentum, in_tensor))
        comparison(backend, device, *dtypes)(teacher, want, f"momentum {momentum}")
    assert torch.equal(bits_of(teachers[-1]), bits_of(start))


@pytest.mark.parametrize("dtypes", FLOAT_PAIRS, ids=name_of)
@pytest.mark.parametrize("low", HALVES, ids=str)
@every_momentum
def test_the_low_precision_copy(backend_and_device, dtypes, low, momentum):
    """It is written at every momentum, with the teacher's new value."""
    backend, device = backend_and_device
    teacher, student = every_number(*dtypes)
    got, copy = teacher.to(device, copy=True), torch.full(teacher.shape, 9.0, dtype=low, device=device)
    update(backend, [Pair("", got, student.to(device), "ema", cast=copy)], Arguments([momentum]))
    want = lerp(teacher, student, momentum)
    comparison(backend, device, *dtypes)(got, want)
    comparison(backend, device, *dtypes, low)(copy, want.to(low))


@pytest.mark.parametrize("dtypes", HALF_PAIRS, ids=name_of)
@every_momentum
@as_what
def test_stochastic_rounding_is_exact_where_the_average_is(backend_and_device, dtypes, momentum, in_tensor):
    """Equal values, momentum 0 and 1, and non-finite values do not depend on the random bits."""
    backend, device = backend_and_device
    teacher, student = every_number(*dtypes)
    teacher = with_payloads(teacher)
    for step in range(2):
        got = teacher.to(device, copy=True)
        options = {"rounding": "stochastic", "step": step, "backend": backend}
        ema_update_([got], [student.to(device)], given(momentum, in_tensor, device), **options)
        want = lerp(teacher, student, as_held(momentum, in_tensor))
        wide = (
            teacher.float() if momentum == 1 else lerp(teacher.float(), student.float(), as_held(momentum, in_tensor))
        )
        exact = (want.float() == wide) | wide.isnan() | wide.isinf()
        assert exact[(teacher == student) | ~student.isfinite()].all()
        assert exact.all() or 0 < momentum < 1
        comparison(backend, device, *dtypes)(got[exact.to(device)], want[exact])
        if momentum == 1:
            assert torch.equal(bits_of(got), bits_of(teacher))


def test_momentum_0_still_rounds_stochastically(backend_and_device):
    """A float32 student between two bfloat16 numbers, and a bfloat16 teacher that was infinite."""
    backend, device = backend_and_device
    between = 1 + 2.0**-8
    teacher = torch.full((4096,), INF, dtype=torch.bfloat16, device=device)
    student = torch.full((4096,), between, device=device)
    ema_update_([teacher], [student], 0.0, rounding="stochastic", step=1, backend=backend)
    assert teacher.unique().tolist() == [1.0, 1 + 2.0**-7]
    assert teacher.double().mean().item() == pytest.approx(between, abs=2.0**-7 * 4 / 2 / 64)


@every_pair
@every_momentum
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@as_what
def test_skipping_and_healing(backend_and_device, dtypes, momentum, rounding, in_tensor):
    """A non-finite student element is skipped and counted; a finite one replaces a non-finite teacher element, except
    at momentum 1, which writes nothing new."""
    backend, device = backend_and_device
    teacher, student = every_number(*dtypes)
    teacher = with_payloads(teacher)
    finite, heals = student.isfinite(), student.isfinite() & ~teacher.isfinite()
    want = lerp(teacher, student, as_held(momentum, in_tensor))
    want[heals] = student[heals].to(dtypes[0])
    want[~finite] = teacher[~finite]
    if momentum == 1:
        want = teacher
    got, skipped = teacher.to(device, copy=True), torch.tensor(7, device=device)
    options = {"rounding": rounding, "step": 1, "nonfinite": "skip", "skipped": skipped, "backend": backend}
    ema_update_([got], [student.to(device)], given(momentum, in_tensor, device), **options)
    exact = torch.ones_like(heals)
    if rounding == "stochastic" and dtypes[0] in HALVES and 0 < momentum < 1:
        exact = heals | ~finite | (teacher == student)
    comparison(backend, device, *dtypes)(got[exact.to(device)], want[exact])
    untouched = torch.ones_like(finite) if momentum == 1 else ~finite
    assert torch.equal(bits_of(got)[untouched], bits_of(teacher)[untouched])
    if momentum < 1:
        assert got.cpu()[finite & (teacher.float().abs() < 1e4)].isfinite().all()
        assert got.cpu()[heals].isfinite().all()
    assert heals.sum() > 100
    assert skipped.item() == 7 + (~finite).sum()


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_copied_tensors_are_copied_at_every_momentum(backend_and_device, momentum, dtype):
    """The rule "copy" ignores the momentum; skipping omits non-finite elements, and the low-precision copy follows."""
    backend, device = backend_and_device
    start, student = every_number(dtype, dtype)
    teacher, skipped = start.to(device, copy=True), torch.tensor(0, device=device)
    update(
        backend,
        [Pair("", teacher, student.to(device), "copy")],
        Arguments([momentum], skipped=skipped),
        nonfinite="skip",
    )
    want = torch.where(student.isfinite(), student, start)
    comparison(backend, device, dtype)(teacher, want)
    assert skipped == (~student.isfinite()).sum()
    if dtype == torch.float32:
        teacher, low = start.to(device, copy=True), torch.zeros(start.shape, dtype=torch.float16, device=device)
        update(backend, [Pair("", teacher, student.to(device), "copy", cast=low)], Arguments([momentum]))
        assert_same_bits(teacher, student)
        assert_same_bits(low, student.half())


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_0_and_1_when_gradients_overflowed(backend_and_device, momentum):
    backend, device = backend_and_device
    teacher, student = every_number(torch.float32, torch.float32)
    got = teacher.to(device, copy=True)
    ema_update_([got], [student.to(device)], momentum, found_inf=torch.ones((), device=device), backend=backend)
    assert torch.equal(bits_of(got), bits_of(teacher))


class Observer(nn.Module):
    """Running extremes that start at infinity, and a causal mask."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("smallest", torch.tensor(INF))
        self.register_buffer("largest", torch.tensor(-INF))
        self.register_buffer("mask", torch.full((70, 70), -INF).triu(1))


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"cast": torch.bfloat16}], ids=str)
def test_a_network_with_infinite_buffers(backend_and_device, options):
    backend, device = backend_and_device
    if is_interpreted(backend, device) and "cast" in options:
        pytest.skip("the interpreter truncates to bfloat16")
    student = Observer().to(device)
    teacher = EMANTeacher(student, momentum=0.9, backend=backend, **options)
    mask = student.mask.clone()
    for _ in range(3):
        teacher.update(student)
        assert torch.equal(teacher.module.mask, mask)
        assert teacher.module.smallest == INF
        assert teacher.module.largest == -INF
    teacher.update(student, momentum=0.0)
    assert torch.equal(teacher.module.mask, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_poisoned_teacher_heals_only_with_skip(backend_and_device, dtype):
    backend, device = backend_and_device
    student = torch.linspace(-2, 2, 1009).to(device, dtype)
    poisoned = student.clone()
    poisoned[::3], poisoned[1::3] = NAN, INF
    for nonfinite in ("propagate", "skip"):
        teacher = poisoned.clone()
        for step in range(3):
            options = {"nonfinite": nonfinite, "backend": backend, "rounding": "stochastic", "step": step}
            ema_update_([teacher], [student], 0.5, **options)
        assert torch.equal(teacher, student) == (nonfinite == "skip")
        assert teacher.isnan().any() == (nonfinite == "propagate")


# ---------------------------------------------------------------- dtypes that only the reference updates

OTHERS = [
    (torch.complex64, torch.complex64),
    (torch.complex128, torch.complex64),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float64),
    (torch.float8_e5m2, torch.float32),
    (torch.float8_e5m2, torch.float8_e5m2),
    (torch.float32, torch.float8_e5m2),
]


def wide(tensor):
    """Convert to a dtype in which torch can compare."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def same(one, other):
    one, other = (
        torch.view_as_real(wide(one).to(torch.complex128)),
        torch.view_as_real(wide(other).to(torch.complex128)),
    )
    return ((one == other) | (one.isnan() & other.isnan())).all()


@pytest.mark.parametrize("dtypes", OTHERS, ids=name_of)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_dtypes_that_only_the_reference_supports(dtypes, nonfinite):
    skip_unless_selectable(dtypes[0])
    numbers = torch.tensor([INF, -INF, NAN, 0.0, 1.0, -2.5], dtype=torch.float64)
    teacher, student = (
        column.to(dtype) for column, dtype in zip(torch.meshgrid(numbers, numbers, indexing="ij"), dtypes, strict=True)
    )
    equal = wide(teacher) == wide(student)
    finite, healthy = wide(student).isfinite(), wide(teacher).isfinite()
    skips = nonfinite == "skip"
    for momentum in (0.0, 0.5, 0.999, 1.0, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.999)):
        got, skipped = teacher.clone(), torch.tensor(0)
        ema_update_([got], [student], momentum, nonfinite=nonfinite, skipped=skipped)
        taken = equal | (torch.ones_like(equal) if momentum == 0 else ~healthy & skips)
        left = torch.ones_like(equal) if momentum == 1 else ~finite & skips
        assert same(got[left], teacher[left])
        assert same(got[taken & ~left], student.to(dtypes[0])[taken & ~left])
        between = finite & healthy & ~left & ~taken
        if 0 < momentum < 1:
            exact = wide(teacher) + (1 - wide(torch.tensor(float(momentum)))) * (wide(student) - wide(teacher))
            error = (wide(got) - exact)[between].abs()
            assert (error <= 0.126 * exact[between].abs()).all()  # float8_e5m2 has 2 mantissa bits
            assert between.sum() >= 6
        assert skipped == (int((~finite).sum()) if skips else 0)


def test_a_copied_buffer_of_a_dtype_whose_finiteness_no_kernel_checks():
    dtype = torch.float8_e5m2
    skip_unless_selectable(dtype)
    teacher, student = nn.Module(), nn.Module()
    for module, number in ((teacher, 1.0), (student, 2.0)):
        module.register_buffer("b", torch.tensor([number, NAN, number]).to(dtype))
    student.b[0] = NAN
    skipped = torch.tensor(0)
    eman_update_(teacher, student, 0.5, buffers="copy", nonfinite="skip", skipped=skipped)
    assert same(teacher.b, torch.tensor([1.0, NAN, 2.0]))
    assert skipped == 2


# ---------------------------------------------------------------- infinities that appear after the plan was made


@pytest.mark.parametrize("momentum", [0.25, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_that_become_infinite_after_the_plan(backend_and_device, dtype, momentum):
    """Both signs, in one tensor of several, for several updates, and finite again: the bits of the reference."""
    backend, device = backend_and_device
    start, changed = every_number(dtype, dtype)
    students = [torch.linspace(-2, 2, start.numel()).to(device, dtype) for _ in range(3)]
    teachers = [student.flip(0).contiguous() for student in students]
    expected = [teacher.cpu().clone() for teacher in teachers]

    def follow():
        ema_update_(teachers, students, momentum, backend=backend)
        for i, (teacher, student) in enumerate(zip(teachers, students, strict=True)):
            expected[i] = lerp(expected[i], student.cpu(), momentum)
            comparison(backend, device, dtype, dtype)(teacher, expected[i])

    follow()
    follow()
    finite = students[1].clone()
    students[1].copy_(changed)
    for _ in range(3):
        follow()
    teachers[1].copy_(start)
    expected[1] = start
    follow()
    assert (expected[1] == INF).any()  # where the plain formula gives NaN
    students[1].copy_(finite)
    follow()


def updated_as_on_a_gpu(teachers, students, momentum):
    """By the operations that foreach uses on a GPU. Returns them, without views, which launch nothing."""
    pairs = [Pair("", *pair, "ema") for pair in zip(teachers, students, strict=True)]
    work = work_of(pairs, foreach, torch.device("xpu", 0))
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if not operation.is_view:
                seen.append(operation)
            return operation(*args, **(kwargs or {}))

    with Record():
        foreach.run(work, Arguments([momentum]), tensors_of(pairs))
    return seen


@pytest.mark.parametrize("limit", [1, 100, 1 << 27])
@pytest.mark.parametrize("momentum", [0.25, 0.75])
def test_foreach_joins_tensors_where_each_operation_is_a_launch(monkeypatch, limit, momentum):
    monkeypatch.setattr(foreach, "_JOINED_BYTES", limit)
    start, student = every_number(torch.float32, torch.float32)
    shapes = [(-1,), (1, -1), (-1, 1, 1), (start.numel() // 3, 3) if start.numel() % 3 == 0 else (-1, 1)]
    students = [student.reshape(shape).clone() for shape in shapes]
    teachers = [start.reshape(shape).clone() for shape in shapes]
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    teachers.append(last.clone())
    students.append(torch.randn_like(last))
    expected = [lerp(*pair, momentum) for pair in zip(teachers, students, strict=True)]
    operations = updated_as_on_a_gpu(teachers, students, momentum)
    for teacher, want in zip(teachers, expected, strict=True):
        assert_same_bits(teacher, want)
    assert len(operations) <= 6 * (1 if limit > 100 else len(teachers))


def test_foreach_needs_few_launches_for_a_resnet50():
    torchvision = pytest.importorskip("torchvision")
    networks = [torchvision.models.resnet50() for _ in range(2)]
    tensors = [[t.detach() for t in net.state_dict().values() if t.is_floating_point()] for net in networks]
    operations = updated_as_on_a_gpu(*tensors, 0.999)
    assert len(operations) <= 7  # and one for the integer buffers
    reads = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
    assert not reads & set(operations)
