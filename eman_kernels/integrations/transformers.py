"""A callback for transformers' Trainer that maintains an EMANTeacher, and a Trainer that evaluates it.

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
from contextlib import ExitStack
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

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "eman_teacher.pt"


class EMANCallback(TrainerCallback):
    """Updates ``callback.teacher``, an EMANTeacher, after each optimizer step that is actually taken.

    The teacher is saved as ``eman_teacher.pt`` in each checkpoint's folder and loaded from there when training resumes;
    the checkpoint's model is the student. After training, ``callback.teacher`` is the average and the model is the
    student, both from the best checkpoint if ``load_best_model_at_end`` is set.

    Args:
        momentum: as in EMANTeacher; default 0.999.
        evaluate_with: "student" (default) evaluates the model. "teacher" evaluates the average, and needs EMANTrainer:
            transformers has no callback for the start of an evaluation. With another Trainer, use
            ``with callback.teacher.swapped():`` outside of training.
        options: keyword options of EMANTeacher. The default of rounding is "stochastic", which a bf16 model needs.

    Raises:
        ValueError: evaluate_with is not one of the two; see also EMANTeacher, which is created when training starts.
        RuntimeError: training starts in another Trainer than EMANTrainer, with ``evaluate_with="teacher"``.
    """

    def __init__(
        self, momentum: Momentum = 0.999, evaluate_with: Literal["teacher", "student"] = "student", **options: Any
    ) -> None:
        if evaluate_with not in ("teacher", "student"):
            raise ValueError(f"evaluate_with must be 'teacher' or 'student', got {evaluate_with!r}")
        self.evaluate_with = evaluate_with
        self.is_in_eman_trainer = False
        self.teacher: EMANTeacher | None = None
        self._options = {"momentum": momentum, "rounding": "stochastic"} | options
        self._handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if self.evaluate_with == "teacher" and not self.is_in_eman_trainer:
            raise RuntimeError(
                "EMANCallback(evaluate_with='teacher') needs eman_kernels.integrations.transformers.EMANTrainer in "
                "place of Trainer, or as the first base class: class MyTrainer(EMANTrainer, Seq2SeqTrainer)"
            )
        self.swap_back()
        self._stop_following()
        model: nn.Module = others["model"]
        if self.teacher is None or not state.global_step:
            self.teacher = EMANTeacher(model, **self._options)
        if state.global_step:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            self._load([folder, args.resume_from_checkpoint], "starts from the resumed model")
        self._handle = self.teacher.follow(others["optimizer"], model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if args.should_save and self.teacher is not None:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            torch.save(self.teacher.state_dict(), os.path.join(folder, FILE))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._stop_following()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load([state.best_model_checkpoint], "is from the last step, the model from the best checkpoint")

    def swap_back(self) -> None:
        """Restore the values of model and average if they are swapped. Otherwise a no-op."""
        if self.teacher is not None and self.teacher.is_swapped:
            self.teacher.swap_back()

    def _stop_following(self) -> None:
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


class EMANTrainer(Trainer):
    """A Trainer whose ``evaluate`` and ``predict`` run with the average of ``EMANCallback(evaluate_with="teacher")``.

    The values of average and model are swapped meanwhile, and swapped back even if the evaluation raises. Use it as the
    first base class of another Trainer: ``class MyTrainer(EMANTrainer, Seq2SeqTrainer)``.
    """

    def train(self, *args: Any, **options: Any) -> Any:
        for callback in self._find_callbacks():
            callback.is_in_eman_trainer = True
        try:
            return super().train(*args, **options)
        finally:
            for callback in self._find_callbacks():
                callback.is_in_eman_trainer = False

    def evaluate(self, *args: Any, **options: Any) -> Any:
        with self._swapped():
            return super().evaluate(*args, **options)

    def predict(self, *args: Any, **options: Any) -> Any:
        with self._swapped():
            return super().predict(*args, **options)

    def _find_callbacks(self) -> list[EMANCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EMANCallback)]

    def _swapped(self) -> ExitStack:
        # A schedule-free optimizer changes the model's weights here, and so must be called before the swap.
        if callable(evaluating := getattr(self.optimizer, "eval", None)):
            evaluating()
        with ExitStack() as swaps:
            for callback in self._find_callbacks():
                teacher = callback.teacher
                # Already swapped: evaluate() calls itself for several datasets.
                if callback.evaluate_with == "teacher" and teacher is not None and not teacher.is_swapped:
                    swaps.enter_context(teacher.swapped(self.model))
            return swaps.pop_all()
