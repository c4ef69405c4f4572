"""The EMAN teacher update in one multi-tensor pass.

``EMANTeacher`` is the teacher as a module, ``EMANTeachers`` are several teachers of one student. ``eman_update_``
replaces the loop in code that already has a teacher, ``ema_update_`` takes plain lists of tensors. ``swapped``
evaluates the teacher in the student's place. ``load_ema_checkpoint`` loads averages that other libraries have saved.
``Snapshots`` stores averages during the training, and ``synthesize`` makes averages of any length from them afterwards.
``schedules`` contains momentum as a function of the step, ``Options`` documents the options of all of them, and
``available_backends()`` tells which backends this machine supports, and why not the others.
"""

from . import schedules
from .backends import available_backends
from .checkpoints import Snapshots, load_ema_checkpoint, synthesize
from .functional import ema_update_, eman_update_, plan_for, swapped
from .options import Options, Rule
from .teacher import EMANTeacher, EMANTeachers
from .update import operator as ops
from .update.state import Momentum

__version__ = "0.1.0"
__all__ = [
    "EMANTeacher",
    "EMANTeachers",
    "Momentum",
    "Options",
    "Rule",
    "Snapshots",
    "available_backends",
    "ema_update_",
    "eman_update_",
    "load_ema_checkpoint",
    "ops",
    "plan_for",
    "schedules",
    "swapped",
    "synthesize",
]
