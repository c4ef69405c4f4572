"""A replacement of lightly's update_momentum that averages BatchNorm's statistics too.

```python
import copy
from lightly.models.utils import deactivate_requires_grad
from eman_kernels.integrations.lightly import update_momentum

backbone_momentum = copy.deepcopy(backbone)
deactivate_requires_grad(backbone_momentum)
for images in batches:
    update_momentum(backbone, backbone_momentum, m=0.99)
    with torch.no_grad():
        keys = backbone_momentum(images)
    backbone(images).sub(keys).square().mean().backward(), optimizer.step(), optimizer.zero_grad()
```

Tested with lightly 1.6.0.
"""

from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from ..functional import eman_update_

if find_spec("lightly") is None:
    raise ImportError(
        "eman_kernels.integrations.lightly needs lightly, which is not installed: pip install 'eman_kernels[lightly]'"
    )


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float | Tensor, **options: Any) -> None:
    """Replaces ``lightly.models.utils.update_momentum``: ``eman_update_`` with lightly's order of arguments.

    BatchNorm's statistics are averaged like the weights, its counters are copied, and ``model_ema`` is switched to eval
    mode. Lightning's ``train()`` puts it into training mode, where it would normalize with its own batches.

    Args:
        model: the student; it is only read.
        model_ema: the momentum network, updated in place. Tensors are paired by name.
        m: the momentum, in [0, 1].
        options: keyword options of ``eman_update_``.

    Raises:
        TypeError, ValueError: see ``eman_update_``.
    """
    if model_ema.training:
        model_ema.eval()
    eman_update_(model_ema, model, m, **options)
