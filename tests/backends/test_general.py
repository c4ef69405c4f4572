"""The general update, with every option, on every backend, against torch and the reference."""

import pytest
import torch
from conftest import (
    COPY_DTYPES,
    EMA_PAIRS,
    SIZES,
    Guarded,
    assert_same_bits,
    comparison,
    exchange,
    is_interpreted,
    lerp,
    planned,
    tensors_of,
    update,
    values,
    work_of,
)

from eman_kernels import backends, ema_update_, swapped
from eman_kernels.backends import reference
from eman_kernels.backends.interface import Arguments
from eman_kernels.networks.pairing import Pair
from eman_kernels.plan import chunks

HALF_PAIRS = [pair for pair in EMA_PAIRS if pair[0] in (torch.bfloat16, torch.float16)]
FLOAT_PAIRS = [pair for pair in EMA_PAIRS if pair[0] == torch.float32]
FLOATS = [dtype for dtype in COPY_DTYPES if dtype.is_floating_point] + [torch.float16]


def name_of(dtypes):
    return "<-".join(str(dtype)[6:] for dtype in dtypes)


def sizes(backend, device):
    """Fewer and smaller for the interpreter, which takes a millisecond per element here."""
    return [0, 1, 17, 2063] if is_interpreted(backend, device) else SIZES


@pytest.mark.parametrize("dtypes", HALF_PAIRS, ids=name_of)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (3, 3)], ids=lambda o: f"{o[0]}-{o[1]}-off")
@pytest.mark.parametrize("step", [5, torch.tensor((1 << 32) + 5)], ids=["number", "tensor"])
def test_stochastic_rounding_gives_the_references_bits(backend_and_device, dtypes, offsets, step):
    backend, device = backend_and_device
    step = step.to(device) if isinstance(step, torch.Tensor) else step
    same = comparison(backend, device, *dtypes)
    for momentum in (0.0, 0.9):
        teachers = [Guarded(values(size, dtypes[0]), offsets[0], device) for size in sizes(backend, device)]
        students = [Guarded(values(size, dtypes[1]), offsets[1], device) for size in sizes(backend, device)]
        expected = [t.tensor.clone() for t in teachers]
        options = {"rounding": "stochastic", "seed": 0xFFFFFFFE}
        ema_update_(expected, [s.tensor for s in students], momentum, backend="reference", step=5, **options)
        ema_update_(
            [t.tensor for t in teachers], [s.tensor for s in students], momentum, backend=backend, step=step, **options
        )
        for t, want in zip(teachers, expected, strict=True):
            same(t.tensor, want, f"{len(want)} elements, momentum {momentum}")
            assert t.intact()


def test_stochastic_rounding_depends_on_seed_step_and_tensor(backend_and_device):
    """Tensors in full precision are not affected."""
    backend, device = backend_and_device
    students = [torch.full((1000,), 1 / 3, device=device) for _ in range(3)]

    def results(seed, step):
        teachers = [torch.zeros(1000, dtype=d, device=device) for d in (torch.bfloat16, torch.bfloat16, torch.float32)]
        ema_update_(teachers, students, 0.5, backend=backend, rounding="stochastic", seed=seed, step=step)
        assert_same_bits(teachers[2], lerp(torch.zeros(1000), students[2], 0.5))
        return teachers[:2]

    first = results(0, 0)
    for other in (results(1, 0), results(0, 1)):
        for one, two in zip(first, other, strict=True):
            assert 0.3 < (one != two).float().mean() < 0.6
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, results(0, 0)))


@pytest.mark.parametrize("first", [1 << 35, (1 << 35) - 1024, 1 << 60], ids=hex)
def test_elements_beyond_the_first_2_to_the_35(backend_and_device, first):
    """The index of a group of eight needs more than 32 bits."""
    backend, device = backend_and_device
    student, teachers = torch.full((2048,), 1 / 3, device=device), []
    for module in (backends.BACKENDS[backend], reference):
        teachers.append(torch.zeros(2048, dtype=torch.float16, device=device))
        pair = Pair("", teachers[-1], student, "ema", first=first)
        module.run(
            work_of([pair], module, device, rounding="stochastic"), Arguments([0.5], seed=1, step=2), tensors_of([pair])
        )
    assert torch.equal(*teachers)
    assert 0.2 < (teachers[0] == teachers[0].max()).float().mean() < 0.8


