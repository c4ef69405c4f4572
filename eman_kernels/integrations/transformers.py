"""A callback for transformers' Trainer that maintains an EMANTeacher.

```python
from transformers import Trainer, TrainingArguments
from eman_kernels.integrations.transformers import EMANCallback

average = EMANCallback(momentum=0.999)
arguments = TrainingArguments(folder, **options)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[average])
trainer.train()
average.teacher.module.save_pretrained(folder + "/average")
```

Tested with transformers 5.24.0 and accelerate 1.15.0.
"""

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from ..teacher import EMANTeacher
from ..update.state import Momentum

if find_spec("transformers") is None:
    raise ImportError(
        "eman_kernels.integrations.transformers needs transformers, which is not installed: "
        "pip install 'eman_kernels[transformers]'"
    )

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "eman_teacher.pt"


class EMANCallback(TrainerCallback):
    """Updates ``callback.teacher``, an EMANTeacher, after each optimizer step that is actually taken.

    The teacher is saved as ``eman_teacher.pt`` in each checkpoint's folder and loaded from there when training resumes;
    the checkpoint's model is the student. After training, ``callback.teacher`` is the average and the model is the
    student, both from the best checkpoint if ``load_best_model_at_end`` is set.

    Args:
        momentum: as in EMANTeacher; default 0.999.
        evaluate_with: "teacher" (default) evaluates the average during training: the values of teacher and model are
            swapped while ``evaluate`` runs. If it raises, they stay swapped until the next training starts or
            ``swap_back()`` is called. "student" evaluates the model. Outside of training, use
            ``with callback.teacher.swapped():``.
        options: keyword options of EMANTeacher. The default of rounding is "stochastic", which a bf16 model needs.

    Raises:
        ValueError: evaluate_with is not one of the two; see also EMANTeacher, which is created when training starts.
    """

    def __init__(
        self, momentum: Momentum = 0.999, evaluate_with: Literal["teacher", "student"] = "teacher", **options: Any
    ) -> None:
        if evaluate_with not in ("teacher", "student"):
            raise ValueError(f"evaluate_with must be 'teacher' or 'student', got {evaluate_with!r}")
        self.evaluate_with = evaluate_with
        self.teacher: EMANTeacher | None = None
        self._options = {"momentum": momentum, "rounding": "stochastic"} | options
        self._handle: Any = None
        self._exchanging = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.swap_back()
        model: nn.Module = others["model"]
        self._stop_following(model)
        if self.teacher is None or not state.global_step:
            self.teacher = EMANTeacher(model, **self._options)
        if state.global_step:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            self._load([folder, args.resume_from_checkpoint], "starts from the resumed model")
        self._handle = self.teacher.follow(others["optimizer"], model)
        if self.evaluate_with == "teacher":
            # Trainer has no callback for the start of an evaluation, but it starts with model.eval().
            def train(mode: bool = True) -> nn.Module:
                type(model).train(model, mode)
                # The exchange itself calls train() on models with caches: ignore these calls.
                if not self._exchanging:
                    self.swap_back() if mode else self._swap(model)
                return model

            model.train = train

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.swap_back()

    def on_predict(self, *_: Any, **__: Any) -> None:
        self.swap_back()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if args.should_save and self.teacher is not None:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            torch.save(self.teacher.state_dict(), os.path.join(folder, FILE))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.swap_back()
        self._stop_following(others["model"])
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load([state.best_model_checkpoint], "is from the last step, the model from the best checkpoint")

    def swap_back(self) -> None:
        """Restore the values of model and average after an evaluation that raised. Otherwise a no-op."""
        if self.teacher is not None and self.teacher.is_swapped:
            self._run_exchange(self.teacher.swap_back)

    def _swap(self, model: nn.Module) -> None:
        if not self.teacher.is_swapped:
            self._run_exchange(self.teacher.swap, model)

    def _run_exchange(self, exchange: Callable[..., None], *model: nn.Module) -> None:
        self._exchanging = True
        try:
            exchange(*model)
        finally:
            self._exchanging = False

    def _stop_following(self, model: nn.Module) -> None:
        model.__dict__.pop("train", None)
        if self._handle is not None:
            self._handle.remove()

    def _load(self, folders: list[Any], fallback: str) -> None:
        """Load the first teacher file in these folders. If there is none, warn what the average is instead."""
        paths = [os.path.join(folder, FILE) for folder in folders if isinstance(folder, str)]
        path = next(filter(os.path.exists, paths), None)
        if path is None:
            warnings.warn(f"the average {fallback}: {' and '.join(paths)} not found", stacklevel=3)
        else:
            self.teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
