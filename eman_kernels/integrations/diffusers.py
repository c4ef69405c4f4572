"""diffusers' EMAModel, with its step in one pass.

```python
from accelerate import Accelerator
from eman_kernels.integrations.diffusers import EMANModel

accelerator = Accelerator(cpu=True)
ema = EMANModel(unet.parameters(), decay=0.999, use_ema_warmup=True, model_cls=type(unet), model_config=unet.config)
unet, optimizer = accelerator.prepare(unet, optimizer)
ema.to(accelerator.device)
accelerator.register_for_checkpointing(ema)
for images in batches:
    accelerator.backward(unet(images, 1).sample.square().mean())
    optimizer.step(), optimizer.zero_grad()
    ema.step(unet.parameters())
accelerator.save_state(folder)
ema.save_pretrained(folder + "/ema")
```

Tested with diffusers 0.42.1 and accelerate 1.15.0.
"""

from collections.abc import Iterable
from importlib.util import find_spec

from torch import nn

from ..call import call_of
from ..functional import update_lists

if find_spec("diffusers") is None:
    raise ImportError(
        "eman_kernels.integrations.diffusers is for diffusers, which is not installed: "
        "pip install 'eman_kernels[diffusers]'"
    )

from diffusers import training_utils


class EMANModel(training_utils.EMAModel):
    """EMAModel: the same arguments, decay and files. Its ``step`` is one pass, in the arithmetic of ``ema_update_``.

    It averages what it is given, and that are parameters, as in diffusers. For a network with BatchNorm take
    EMANTeacher, which averages the statistics too. Parameters that do not require grad are copied.

    Args: those of EMAModel; foreach is of its copies alone.
    """

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """As EMAModel's. Raises ValueError, before anything is counted or written, for parameters that do not fit."""
        if isinstance(parameters, nn.Module):
            raise TypeError("step takes the parameters of the network: step(network.parameters())")
        parameters = list(parameters)
        if _is_zero3():
            return super().step(parameters)
        decay = self.get_decay(self.optimization_step + 1)
        frozen = [not parameter.requires_grad for parameter in parameters]
        update_lists(self.shadow_params, parameters, call_of([decay]), None, "nearest", "propagate", frozen)
        self.optimization_step += 1
        self.cur_decay_value = decay


def _is_zero3() -> bool:
    """DeepSpeed has taken the parameters apart: diffusers knows how to gather them."""
    if not training_utils.is_transformers_available():
        return False
    return training_utils.transformers.integrations.deepspeed.is_deepspeed_zero3_enabled()
