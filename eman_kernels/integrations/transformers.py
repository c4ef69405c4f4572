"""A teacher for transformers' Trainer, as a callback.

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

from ..teacher import EMANTeacher, Momentum

if find_spec("transformers") is None:
    raise ImportError(
        "eman_kernels.integrations.transformers is for transformers, which is not installed: "
        "pip install 'eman_kernels[transformers]'"
    )

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "eman_teacher.pt"


class EMANCallback(TrainerCallback):
    """Lets ``callback.teacher``, an EMANTeacher, follow the model after each step that the optimizer really makes.

    It is saved in each checkpoint's folder, as ``eman_teacher.pt``, and found there when training is resumed; the
    checkpoint's model is the student. After the training ``callback.teacher`` is the average and the model the student,
    both of the best checkpoint with ``load_best_model_at_end``.

    Args:
        momentum: as in EMANTeacher; default 0.999.
        evaluate_with: "teacher" (default): evaluations during the training are of the average, which is exchanged with
            the model while ``evaluate`` runs; if one raises, until the next training begins, or ``swap_back()``.
            "student": the model is evaluated as it is. Outside of the training: ``with callback.teacher.swapped():``.
        options: those of EMANTeacher. The default of rounding is "stochastic", of which a bf16 model has need.
    """

    def __init__(
        self, momentum: Momentum = 0.999, evaluate_with: Literal["teacher", "student"] = "teacher", **options: Any
    ) -> None:
        if evaluate_with not in ("teacher", "student"):
            raise ValueError(f"evaluate_with must be 'teacher' or 'student', and is {evaluate_with!r}")
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
        self._stop(model)
        if self.teacher is None or not state.global_step:
            self.teacher = EMANTeacher(model, **self._options)
        if state.global_step:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            self._load([folder, args.resume_from_checkpoint], "begins at the resumed model")
        self._handle = self.teacher.follow(others["optimizer"], model)
        if self.evaluate_with == "teacher":
            # No event says that an evaluation begins, but it begins with model.eval().
            def train(mode: bool = True) -> nn.Module:
                type(model).train(model, mode)
                # An exchange calls it too, for models that keep what they have computed.
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
        self._stop(others["model"])
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load([state.best_model_checkpoint], "is that of the last step, and the model the best")

    def swap_back(self) -> None:
        """Give model and average their own values back, if an evaluation has raised."""
        if self.teacher is not None and self.teacher._turn.exchange is not None:
            self._exchange(self.teacher.swap_back)

    def _swap(self, model: nn.Module) -> None:
        if self.teacher._turn.exchange is None:
            self._exchange(self.teacher.swap, model)

    def _exchange(self, exchange: Callable[..., None], *model: nn.Module) -> None:
        self._exchanging = True
        try:
            exchange(*model)
        finally:
            self._exchanging = False

    def _stop(self, model: nn.Module) -> None:
        model.__dict__.pop("train", None)
        if self._handle is not None:
            self._handle.remove()

    def _load(self, folders: list[Any], otherwise: str) -> None:
        paths = [os.path.join(folder, FILE) for folder in folders if isinstance(folder, str)]
        path = next(filter(os.path.exists, paths), None)
        if path is None:
            warnings.warn(f"the average {otherwise}: there is no {' and no '.join(paths)}", stacklevel=3)
        else:
            self.teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