@pytest.mark.parametrize("dtypes", FLOAT_PAIRS, ids=name_of)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_cast(backend_and_device, dtypes, low, offset):
    backend, device = backend_and_device
    pairs, casts, expected = [], [], []
    for rule in ("ema", "copy"):
        for size in sizes(backend, device):
            teacher, student = values(size, dtypes[0]), values(size, dtypes[1] if rule == "ema" else dtypes[0])
            expected.append(lerp(teacher, student, 0.9) if rule == "ema" else student)
            casts.append(Guarded(torch.zeros(size, dtype=low), offset, device))
            name = f"{rule} {size}"
            pairs.append(Pair(name, teacher.to(device), student.to(device), rule, cast=casts[-1].tensor))
    update(backend, pairs, Arguments([0.9]))
    for pair, cast, want in zip(pairs, casts, expected, strict=True):
        comparison(backend, device, pair.student.dtype)(pair.teacher, want, pair.name)
        comparison(backend, device, pair.student.dtype, low)(cast.tensor, want.to(low), pair.name)
        assert cast.intact()


@pytest.mark.parametrize("dtypes", EMA_PAIRS, ids=name_of)
@pytest.mark.parametrize("counted", [True, False])
def test_skip_nonfinite(backend_and_device, dtypes, counted):
    backend, device = backend_and_device
    teachers = [values(size, dtypes[0]).nan_to_num(1.0, 1.0, 1.0).to(device) for size in sizes(backend, device)]
    students = [values(size, dtypes[1]).to(device) for size in sizes(backend, device)]
    keeps = [~student.isfinite() for student in students]
    expected = [
        torch.where(keep.cpu(), t.cpu(), lerp(t, s, 0.5)) for t, s, keep in zip(teachers, students, keeps, strict=True)
    ]
    skipped = torch.tensor(7, device=device) if counted else None
    ema_update_(teachers, students, 0.5, backend=backend, nonfinite="skip", skipped=skipped)
    for teacher, want in zip(teachers, expected, strict=True):
        comparison(backend, device, *dtypes)(teacher, want, f"{len(want)} elements")
    n_skipped = sum(int(keep.sum()) for keep in keeps)
    assert n_skipped > 10
    assert skipped is None or skipped.item() == 7 + n_skipped


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_skip_nonfinite_where_floats_are_copied(backend_and_device, dtype):
    backend, device = backend_and_device
    teachers, students = torch.zeros(1009, dtype=dtype, device=device), values(1009, dtype).to(device)
    keep = ~students.isfinite()
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    update(backend, [Pair("", teachers, students, "copy")], Arguments([0.5], skipped=skipped), nonfinite="skip")
    comparison(backend, device, dtype)(teachers, torch.where(keep, 0, students))
    assert skipped == keep.sum() > 0


def test_skip_nonfinite_copies_integers(backend_and_device):
    backend, device = backend_and_device
    integers = torch.arange(-100, 100, device=device)
    teacher, skipped = torch.zeros_like(integers), torch.tensor(0, device=device)
    update(backend, [Pair("", teacher, integers, "copy")], Arguments([0.5], skipped=skipped), nonfinite="skip")
    assert torch.equal(teacher, integers)
    assert skipped == 0


