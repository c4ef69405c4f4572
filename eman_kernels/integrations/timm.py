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

from ..schedules import CopyFirst, InverseGamma
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
        decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power: as in V3. They define the momentum
            of update ``step`` (see ``schedules.InverseGamma``); updates up to ``update_after_step + 1`` copy the model.
        device: where the average is stored; default: the model's device. For an average on the CPU each update copies
            the model to the CPU.
        rounding: as in EMANTeacher; default "stochastic", as in V3.
        options: other keyword options of EMANTeacher. ``buffers="copy"`` is V3's exclude_buffers, ``dtype`` is V3's.

    Raises:
        ValueError: see EMANTeacher and ``schedules.InverseGamma``.
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
        *,
        rounding: str = "stochastic",
        **options: Any,
    ) -> None:
        momentum = CopyFirst(decay, updates=update_after_step + 1)
        if use_warmup:
            momentum = InverseGamma(decay, warmup_gamma, warmup_power, min_decay, update_after_step)
        super().__init__(model, momentum, rounding=rounding, **options)
        self.state.step_is_given = True  # or the decay is constant: see update
        self.decay = decay
        self.module.to(device)

    def update(self, model: nn.Module, step: int | None = None, *, found_inf: Tensor | None = None) -> None:
        """Follow the model by one step.

        Args:
            model: the network to follow.
            step: the number of this update over the whole training, starting at 1: timm's ``num_updates``. Pass it to
                continue a resumed run correctly, because timm saves only the plain network. Without it the decay is
                constant and no update copies the model, as in V3.
            found_inf: as in ``EMANTeacher.update``.
        """
        if step is None:
            super().update(model, momentum=self.decay, found_inf=found_inf)
        else:
            self.step = max(step - 1, 0)
            super().update(model, found_inf=found_inf)

    def set(self, model: nn.Module) -> None:
        """Copy the model. This does not count as an update: the step does not change."""
        step = self.step
        super().update(model, momentum=0.0)
        self.step = step
