"""diffusers' EMAModel with a step that updates all parameters in one pass.

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

from ..options import make_options
from ..update.arguments import make_arguments
from ..update.eager import update_lists

if find_spec("diffusers") is None:
    raise ImportError(
        "eman_kernels.integrations.diffusers needs diffusers, which is not installed: "
        "pip install 'eman_kernels[diffusers]'"
    )

from diffusers import training_utils


class EMANModel(training_utils.EMAModel):
    """An EMAModel whose ``step`` is one pass with the arithmetic of ``ema_update_``. Decay and files do not change.

    Like EMAModel, it averages parameters only: for a network with BatchNorm use EMANTeacher, which averages the
    statistics too. Parameters that do not require gradients are copied.

    The arguments are those of EMAModel; ``foreach`` affects only ``copy_to`` and ``restore``.
    """

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Follow the parameters by one step, as ``EMAModel.step``.

        Args:
            parameters: the network's parameters, in the order passed to the constructor.

        Raises:
            TypeError: parameters is a network.
            ValueError: the parameters do not match the averaged ones. Nothing has been counted or written.
        """
        if isinstance(parameters, nn.Module):
            raise TypeError("step() takes the network's parameters, not the network: step(network.parameters())")
        parameters = list(parameters)
        if _uses_zero3():
            return super().step(parameters)
        decay = self.get_decay(self.optimization_step + 1)
        frozen = [not parameter.requires_grad for parameter in parameters]
        update_lists(self.shadow_params, parameters, make_arguments([decay]), make_options(), frozen)
        self.optimization_step += 1
        self.cur_decay_value = decay


def _uses_zero3() -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned the parameters. EMAModel.step gathers them."""
    if not training_utils.is_transformers_available():
        return False
    return training_utils.transformers.integrations.deepspeed.is_deepspeed_zero3_enabled()