@pytest.mark.parametrize("n_teachers", [2, 3, 8])
@pytest.mark.parametrize("on_device", [None, torch.float32, torch.float64], ids=str)
def test_several_teachers(backend_and_device, n_teachers, on_device):
    backend, device = backend_and_device
    momenta = [0.0, 0.999, 0.9, 0.25, 1.0, 0.5, 0.75, 0.3][:n_teachers]
    pairs, expected = [], []
    for group in range(n_teachers):
        torch.manual_seed(1)
        for dtypes in ((torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float64)):
            for size in sizes(backend, device)[1:]:
                student = torch.randn(size).to(dtypes[1])
                teacher = torch.randn(size).to(dtypes[0]) + group
                momentum = momenta[group] if on_device is None else torch.tensor(momenta[group], dtype=on_device).item()
                expected.append(lerp(teacher, student, momentum))
                name = f"{name_of(dtypes)} {size}"
                pairs.append(Pair(name, teacher.to(device), student.to(device), "ema", group))
        counter = torch.arange(5, device=device)
        pairs.append(Pair("counter", torch.zeros_like(counter), counter, "copy", group))
        expected.append(counter)
    # All teachers have the same student tensors, not copies.
    shared = {pair.name: pair.student for pair in pairs}
    pairs = [Pair(pair.name, pair.teacher, shared[pair.name], pair.rule, pair.group) for pair in pairs]
    call = Arguments(momenta if on_device is None else torch.tensor(momenta, dtype=on_device, device=device))
    update(backend, pairs, call)
    for pair, want in zip(pairs, expected, strict=True):
        assert_same_bits(pair.teacher, want, f"{pair.name} of teacher {pair.group}")


def test_the_first_of_several_teachers_is_rounded_as_if_alone(backend_and_device):
    backend, device = backend_and_device
    student = torch.randn(3000, device=device)
    alone, *several = (torch.zeros(3000, dtype=torch.bfloat16, device=device) for _ in range(4))
    update(backend, [Pair("", alone, student, "ema")], Arguments([0.5], seed=3, step=4), rounding="stochastic")
    pairs = [Pair("", teacher, student, "ema", group) for group, teacher in enumerate(several)]
    update(backend, pairs, Arguments([0.5, 0.5, 0.5], seed=3, step=4), rounding="stochastic")
    assert torch.equal(several[0], alone)
    assert not torch.equal(several[1], alone)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("found", [0.0, 1.0, float("nan")])
def test_found_inf(backend_and_device, general, found):
    """The kernel reads it, on whichever device it is stored."""
    backend, device = backend_and_device
    teacher, student = torch.zeros(20_000, device=device), torch.ones(20_000, device=device)
    student[7] = torch.inf
    cast = torch.full((20_000,), 9.0, dtype=torch.float16, device=device) if general else None
    counters = [torch.tensor([n], device=device) for n in (3, 900)]
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    pairs = [Pair("t", teacher, student, "ema", cast=cast), Pair("c", *counters, "copy")]
    update(
        backend,
        pairs,
        Arguments([0.75], torch.tensor(found, device=device), skipped=skipped),
        nonfinite="skip" if general else "propagate",
    )
    if found == 0.0:
        assert teacher[0] == 0.25
        assert counters[0] == 900
        assert skipped == general
        assert cast is None or cast[0] == 0.25
    else:
        assert not teacher.any()
        assert counters[0] == 3
        assert skipped == 0
        assert cast is None or backend == "foreach" or (cast == 9).all()


@pytest.mark.parametrize("dtype", [*COPY_DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (3, 3)], ids=lambda o: f"{o[0]}-{o[1]}-off")
def test_swap(backend_and_device, dtype, offsets):
    backend, device = backend_and_device
    both = [[Guarded(values(size, dtype), offset, device) for size in sizes(backend, device)] for offset in offsets]
    before = [[guard.tensor.clone() for guard in guards] for guards in both]
    pairs = [Pair(str(i), t.tensor, s.tensor, "swap") for i, (t, s) in enumerate(zip(*both, strict=True))]
    made, tensors = planned(pairs, backend)
    assert not made.ineligible
    exchange(made.swaps(tensors))
    for guards, want in zip(both, reversed(before), strict=True):
        for guard, tensor in zip(guards, want, strict=True):
            assert_same_bits(guard.tensor, tensor)
            assert guard.intact()


