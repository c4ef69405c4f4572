"""Lightning's WeightAveraging callback, with an EMANTeacher as the average.

```python
from lightning.pytorch import Trainer
from eman_kernels.integrations.lightning import EMANWeightAveraging

trainer = Trainer(callbacks=EMANWeightAveraging(momentum=0.999), **options)
trainer.fit(model, batches)
```

Tested with lightning 2.6.6.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..schedules import CopyFirst
from ..teacher import EMANTeacher, Momentum

if find_spec("lightning") is None:
    raise ImportError(
        "eman_kernels.integrations.lightning is for lightning, which is not installed: "
        "pip install 'eman_kernels[lightning]'"
    )

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


class _Average(EMANTeacher):
    """What WeightAveraging calls of an AveragedModel."""

    found_inf: Tensor | None = None

    def update_parameters(self, model: nn.Module) -> None:
        self.update(model, found_inf=self.found_inf)


class EMANWeightAveraging(WeightAveraging):
    """WeightAveraging by an EMANTeacher: updated after real optimizer steps, and none that GradScaler skips; validated
    in the model's place, and given back if the validation raises.

    Checkpoints are those of WeightAveraging and EMAWeightAveraging, and each loads the others': ``state_dict`` is the
    average, ``current_model_state`` the model.

    Args:
        momentum: as in EMANTeacher; a schedule counts the updates. The first one copies the model, as in
            EMAWeightAveraging: the average of a run on several devices is made before their models are equal, and one
            that starts late would begin at what the model was at first.
        update_every_n_steps: update after optimizer steps 0, n, 2n, ..., as EMAWeightAveraging; default 1.
        update_starting_at_step: no update before this step; default: none is left out.
        device: where the average is kept; default: the model's device.
        options: those of EMANTeacher, but dtype: it is the model's, for they are exchanged. The default of rounding is
            "stochastic", of which a bf16-true model has need.
    """

    def __init__(
        self,
        momentum: Momentum = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        device: torch.device | str | int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(device=device)
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps must be at least 1, and is {update_every_n_steps}")
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self._options = {"momentum": CopyFirst(momentum), "rounding": "stochastic"} | options
        self._handles: list[Any] = []
        self._stepped = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None or step_idx < (self.update_starting_at_step or 0):
            return False
        return step_idx % self.update_every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._average_model = _Average(pl_module, **self._options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now has Lightning moved the model, and given it the dtype of its precision; the two are to be exchanged.
        average = self._average_model.to(self._device or pl_module.device).module
        for own, model in ((average.parameters(), pl_module.parameters()), (average.buffers(), pl_module.buffers())):
            for tensor, like in zip(own, model, strict=True):
                tensor.data = tensor.data.to(like.dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handles = [optimizer.register_step_post_hook(self._note) for optimizer in trainer.optimizers]

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped = True
        self._average_model.found_inf = getattr(optimizer, "found_inf", None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *others: Any) -> None:
        if self._stepped:
            super().on_train_batch_end(trainer, pl_module, *others)
        self._stepped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        super().on_train_end(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._average_model.swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._average_model.swap_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()
        if self._average_model is not None and self._average_model._turn.exchange is not None:
            self._average_model.swap_back()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._average_model.step)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get("averaging_state"):
            checkpoint = checkpoint | {"averaging_state": {"_extra_state": state["n_averaged"]}}
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
