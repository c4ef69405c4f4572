"""ignite's EMAHandler with an update in one pass.

```python
from ignite.engine import Engine, Events
from eman_kernels.integrations.ignite import EMANHandler

trainer = Engine(train_step)
ema_handler = EMANHandler(model, momentum=0.0002)
ema_handler.attach(trainer, name="ema_momentum", event=Events.ITERATION_COMPLETED)
trainer.run(batches, max_epochs=2)
average = ema_handler.ema_model  # in eval mode
```

Tested with ignite 0.5.5.
"""

from importlib.util import find_spec

from torch import nn

from ..functional import eman_update_

if find_spec("ignite") is None:
    raise ImportError(
        "eman_kernels.integrations.ignite needs ignite, which is not installed: pip install 'eman_kernels[ignite]'"
    )

from ignite.engine import Engine
from ignite.handlers import EMAHandler


class EMANHandler(EMAHandler):
    """An EMAHandler that averages BatchNorm's statistics by default, and updates everything in one pass.

    Differences from EMAHandler: tensors are paired by name, tied tensors are averaged once, and
    ``handle_buffers="copy"`` copies values, where EMAHandler makes both networks share the buffers' memory.

    Args:
        model: the network to follow; DDP is stripped.
        momentum: the weight of the network in each update, in (0, 1): 1 - momentum of ``eman_update_``; default 0.0002.
        momentum_warmup, warmup_iters: as in EMAHandler: the momentum moves in a straight line from momentum_warmup to
            momentum in the first warmup_iters iterations.
        handle_buffers: "update" (default, and EMAN) averages the floating-point buffers and copies the others, "copy"
            copies all buffers, "ema_train" leaves them alone and puts the average into training mode.

    Raises:
        ValueError: as EMAHandler; in the first update, if the networks differ.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        momentum_warmup: float | None = None,
        warmup_iters: int | None = None,
        handle_buffers: str = "update",
    ) -> None:
        super().__init__(model, momentum, momentum_warmup, warmup_iters, handle_buffers)

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        buffers = {"update": "ema", "copy": "copy", "ema_train": "skip"}[self.handle_buffers]
        eman_update_(self.ema_model, self.model, 1 - getattr(engine.state, name), buffers=buffers)
