"""The EMAN teacher update in one multi-tensor pass.

``EMANTeacher`` is the teacher as a module; ``eman_update_`` replaces the loop in code that has a teacher already;
``ema_update_`` takes plain lists of tensors. ``schedules`` holds momentum as a function of the step, and
``available_backends()`` says what this machine can use and why not the rest.
"""

from . import schedules
from .backends import available_backends
from .functional import ema_update_, eman_update_, plan_for
from .teacher import EMANTeacher

__version__ = "0.1.0"
__all__ = ["EMANTeacher", "available_backends", "ema_update_", "eman_update_", "plan_for", "schedules"]
