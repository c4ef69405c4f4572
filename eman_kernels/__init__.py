"""The EMAN teacher update in one multi-tensor pass.

``EMANTeacher`` is the teacher as a module, ``EMANTeachers`` are several of one student; ``eman_update_`` replaces the
loop in code that has a teacher already; ``ema_update_`` takes plain lists of tensors; ``swapped`` evaluates the teacher
in the student's place; ``load_ema_checkpoint`` takes over another library's average. ``schedules`` holds momentum as a
function of the step, and ``available_backends()`` says what this machine can use and why not the rest.
"""

from . import ops, schedules
from .backends import available_backends
from .checkpoints import load_ema_checkpoint
from .functional import ema_update_, eman_update_, plan_for
from .pairing import Rule
from .swap import swapped
from .teacher import EMANTeacher, Momentum
from .teachers import EMANTeachers

__version__ = "0.1.0"
__all__ = [
    "EMANTeacher",
    "EMANTeachers",
    "Momentum",
    "Rule",
    "available_backends",
    "ema_update_",
    "eman_update_",
    "load_ema_checkpoint",
    "ops",
    "plan_for",
    "schedules",
    "swapped",
]
