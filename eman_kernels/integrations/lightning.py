"""Lightning's WeightAveraging callback with an EMANTeacher as the average.

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
from torch.utils._pytree import tree_map_only

from ..schedules import CopyFirst
from ..teacher import EMANTeacher
from ..update.following import find_hooked_optimizer
from ..update.state import Momentum

if find_spec("lightning") is None:
    raise ImportError(
        "eman_kernels.integrations.lightning needs lightning, which is not installed: "
        "pip install 'eman_kernels[lightning]'"
    )

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


class _AverageTeacher(EMANTeacher):
    """An EMANTeacher with the method of AveragedModel that WeightAveraging calls."""

    found_inf: Tensor | None = None

    def update_parameters(self, model: nn.Module) -> None:
        self.update(model, found_inf=self.found_inf)


class EMANWeightAveraging(WeightAveraging):
    """WeightAveraging with an EMANTeacher, updated only after optimizer steps that are actually taken.

    Steps skipped by GradScaler are ignored. Validation runs with the average in place of the model; the model gets its
    own values back even if the validation raises.

    Checkpoints have the format of WeightAveraging and EMAWeightAveraging, and the three callbacks can load each
    other's: ``state_dict`` is the average, ``current_model_state`` the model.

    Args:
        momentum: as in EMANTeacher; default 0.999. The first update always copies the model, as in EMAWeightAveraging:
            on several devices the average is created before the models are equal, and an average that starts late would
            otherwise start from the model's initial values.
        update_every_n_steps: update after optimizer steps 0, n, 2n, ..., as in EMAWeightAveraging; default 1.
        update_starting_at_step: do not update before this step; default: update from the first step.
        device: where the average is stored; default: the model's device.
        options: keyword options of EMANTeacher, except dtype: the average has the model's dtype because their values
            are exchanged. The default of rounding is "stochastic", which a bf16-true model needs.

    Raises:
        ValueError: update_every_n_steps is below 1; see also EMANTeacher, which is created in ``setup``.
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
            raise ValueError(f"update_every_n_steps must be at least 1, got {update_every_n_steps}")
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
            self._average_model = _AverageTeacher(pl_module, **self._options)
            self._latest_update_step = 0  # of a fit before this one, which may have taken more steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has now moved the model and set its dtype. Average and model need equal dtypes to be exchanged.
        average = self._average_model.to(self._device or pl_module.device).module
        for own, model in ((average.parameters(), pl_module.parameters()), (average.buffers(), pl_module.buffers())):
            for tensor, like in zip(own, model, strict=True):
                tensor.data = tensor.data.to(like.dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        optimizers = map(find_hooked_optimizer, trainer.optimizers)
        self._handles = [optimizer.register_step_post_hook(self._record_step) for optimizer in optimizers]

    def _record_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped = True
        self._average_model.found_inf = getattr(optimizer, "found_inf", None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *others: Any) -> None:
        if self._stepped:
            super().on_train_batch_end(trainer, pl_module, *others)
        self._stepped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        super().on_train_end(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._average_model.swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._average_model.swap_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()
        if self._average_model is not None and self._average_model.is_swapped:
            self._average_model.swap_back()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        average = self._average_model
        if average is not None and average.is_swapped:
            # During a validation. The model's own state, cloned because a state_dict holds references.
            average.swap_back()
            try:
                state = trainer.strategy.lightning_module_state_dict()
                checkpoint["state_dict"] = tree_map_only(Tensor, torch.clone, state)
            finally:
                average.swap(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if average is not None:
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(average.step)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get("averaging_state"):
            checkpoint = checkpoint | {"averaging_state": {"_extra_state": state["n_averaged"]}}
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
