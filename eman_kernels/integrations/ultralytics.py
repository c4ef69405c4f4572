"""ultralytics' ModelEMA with an update in one pass, and the callback that uses it in a training.

```python
from ultralytics import YOLO
from eman_kernels.integrations.ultralytics import use_eman

yolo = YOLO("yolo11n.yaml")
yolo.add_callback("on_train_epoch_start", use_eman)
yolo.train(data=data, **options)
```

In your own loop: ``ema = ModelEMAN(model)`` and ``ema.update(model)``. Tested with ultralytics 8.4.190, which is
licensed under AGPL-3.0.
"""

from importlib.util import find_spec
from typing import Any

from torch import nn

from ..functional import eman_update_

if find_spec("ultralytics") is None:
    raise ImportError(
        "eman_kernels.integrations.ultralytics needs ultralytics, which is not installed: "
        "pip install 'eman_kernels[ultralytics]'"
    )

from ultralytics.utils.torch_utils import ModelEMA


class ModelEMAN(ModelEMA):
    """A ModelEMA whose ``update`` is one pass.

    Its attributes are ``ema``, ``updates``, ``decay`` and ``enabled``, and the momentum of the k-th update, from 1, is
    ``decay (1 - exp(-k / tau))``, as in ModelEMA. Averages are those of ModelEMA bit for bit. Differences: counters
    (num_batches_tracked) are copied, where ModelEMA leaves them at their first value; buffers that state_dict() omits
    are followed too; tied tensors are averaged once.

    Args:
        model: the network to follow; the wrappers of DDP and torch.compile are stripped.
        decay: the momentum that is approached; default 0.9999.
        tau: the time constant in updates; default 2000.
        updates: how many updates have been made already; default 0.

    Raises:
        ValueError: in the first update, if the networks differ.
    """

    def update(self, model: nn.Module) -> None:
        """Follow the model by one step; a no-op unless ``enabled``."""
        if not self.enabled:
            return
        # ModelEMA removes the teacher of a DistillationModel from its copy.
        rules = {"teacher_model.*": "skip"} if hasattr(self.ema, "teacher_model") else None
        eman_update_(self.ema, model, self.decay(self.updates + 1), rules=rules)
        self.updates += 1


def use_eman(trainer: Any) -> None:
    """A callback for ``on_train_epoch_start``: the trainer's ModelEMA becomes a ModelEMAN with the same average.

    The trainer makes a new ModelEMA when it resumes and when it recovers from NaNs; both happen before an epoch starts.
    """
    if trainer.ema is not None and not isinstance(trainer.ema, ModelEMAN):
        ema = ModelEMAN.__new__(ModelEMAN)
        vars(ema).update(vars(trainer.ema))
        trainer.ema = ema