def test_swapped_is_a_context_that_restores(backend_and_device):
    backend, device = backend_and_device
    teacher, student = (torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30)) for _ in range(2))
    teacher.to(device), student.to(device)
    student[1].num_batches_tracked += 5
    before = [{name: t.clone() for name, t in net.state_dict().items()} for net in (teacher, student)]

    def hold(*states):
        for net, state in zip((teacher, student), states, strict=True):
            for name, tensor in net.state_dict().items():
                assert torch.equal(tensor, state[name]), name

    def fail():
        hold(*reversed(before))
        raise KeyError

    with pytest.raises(KeyError), swapped(teacher, student, backend=backend):
        fail()
    hold(*before)
    with swapped(teacher, student, backend=backend, rules={"1.*": "skip"}):
        assert torch.equal(student[0].weight, before[0]["0.weight"])
        assert student[1].num_batches_tracked == 5
    hold(*before)


def test_all_options_together(backend_and_device):
    """Two half-precision teachers, rounded stochastically; NaNs; momenta, step and found_inf on the device."""
    backend, device = backend_and_device
    student = values(5_000, torch.float32).to(device)
    starts = [torch.randn(5_000).to(device, torch.bfloat16) for _ in range(2)]
    results = []
    for name in ("reference", backend):
        teachers = [start.clone() for start in starts]
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        momenta = torch.tensor([0.9, 0.99], device=device)
        call = Arguments(momenta, torch.zeros((), device=device), 11, torch.tensor(12, device=device), skipped)
        pairs = [Pair("", teacher, student, "ema", group) for group, teacher in enumerate(teachers)]
        update(name, pairs, call, rounding="stochastic", nonfinite="skip")
        results.append([*teachers, skipped])
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)
    assert results[0][2] == (~student.isfinite()).sum()


def test_teachers_that_differ_use_the_reference():
    student = torch.ones(100)
    teachers = [torch.zeros(100), torch.zeros(100, dtype=torch.bfloat16)]
    made, tensors = planned([Pair("w", teacher, student, "ema", group) for group, teacher in enumerate(teachers)])
    assert made.ineligible == {"w": "its teachers differ in dtypes, devices or ties"}
    made.run(Arguments([0.75, 0.5]), tensors)
    assert (teachers[0] == 0.25).all()
    assert (teachers[1] == 0.5).all()
    # The second teacher ties two tensors that the first does not.
    one, two, tied = (torch.zeros(100) for _ in range(3))
    pairs = [Pair("a", one, student, "ema"), Pair("b", two, student, "ema")]
    made, tensors = planned([*pairs, Pair("a", tied, student, "ema", 1), Pair("b", tied, student, "ema", 1)])
    assert list(made.ineligible) == ["b"]
    made.run(Arguments([0.75, 0.5]), tensors)
    assert (one[0], two[0], tied[0]) == (0.25, 0.25, 0.5)


def test_chunks_of_one_student_piece_are_adjacent_in_the_table():
    lengths = [chunks.CHUNK_SIZE + 3, 10, 3 * chunks.CHUNK_SIZE, chunks.CHUNK_SIZE]
    students = [torch.zeros(size) for size in lengths]
    pairs = [Pair(str(i), torch.zeros(len(s)), s, "ema", group) for group in range(3) for i, s in enumerate(students)]
    pairs.sort(key=lambda pair: pair.name)
    table = chunks.build_table(pairs, 3).view(-1, 3, 4)
    assert len(table) == 2 + 1 + 3 + 1
    assert (table[:, :, 1] == table[:, :1, 1]).all()
    assert (table[:, :, 3] == table[:, :1, 3]).all()
    by_start = {pair.teacher.data_ptr(): pair.group for pair in pairs}
    for piece in table.tolist():
        for group, (teacher, *_) in enumerate(piece):
            start = max(address for address in by_start if address <= teacher)
            assert by_start[start] == group
    # Every student element is in exactly one piece.
    assert sum(packed & 0xFFFFFFFF for packed in table[:, 0, 3].tolist()) == sum(lengths)
