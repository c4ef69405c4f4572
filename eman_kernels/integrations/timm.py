"""An EMANTeacher with the interface of timm's ModelEmaV3.

```python
import timm
from eman_kernels.integrations.timm import ModelEman

model = timm.create_model("test_resnet")
model_ema = ModelEman(model, decay=0.9998, use_warmup=True)
saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=model_ema, checkpoint_dir=folder)
for step, images in enumerate(batches, start=1):
    model(images).square().mean().backward(), optimizer.step(), optimizer.zero_grad()
    model_ema.update(model, step=step)
saver.save_checkpoint(epoch=0)
```

With timm's tasks: ``task.trainable_module_ema = ModelEman(task.get_trainable_module())``. To resume:
``timm.models.load_checkpoint(model_ema.module, path, use_ema=True)``. Tested with timm 1.0.31.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import InverseGamma
from ..teacher import EMANTeacher

if find_spec("timm") is None:
    raise ImportError(
        "eman_kernels.integrations.timm needs timm, which is not installed: pip install 'eman_kernels[timm]'"
    )


class ModelEman(EMANTeacher):
    """An EMANTeacher with the arguments, the decay and the checkpoints of timm's ModelEmaV3.

    CheckpointSaver stores the plain network, ``.module``; ``distribute_bn`` works on it. Differences from V3: tied
    tensors are averaged once, non-persistent buffers are averaged too, tensors are paired by name, stochastic rounding
    also applies to float16, and the average always stays in eval mode without gradients.

    Args:
        model: the network to follow; DDP and torch.compile wrappers are stripped.
        decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power: as in V3: see ``get_decay``. They
            are attributes and can be assigned. ``decay`` and EMANTeacher's ``momentum`` are one attribute.
        device: where the average is stored; default: the model's device. For an average on the CPU each update copies
            the model to the CPU.
        dtype: the floating-point dtype of the average; default: the model's.
        stochastic_rounding: ``rounding="stochastic"`` of EMANTeacher (default) or ``"nearest"``.
        stochastic_rounding_seed: ``seed`` of EMANTeacher; default 0.
        foreach: has no effect: all tensors are updated in one pass by any ``backend``.
        exclude_buffers: ``buffers="copy"`` of EMANTeacher, or ``"ema"`` (default).
        options: other keyword options of EMANTeacher. ``rounding``, ``seed`` and ``buffers`` replace the three above.

    Raises:
        ValueError: see EMANTeacher; with use_warmup also if min_decay is outside [0, 1] or warmup_gamma or warmup_power
            is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        **options: Any,
    ) -> None:
        of_timm = {
            "rounding": "stochastic" if stochastic_rounding else "nearest",
            "seed": stochastic_rounding_seed,
            "buffers": "copy" if exclude_buffers else "ema",
        }
        super().__init__(model, decay, dtype=dtype, **of_timm | options)
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        if use_warmup:  # raises for arguments out of range
            InverseGamma(max(decay, min_decay), warmup_gamma, warmup_power, min_decay)
        self.state.step_is_given = True  # or the decay is constant: see update
        self.module.to(device)

    @property
    def decay(self) -> float:
        """EMANTeacher's momentum."""
        return self.momentum

    @decay.setter
    def decay(self, decay: float) -> None:
        self.momentum = decay

    def get_decay(self, step: int | None = None) -> float:
        """The decay of update ``step``, counted from 1.

        It is 0 for the first ``update_after_step + 1`` updates, which copy the model, and then ``decay``, or with
        ``use_warmup`` that of ``schedules.InverseGamma``. A ``min_decay`` above ``decay`` has precedence, as in V3.
        Without a step it is ``decay``.
        """
        if step is None:
            return self.decay
        since = step - 1 - self.update_after_step
        if since <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        warm_up = 1 - (1 + since / self.warmup_gamma) ** -self.warmup_power
        return max(min(warm_up, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None, *, found_inf: Tensor | None = None) -> None:
        """Follow the model by one step.

        Args:
            model: the network to follow.
            step: the number of this update over the whole training, starting at 1: timm's ``num_updates``. Pass it to
                continue a resumed run correctly, because timm saves only the plain network. Without it the decay is
                constant and no update copies the model, as in V3.
            found_inf: as in ``EMANTeacher.update``.
        """
        if step is not None:
            self.step = max(step - 1, 0)
        super().update(model, momentum=self.get_decay(step), found_inf=found_inf)

    def set(self, model: nn.Module) -> None:
        """Copy the model. This does not count as an update: the step does not change."""
        step = self.step
        super().update(model, momentum=0.0)
        self.step = step
