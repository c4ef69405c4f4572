"""EMANModel with diffusers' and accelerate's own components, compared with EMAModel."""

import copy
import re

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from diffusers.training_utils import EMAModel  # noqa: E402

from eman_kernels.integrations import diffusers as adapter  # noqa: E402
from eman_kernels.integrations.diffusers import EMANModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:(diffusers|accelerate|torch)")


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


def test_example_runs_and_resumes_from_its_checkpoint(tmp_path):
    from accelerate import Accelerator

    (example,) = re.findall(r"```python\n(.*?)```", adapter.__doc__, re.S)
    model = unet()
    names = {"unet": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "folder": str(tmp_path)}
    names |= {"batches": torch.randn(3, 2, 1, 8, 8)}
    exec(example, names)
    ema = names["ema"]
    assert ema.optimization_step == 3
    assert not torch.equal(ema.shadow_params[0], next(names["unet"].parameters()))
    saved = EMANModel.from_pretrained(str(tmp_path / "ema"), diffusers.UNet2DModel)
    assert type(saved) is EMANModel
    assert (saved.optimization_step, saved.decay) == (3, 0.999)
    resumed, accelerator = EMANModel(unet().parameters()), Accelerator(cpu=True)
    other = unet()
    prepared = accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
    accelerator.register_for_checkpointing(resumed)
    accelerator.load_state(str(tmp_path))
    assert len(prepared) == 2
    for one in (saved, resumed):
        for ours, theirs in zip(one.shadow_params, ema.shadow_params, strict=True):
            assert torch.equal(ours, theirs)
    assert resumed.optimization_step == 3
    prepared[0](torch.randn(2, 1, 8, 8), 1)
    resumed.step(prepared[0].parameters())
    assert resumed.optimization_step == 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.9, "update_after_step": 3},
        {"use_ema_warmup": True, "min_decay": 0.3},
        {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "foreach": True},
    ],
)
def test_averages_equal_emamodels_within_rounding(options):
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    net[1].bias.requires_grad_(False)
    ours, theirs = EMANModel(net.parameters(), **options), EMAModel(net.parameters(), **options)
    exact = EMAModel([parameter.double() for parameter in net.parameters()], **options)
    for k in range(12):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += torch.randn_like(parameter)
        ours.step(net.parameters())
        theirs.step(net.parameters())
        wide = copy.deepcopy(net).double()
        exact.step(wide.parameters())
        assert ours.cur_decay_value == theirs.cur_decay_value == ours.get_decay(k + 1)
    for one, other, true in zip(ours.shadow_params, theirs.shadow_params, exact.shadow_params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert (one - true).abs().max() <= 1.1 * (other - true).abs().max() + 1e-6
    assert torch.equal(ours.shadow_params[3], net[1].bias)  # frozen: copied


def test_store_copy_to_and_restore():
    net = nn.Linear(3, 2)
    ema = EMANModel(net.parameters(), decay=0.5)
    initial = net.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            net.weight += 1
        ema.step(net.parameters())
    trained = net.weight.detach().clone()
    ema.store(net.parameters())
    ema.copy_to(net.parameters())
    assert torch.equal(net.weight, ema.shadow_params[0])
    assert not torch.equal(net.weight, trained)
    ema.restore(net.parameters())
    assert torch.equal(net.weight, trained)
    assert not torch.equal(initial, trained)


def test_mismatched_parameters_raise_and_are_not_counted():
    net = nn.Linear(3, 2)
    ema = EMANModel(net.parameters())
    with pytest.raises(ValueError, match="1 student tensors"):
        ema.step([net.weight])
    with pytest.raises(TypeError, match=r"network.parameters\(\)"):
        ema.step(net)
    assert ema.optimization_step == 0
