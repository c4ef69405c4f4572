"""Lightning's WeightAveraging callback with an EMANTeacher as the average.

```python
from lightning.pytorch import Trainer
from eman_kernels.integrations.lightning import EMANWeightAveraging

trainer = Trainer(callbacks=EMANWeightAveraging(decay=0.999), **options)
trainer.fit(model, batches)
```

``EMANSnapshots`` stores averages from which ``synthesize`` makes averages of any length after the training.

Tested with lightning 2.6.6.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..checkpoints import Snapshots
from ..networks.names import named_tensors
from ..schedules import CopyFirst, PowerFunction
from ..teacher import EMANTeacher, EMANTeachers
from ..update.following import find_hooked_optimizer
from ..update.state import Momentum

if find_spec("lightning") is None:
    raise ImportError(
        "eman_kernels.integrations.lightning needs lightning, which is not installed: "
        "pip install 'eman_kernels[lightning]'"
    )

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden


class _AverageTeacher(EMANTeacher):
    """An EMANTeacher with the method of AveragedModel that WeightAveraging calls, and the count that users read."""

    found_inf: Tensor | None = None

    @property
    def n_averaged(self) -> Tensor:
        return torch.tensor(self.step)

    def update_parameters(self, model: nn.Module) -> None:
        self.update(model, found_inf=self.found_inf)


class EMANWeightAveraging(WeightAveraging):
    """EMAWeightAveraging with an EMANTeacher, updated only after optimizer steps that are actually taken.

    The arguments are those of EMAWeightAveraging, in the same order. Steps skipped by GradScaler are ignored.
    Validation runs with the average in place of the model; the model gets its own values back even if the validation
    raises. Layers that ``LightningModule.setup()`` makes are averaged too. ``_average_model`` is the EMANTeacher;
    ``n_averaged`` is its step as a tensor.

    Checkpoints have the format of WeightAveraging and EMAWeightAveraging, and the three callbacks can load each
    other's: ``state_dict`` is the average, ``current_model_state`` the model.

    Args:
        device: where the average is stored; default: the model's device.
        use_buffers: whether floating-point buffers (BatchNorm statistics) are averaged (default), or copied from the
            model at each update.
        decay: the momentum of EMANTeacher: a number in [0, 1], or a schedule; default 0.999. The first update always
            copies the model, as in EMAWeightAveraging: on several devices the average is created before the models are
            equal, and an average that starts late would otherwise start from the model's initial values.
        update_every_n_steps: update after optimizer steps 0, n, 2n, ...; default 1. With 0 only epochs update.
        update_starting_at_step: do not update after earlier steps; default: update from the first step.
        update_starting_at_epoch: update also at the end of each epoch from this one on; default: never.
        options: keyword options of EMANTeacher, except dtype: the average has the model's dtype because their values
            are exchanged. The default of rounding is "stochastic", which a bf16-true model needs. ``momentum=`` is
            another name for ``decay=``, and ``buffers="copy"`` for ``use_buffers=False``; if both are given, the option
            of EMANTeacher applies.

    Raises:
        ValueError: an option is out of range, or no step and no epoch would update the average.
        TypeError: an option or its type is unknown.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: Momentum = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(device, torch.device | str | int | None):
            raise TypeError(f"device must be a torch.device, a str or an int, got {device!r}; pass the decay as decay=")
        super().__init__(device, use_buffers)
        if update_every_n_steps < 0:
            raise ValueError(f"update_every_n_steps must be at least 0, got {update_every_n_steps}")
        if update_every_n_steps == 0 and update_starting_at_epoch is None:
            raise ValueError("update_every_n_steps=0 leaves updates to epochs: pass update_starting_at_epoch= too")
        if options.get("dtype") is not None:
            raise TypeError("there is no dtype=: the average has the model's dtype because their values are exchanged")
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch
        momentum = options.pop("momentum", decay)
        options = {"rounding": "stochastic", "buffers": "ema" if use_buffers else "copy"} | options
        EMANTeacher(nn.Module(), momentum, **options | {"module": None})  # raises for a wrong option now, not in a fit
        self._options = {"momentum": CopyFirst(momentum)} | options
        self._handles: list[Any] = []
        self._stepped = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after this step, or after this epoch; both are counted from 0."""
        every, first_epoch = self.update_every_n_steps, self.update_starting_at_epoch
        first_step = self.update_starting_at_step or 0
        after_step = step_idx is not None and every > 0 and step_idx >= first_step and step_idx % every == 0
        after_epoch = epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch
        return after_step or after_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # As in WeightAveraging, whose own setup() would make an AveragedModel: another copy of the network.
        if is_overridden("configure_model", pl_module):
            rank_zero_warn(
                "EMANWeightAveraging calls the model's configure_model() to average the layers that it makes. Sharded "
                "layers are not supported, so you may run out of memory."
            )
            pl_module.configure_model()
        self._make_average(pl_module)
        # Of a fit before this one, which may have taken more steps.
        self._latest_update_step, self._latest_update_epoch = 0, -1

    def _make_average(self, pl_module: LightningModule) -> None:
        self._average_model = None  # freed before the next one is made
        self._average_model = _AverageTeacher(pl_module, **self._options)

    def _include_layers_of_setup(self, pl_module: LightningModule) -> None:
        """LightningModule.setup(), which runs after ours, may have made layers."""
        average, model = map(named_tensors, (self._average_model.module, pl_module))
        if {name: t.shape for name, t in average.items()} != {name: t.shape for name, t in model.items()}:
            self._make_average(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._include_layers_of_setup(pl_module)
        # Lightning has now moved the model and set its dtype. Average and model need equal dtypes to be exchanged.
        device = pl_module.device if self._device is None else self._device
        average = self._average_model.to(device).module
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
            self._average_model.found_inf = None  # it does not concern the update at the end of the epoch
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
        if self._average_model is not None:
            self._include_layers_of_setup(pl_module)
        if state := checkpoint.get("averaging_state"):
            checkpoint = checkpoint | {"averaging_state": {"_extra_state": state["n_averaged"]}}
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()


class EMANSnapshots(Callback):
    """Tracks averages of a few lengths and stores them in a folder: see ``eman_kernels.Snapshots``.

    The averages follow the last of the trainer's optimizers, are saved in the checkpoints, and do not change what is
    trained or validated. The last snapshot is stored when the training ends.

    Args:
        folder, every: as in Snapshots.
        sigma_rels: the lengths of the averages; default 0.05 and 0.10.
        options: keyword options of Snapshots: dtype, keep.

    ```python
    from eman_kernels import synthesize
    from eman_kernels.integrations.lightning import EMANSnapshots

    trainer = Trainer(callbacks=EMANSnapshots("snapshots", every=1000), **options)
    trainer.fit(model, batches)
    model.load_state_dict(synthesize("snapshots", sigma_rel=0.07))
    ```
    """

    def __init__(
        self, folder: str | Path, every: int, sigma_rels: Sequence[float] = (0.05, 0.10), **options: Any
    ) -> None:
        self.folder, self.every, self.sigma_rels = folder, every, sigma_rels
        self._options = options
        self._teachers: EMANTeachers | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before the checkpoint is loaded
            momenta = [PowerFunction(sigma_rel) for sigma_rel in self.sigma_rels]
            self._teachers = EMANTeachers(pl_module, momenta, dtype=torch.float32)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._teachers.to(pl_module.device)
        self._snapshots = Snapshots(self._teachers, self.folder, every=self.every, **self._options)
        self._handle = self._teachers.follow(trainer.optimizers[-1], pl_module)

    def on_train_batch_end(self, *_: Any) -> None:
        self._snapshots.store_if_due()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handle.remove()
        self._snapshots.store()
        self._snapshots.wait()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._teachers is None else self._teachers.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._teachers is not None:
            self._teachers.load_state_dict(state_dict)
