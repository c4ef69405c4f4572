"""Correctness of a method: one update compared with torch.lerp (the gate for timing), and rules on a tiny network."""

import copy
from collections.abc import Mapping

import torch
from models import DTYPES, student_of, tensors_of
from torch import Tensor, nn
from updates import KINDS, Following, Method

RULES = (
    "float buffers averaged",
    "counters copied",
    "tied weights once",
    "non-persistent buffers",
    "fp32 teacher of a bf16 student",
    "bf16 teacher moves",
)
EMAN = RULES[:2]


def find_faults(following: Following, student: nn.Module, momentum: float, exact: bool) -> dict[str, str]:
    """Check one update; return the first wrong tensor of each of KINDS, with the reason.

    The update runs twice: from the teacher's current values, and from zero. Elsewhere a bf16 teacher's step is smaller
    than its rounding error, and would not be seen.
    """
    parameters = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    begin = {name: tensor.clone() for name, tensor in following.teacher.items()}
    found: dict[str, str] = {}
    for from_zero in (False, True):
        for tensor in following.teacher.values() if from_zero else ():
            tensor.zero_()
        following.update()
        for name, followed in tensors_of(student).items():
            kind = KINDS[0] if name in parameters else KINDS[1] if followed.is_floating_point() else KINDS[2]
            old = None if from_zero else begin.get(name)
            if kind not in found and (fault := find_fault(name, following.teacher, old, followed, momentum, exact)):
                found[kind] = fault
    for name, tensor in following.teacher.items():
        tensor.copy_(begin[name])
    return found


def find_fault(
    name: str, teacher: Mapping[str, Tensor], old: Tensor | None, followed: Tensor, momentum: float, exact: bool
) -> str | None:
    """Return what is wrong with this tensor, or None. Before the update it was `old`, or zero if that is None."""
    if name not in teacher:
        return f"{name} is missing"
    tensor = teacher[name]
    if not tensor.is_floating_point():
        return None if torch.equal(tensor, followed) else f"{name} differs from the student's"
    begin = torch.zeros_like(followed) if old is None else old
    want = torch.lerp(begin.float(), followed.float(), 1.0 - momentum).to(tensor.dtype)
    # Other formulas also round their products, each in the dtype of its tensor.
    rounding = torch.finfo(tensor.dtype).eps + (1.0 - momentum) * torch.finfo(followed.dtype).eps
    slack = 2 * rounding * max(begin.abs().max(), followed.abs().max())
    if old is None:  # some formulas also round the momentum to float32
        slack = (2 * torch.finfo(tensor.dtype).eps + 2 * torch.finfo(followed.dtype).eps + 1e-4) * want.abs().max()
    wrong = ((tensor.float() - want.float()).abs() > (0 if exact else slack)).any()
    return f"{name} differs from torch.lerp's result" if wrong else None


class Tiny(nn.Module):
    """Tied weights, BatchNorm with its counter, and a non-persistent buffer."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(width, width), nn.Linear(width, width)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("scale", torch.ones(width), persistent=False)


def check_rules(method: Method, device: torch.device) -> dict[str, str]:
    """Run the method and return for each of RULES: "yes", "no", or the error it raises."""
    torch.manual_seed(0)
    teacher = Tiny().requires_grad_(False).to(device)
    student = student_of(teacher)

    def one_step() -> list[str]:
        mine = copy.deepcopy(teacher)
        following = method.make(mine, student, 0.9)
        before = {name: tensor.clone() for name, tensor in following.teacher.items()}
        following.update()
        names = ("norm.running_var", "norm.num_batches_tracked", "first.weight", "scale")
        right = []
        for name in names:
            followed = tensors_of(student)[name]
            wrong = find_fault(name, following.teacher, before.get(name), followed, 0.9, exact=False)
            right.append("no" if wrong else "yes")
        return right

    def mixed() -> list[str]:
        mine, theirs = copy.deepcopy(teacher), copy.deepcopy(student).to(DTYPES["mixed"][1])
        following = method.make(mine, theirs, 0.9)
        bias, followed = following.teacher["first.bias"], theirs.first.bias
        before = bias.clone()
        following.update()
        wrong = find_fault("first.bias", following.teacher, before, followed, 0.9, exact=False)
        return ["no" if wrong or bias.dtype != DTYPES["mixed"][0] else "yes"]

    def moves() -> list[str]:
        mine = copy.deepcopy(teacher).bfloat16()
        nn.init.uniform_(mine.first.weight, 1, 2)
        theirs = copy.deepcopy(mine).requires_grad_(True)
        theirs.first.weight.mul_(1.05)
        following = method.make(mine, theirs, 0.999)
        begin = following.teacher["first.weight"].double().clone()
        for _ in range(100):
            following.update()
        gap = theirs.first.weight.double() - begin
        moved = (following.teacher["first.weight"].double() - begin).mean() / gap.mean()
        expected = 1 - 0.999**100
        return ["yes" if abs(moved / expected - 1) < 0.1 else "no"]

    kept: list[str] = []
    for part, answers in ((one_step, 4), (mixed, 1), (moves, 1)):
        try:
            kept += part()
        except RuntimeError as error:
            kept += [f"raises: {str(error).splitlines()[0]}"] * answers
    return dict(zip(RULES, kept, strict=True))


def describe_error(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def rules_rows(methods: dict[str, Method | str], device: torch.device) -> list[dict]:
    """One row per method that is available here."""
    rows = []
    for name, method in methods.items():
        if isinstance(method, str):
            continue
        try:
            with torch.no_grad():
                rules = check_rules(method, device)
        except ImportError:
            continue  # the timing tables show the import error
        except Exception as error:  # e.g. an incompatible version of a library; check the others
            rules = dict.fromkeys(RULES, f"raises: {describe_error(error)}")
        rows.append({"kind": "rules", "method": name, "rules": rules})
    return rows
