"""mmengine's averaged models with an update in one pass, for EMAHook.

```python
from mmengine.config import Config

config = Config(
    dict(
        custom_imports=dict(imports=["eman_kernels.integrations.mmengine"]),
        custom_hooks=[dict(type="EMAHook", ema_type="EMANExponentialMovingAverage", momentum=0.0002)],
        **others,
    )
)
```

The names in mmengine's registry are EMANExponentialMovingAverage, EMANMomentumAnnealingEMA and
EMANStochasticWeightAverage. Any other subclass of BaseAveragedModel becomes one with ``EMANUpdate`` as the first base
class. Tested with mmengine 0.10.7.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..functional import eman_update_

if find_spec("mmengine") is None:
    raise ImportError(
        "eman_kernels.integrations.mmengine needs mmengine, which is not installed: "
        "pip install 'eman_kernels[mmengine]'"
    )

from mmengine.model import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from mmengine.registry import MODELS


class EMANUpdate(BaseAveragedModel):
    """A base class that lets ``update_parameters`` of an averaged model run in one pass.

    Use it as the first base class: ``class EMANExpMomentumEMA(EMANUpdate, ExpMomentumEMA)``, with
    ``@MODELS.register_module()``. The other class defines the average, in ``avg_func``. Its files do not change.

    Differences from the other class: ``update_buffers`` is True by default, which is EMAN, and then counters
    (num_batches_tracked) are copied in each update; tensors are paired by name, and tied tensors are averaged once.

    Args:
        as in the other class. mmengine's momentum is the weight of the model in each update: 1 - momentum of
        ``eman_update_``. The first update copies the model.

    Raises:
        as the other class; in the first update ValueError, if the networks differ.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **{"update_buffers": True} | options)

    def update_parameters(self, model: nn.Module) -> None:
        """Follow the model by one step, as in BaseAveragedModel: after ``interval`` steps each."""
        averages = int(self.steps) % self.interval == 0
        if averages or not self.update_buffers:  # buffers that are not averaged are copied in every step
            weight = self._weight_of_the_model() if averages else 0.0
            eman_update_(self.module, model, 1 - weight, buffers="ema" if self.update_buffers else "copy")
        self.steps += 1

    def _weight_of_the_model(self) -> float:
        """Subclasses define it only within ``avg_func``: it is their average of 0 and 1."""
        if self.steps == 0:
            return 1.0
        average = torch.zeros((), dtype=torch.float64)
        self.avg_func(average, torch.ones_like(average), self.steps)
        return average.item()


@MODELS.register_module()
class EMANExponentialMovingAverage(EMANUpdate, ExponentialMovingAverage):
    """``EMANUpdate`` for mmengine's ExponentialMovingAverage."""


@MODELS.register_module()
class EMANMomentumAnnealingEMA(EMANUpdate, MomentumAnnealingEMA):
    """``EMANUpdate`` for mmengine's MomentumAnnealingEMA."""


@MODELS.register_module()
class EMANStochasticWeightAverage(EMANUpdate, StochasticWeightAverage):
    """``EMANUpdate`` for mmengine's StochasticWeightAverage."""
