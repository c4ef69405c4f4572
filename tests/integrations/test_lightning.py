"""EMANWeightAveraging in Lightning's Trainer, compared with EMAWeightAveraging."""

import inspect
import re
from functools import partial

import pytest
import torch
from conftest import adapters_example, assert_same_bits, examples
from torch import Tensor, nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch.callbacks import EMAWeightAveraging  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from eman_kernels import EMANTeacher, schedules, synthesize  # noqa: E402
from eman_kernels.checkpoints.folders import read_folder  # noqa: E402
from eman_kernels.integrations import lightning as adapter  # noqa: E402
from eman_kernels.integrations.lightning import EMANSnapshots, EMANWeightAveraging  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:(lightning|torch|pytest)", "ignore:.*LeafSpec:FutureWarning"
)


class Module(lightning.LightningModule):
    def __init__(self, fails: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.fails = fails
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch.to(self.net[0].weight.dtype)).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.validated.append(self.net[0].weight.detach().clone())
        if self.fails:
            raise ArithmeticError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)


def batches() -> DataLoader:
    return DataLoader(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)


def fit(callback: lightning.Callback, module: Module, folder: object, path: str | None = None, **options: object):
    options = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0} | options
    trainer = lightning.Trainer(
        callbacks=callback, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, batches(), batches(), ckpt_path=path, weights_only=False if path else None)
    return trainer


def test_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", adapter.__doc__, re.S)
    options = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "default_root_dir": tmp_path}
    names = {"model": Module(), "batches": batches(), "options": options | {"enable_progress_bar": False}}
    exec(example, names)
    (callback,) = [c for c in names["trainer"].callbacks if isinstance(c, EMANWeightAveraging)]
    assert callback._average_model.step == 8
    names = {"Trainer": partial(lightning.Trainer, **options)}
    exec(adapters_example("lightning"), names)
    assert names["average"] in names["trainer"].callbacks


@pytest.mark.parametrize("accumulate", [1, 3])
def test_average_equals_a_teachers_and_lightnings(accumulate, tmp_path):
    expected, seen = [], []

    class Recorder(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if not expected:
                expected.append(EMANTeacher(initial, schedules.CopyFirst(0.9)))
            if trainer.global_step > len(seen):
                seen.append(trainer.global_step)
                expected[0].update(module.net)

    module = Module()
    initial = Module().net
    callback = EMANWeightAveraging(decay=0.9)
    fit([callback, Recorder()], module, tmp_path, accumulate_grad_batches=accumulate)
    assert callback._average_model.step == len(seen) == {1: 8, 3: 3}[accumulate]
    for name, tensor in expected[0].module.state_dict().items():
        assert_same_bits(callback._average_model.module.net.state_dict()[name], tensor, name)
        # Lightning copies the average to the model at the end.
        assert_same_bits(module.net.state_dict()[name], tensor, name)
    lightnings = EMAWeightAveraging(decay=0.9)
    fit(lightnings, Module(), tmp_path, accumulate_grad_batches=accumulate)
    theirs = lightnings._average_model.module.net.state_dict()
    for name, tensor in callback._average_model.module.net.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert callback._average_model.module.net[1].num_batches_tracked == 8


# The cases of Lightning's own tests, tests_pytorch/callbacks/test_weight_averaging.py, for both callbacks.
KINDS = pytest.mark.parametrize("kind", [EMANWeightAveraging, EMAWeightAveraging])


@KINDS
@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, list(range(9)), []),
        ({"update_every_n_steps": 4}, [0, 4, 8], []),
        ({"update_every_n_steps": 2, "update_starting_at_step": 3}, [4, 6, 8], []),
        ({"update_starting_at_epoch": 2}, list(range(9)), [2, 3]),
        ({"update_every_n_steps": 0, "update_starting_at_step": 3, "update_starting_at_epoch": 0}, [], [0, 1, 2, 3]),
    ],
)
def test_should_update(kind, options, steps, epochs):
    callback = kind(**options)
    assert [k for k in range(9) if callback.should_update(k)] == steps
    assert [k for k in range(9) if callback.should_update(step_idx=k)] == steps
    assert [k for k in range(4) if callback.should_update(epoch_idx=k)] == epochs
    assert not callback.should_update()


class Recorder(lightning.Callback):
    """Records the floating-point tensors of the network after each optimizer step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.states):
            state = module.net.state_dict()
            self.states.append({name: t.clone() for name, t in state.items() if t.is_floating_point()})


@KINDS
@pytest.mark.parametrize(
    ("positional", "options", "updates"),
    [
        ((), {}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ((), {"decay": 0.5, "update_every_n_steps": 4}, [0, 4, 8]),
        ((), {"decay": 0.9999, "update_starting_at_step": 5}, [5, 6, 7, 8]),
        ((), {"decay": 0.9, "update_starting_at_epoch": 1}, [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 8]),
        (("cpu", True, 0.5, 0, None, 1), {}, [5, 8]),
        ((None, False), {"decay": 0.5}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_average_of_three_epochs_of_three_steps(kind, positional, options, updates, tmp_path):
    """``updates``: after which steps the average follows the model; the end of an epoch repeats its last step."""
    decay = positional[2] if len(positional) > 2 else options.get("decay", 0.999)
    module, callback, recorder = Module(), kind(*positional, **options), Recorder()
    fit([callback, recorder], module, tmp_path, max_epochs=3, limit_train_batches=3)
    average = callback._average_model
    assert average.n_averaged == len(updates)
    assert average.n_averaged.item() == len(updates)
    expected = {name: t.double() for name, t in recorder.states[updates[0]].items()}
    for step in updates[1:]:
        expected = {name: t.lerp(recorder.states[step][name].double(), 1 - decay) for name, t in expected.items()}
    if positional == (None, False):  # the buffers are copied
        expected |= {name: t.double() for name, t in recorder.states[-1].items() if "running" in name}
    for network in (average.module.net, module.net):  # the model gets the average at the end
        state = network.state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=name)


@KINDS
def test_should_update_can_be_overridden(kind, tmp_path):
    counts = []

    class Epochs(kind):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx in (1, 3)

        def on_train_epoch_end(self, *arguments):
            super().on_train_epoch_end(*arguments)
            counts.append(int(self._average_model.n_averaged))

    fit(Epochs(), Module(), tmp_path, max_epochs=5, limit_train_batches=1)
    assert counts == [0, 1, 1, 2, 2]


@KINDS
def test_neither_trainer_nor_data_loaders_are_copied(kind, tmp_path):
    checked = []

    class Checking(kind):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            average = self._average_model.module
            checked.append(average._trainer is None and average.train_dataloader.__self__ is average)

    fit(Checking(), Module(), tmp_path, fast_dev_run=True)
    assert checked == [True]


@KINDS
@pytest.mark.parametrize("crash", [1, 2])
def test_a_run_that_crashed_resumes_as_if_it_had_not(kind, crash, tmp_path):
    class Crashing(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.current_epoch == crash:
                raise ArithmeticError

    def make():
        return kind(decay=0.5, update_every_n_steps=2, update_starting_at_epoch=0)

    options = {"max_epochs": 3, "limit_train_batches": 3, "limit_val_batches": 0, "accumulate_grad_batches": 2}
    uninterrupted, module = make(), Module()
    fit(uninterrupted, module, tmp_path / "uninterrupted", **options)
    with pytest.raises(ArithmeticError):
        fit([make(), Crashing()], Module(), tmp_path, **options)
    (path,) = (tmp_path / "checkpoints").iterdir()
    callback, resumed = make(), Module()
    fit(callback, resumed, tmp_path, str(path), **options)
    assert callback._average_model.n_averaged == uninterrupted._average_model.n_averaged == 6
    for name, tensor in module.state_dict().items():
        assert_same_bits(resumed.state_dict()[name], tensor, name)


class MadeInSetup(Module):
    def __init__(self):
        super().__init__()
        self.net = None

    def make(self):
        if self.net is None:
            self.net = Module().net

    def setup(self, stage):
        self.make()


class MadeInConfigureModel(MadeInSetup):
    setup = lightning.LightningModule.setup
    configure_model = MadeInSetup.make


@KINDS
def test_layers_of_configure_model(kind, tmp_path):
    class Checking(kind):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            assert self._average_model.module.net is not None

    module, plain, callbacks = MadeInConfigureModel(), Module(), [Checking(decay=0.9), kind(decay=0.9)]
    with pytest.warns(UserWarning, match="configure_model"):
        fit(callbacks[0], module, tmp_path)
    fit(callbacks[1], plain, tmp_path)
    for name, tensor in plain.state_dict().items():
        assert_same_bits(module.state_dict()[name], tensor, name)
        assert_same_bits(callbacks[0]._average_model.module.state_dict()[name], tensor, name)


def test_layers_of_setup(tmp_path):
    """Lightning calls it after the callback's. Its own callback leaves such layers out, and here averages nothing."""
    module, plain = MadeInSetup(), Module()
    trainer = fit(EMANWeightAveraging(decay=0.9), module, tmp_path)
    uninterrupted = EMANWeightAveraging(decay=0.9)
    fit(uninterrupted, plain, tmp_path)
    for name, tensor in plain.state_dict().items():
        assert_same_bits(module.state_dict()[name], tensor, name)
    resumed, expected = EMANWeightAveraging(decay=0.9), EMANWeightAveraging(decay=0.9)
    path = trainer.checkpoint_callback.best_model_path
    fit(resumed, MadeInSetup(), tmp_path, path, max_epochs=2)
    fit(expected, Module(), tmp_path, max_epochs=2)
    assert resumed._average_model.n_averaged == 16
    for name, tensor in expected._average_model.module.state_dict().items():
        assert_same_bits(resumed._average_model.module.state_dict()[name], tensor, name)


def test_replaced_layers_of_setup(tmp_path):
    class Replacing(Module):
        def setup(self, stage):
            self.net[2] = nn.Linear(4, 7)

    callback = EMANWeightAveraging()
    fit(callback, Replacing(), tmp_path)
    assert callback._average_model.module.net[2].weight.shape == (7, 4)


@KINDS
def test_the_network_is_copied_once(kind, tmp_path):
    copies = []

    class Counting(nn.Linear):
        def __deepcopy__(self, memo):
            copies.append(self)
            return nn.Linear(4, 1)

    module, callback = Module(), kind()
    module.net[2] = Counting(4, 1)
    for count in (1, 2):
        fit(callback, module, tmp_path, fast_dev_run=True)
        assert len(copies) == count


@pytest.mark.parametrize(
    ("positional", "options", "error", "message"),
    [
        ((0.99,), {}, TypeError, r"device must be .* got 0.99; pass the decay as decay="),
        ((), {"decay": 1.5}, ValueError, r"momentum must be in \[0, 1\], but is 1.5"),
        ((), {"momentum": "0.9"}, TypeError, "momentum must be a number"),
        ((), {"update_every_n_steps": -1}, ValueError, "update_every_n_steps must be at least 0"),
        ((), {"update_every_n_steps": 0}, ValueError, "pass update_starting_at_epoch="),
        ((), {"rounding": "up"}, ValueError, "unknown rounding='up'"),
        ((), {"rules": {"*": "mean"}}, ValueError, "unknown rule 'mean'"),
        ((), {"dtype": torch.float32}, TypeError, "the average has the model's dtype"),
        ((), {"avg_fn": torch.lerp}, TypeError, "unexpected keyword argument 'avg_fn'"),
        ((), {"tau": 0.01}, TypeError, "pass momentum=1 - tau"),
    ],
)
def test_options_are_checked_when_the_callback_is_made(positional, options, error, message):
    with pytest.raises(error, match=message):
        EMANWeightAveraging(*positional, **options)


def test_options_of_emanteacher_have_precedence(tmp_path):
    callback = EMANWeightAveraging(None, True, 0.9, momentum=0.5, buffers="skip", module=Module())
    fit(callback, Module(), tmp_path, limit_train_batches=2)
    average = callback._average_model
    assert (average.momentum(0), average.momentum(1), average.buffer_rule) == (0.0, 0.5, "skip")
    assert not average.module.net[1].running_mean.any()


def test_the_error_of_a_student_that_cannot_be_copied_is_not_masked(tmp_path):
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo):
            raise ArithmeticError

    module = Module()
    module.net[2] = Uncopyable(4, 1)
    with pytest.raises(TypeError, match="the student cannot be deep-copied"):
        fit(EMANWeightAveraging(), module, tmp_path)


def test_validation_uses_the_average_and_restores_the_model_if_it_raises(tmp_path):
    module, callback = Module(), EMANWeightAveraging(update_starting_at_step=100)
    initial = module.net[0].weight.detach().clone()
    fit(callback, module, tmp_path)
    assert_same_bits(module.validated[0], initial)
    module, callback = Module(fails=True), EMANWeightAveraging(update_starting_at_step=100)
    with pytest.raises(ArithmeticError):
        fit(callback, module, tmp_path)
    assert_same_bits(callback._average_model.module.net[0].weight, initial)
    assert not torch.equal(module.net[0].weight, initial)


@pytest.mark.parametrize("kinds", [(0, 0), (0, 1), (1, 0)], ids=["resume", "to Lightning", "from Lightning"])
def test_checkpoints_are_interchangeable_with_lightnings(kinds, tmp_path):
    make = [lambda: EMANWeightAveraging(decay=0.9), lambda: EMAWeightAveraging(decay=0.9)]
    callback = make[kinds[0]]()
    trainer = fit(callback, Module(), tmp_path)
    path = trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=False)
    module, resumed = Module(), make[kinds[1]]()
    fit(resumed, module, tmp_path, path, max_epochs=2)
    steps = [getattr(average, "step", getattr(average, "n_averaged", None)) for average in (resumed._average_model,)]
    assert int(steps[0]) == 16
    plain = Module()
    plain.load_state_dict(saved["state_dict"])
    assert not torch.equal(saved["current_model_state"]["net.0.weight"], saved["state_dict"]["net.0.weight"])
    if kinds == (0, 0):
        uninterrupted = make[0]()
        fit(uninterrupted, Module(), tmp_path, max_epochs=2)
        for name, tensor in uninterrupted._average_model.state_dict().items():
            assert_same_bits(resumed._average_model.state_dict()[name], tensor, name)


@pytest.mark.parametrize("kind", ["ours", "Lightning's"])
def test_a_checkpoint_saved_during_validation_holds_average_and_model(kind, tmp_path):
    """Before, during and after a validation the same two networks are saved. Lightning's callback confuses the two."""
    path, states = tmp_path / "during.ckpt", []

    class Saver(lightning.Callback):
        def save(self, trainer, *_):
            trainer.save_checkpoint(path)
            states.append(torch.load(path, weights_only=False))

        on_validation_start = on_validation_batch_end = on_validation_end = save

    callback = EMANWeightAveraging(decay=0.9) if kind == "ours" else EMAWeightAveraging(decay=0.9)
    module = Module()
    fit([callback, Saver()], module, tmp_path, limit_val_batches=2)
    assert len(states) == 4
    for state in states:
        pair = [state["state_dict"], state["current_model_state"]]
        if kind != "ours" and not torch.equal(pair[0]["net.0.weight"], states[0]["state_dict"]["net.0.weight"]):
            pair.reverse()
        assert not torch.equal(pair[0]["net.0.weight"], pair[1]["net.0.weight"])
        for name in ("state_dict", "current_model_state"):
            saved = pair[name != "state_dict"]
            for key, tensor in states[0][name].items():
                assert_same_bits(saved[key], tensor, key)
    # The validation goes on with the average.
    if kind == "ours":
        assert_same_bits(module.validated[1], module.validated[0])
        assert_same_bits(module.validated[1], states[1]["state_dict"]["net.0.weight"])
        resumed = EMANWeightAveraging(decay=0.9)
        torch.save(states[1], path)
        fit(resumed, Module(), tmp_path, str(path), max_epochs=1)
        for key, tensor in states[0]["state_dict"].items():
            assert_same_bits(resumed._average_model.module.state_dict()[key], tensor, key)


class Decaying(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            torch._foreach_mul_(self.param_groups[0]["params"], 0.9)
        return loss


def test_an_optimizer_that_calls_super_step_is_followed_once(tmp_path):
    """Also by a teacher that follows Lightning's wrapper of it."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch hooks both classes now
    module, callback, same = Module(), EMANWeightAveraging(decay=0.0), []
    module.configure_optimizers = lambda: Decaying(module.parameters(), lr=0.1)
    teacher = EMANTeacher(module.net, 0.0)

    class Follow(lightning.Callback):
        def on_train_start(self, trainer, module):
            teacher.follow(module.optimizers(), module.net)

        def on_train_batch_end(self, trainer, module, *_):
            pairs = zip(teacher.module.parameters(), module.net.parameters(), strict=True)
            same.append(all(torch.equal(*pair) for pair in pairs))

    for _ in range(2):
        fit([Follow(), callback], module, tmp_path)
    assert teacher.step == 16
    assert all(same)
    assert callback._average_model.step == 8


def test_an_optimizer_that_runs_no_hooks_is_refused(tmp_path):
    class Private(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.original_optimizer, self.param_groups = optimizer, optimizer.param_groups
            self.state, self.defaults = optimizer.state, optimizer.defaults

    module = Module()
    module.configure_optimizers = lambda: Private(torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="torch runs no hooks after its step"):
        fit(EMANWeightAveraging(), module, tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(precision, tmp_path):
    first = []

    class Recorder(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            first.append(module.net[0].weight.detach().clone())

    callback = EMANWeightAveraging(decay=0.99)
    fit([callback, Recorder()], Module(), tmp_path, precision=precision)
    average = callback._average_model.module.net[0].weight
    assert average.dtype == first[0].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert not torch.equal(average, first[0])


@pytest.mark.parametrize(("device", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_average_moves_to_the_models_device(device, expected):
    """Lightning moves the model after setup() and before on_fit_start()."""
    module, callback = Module(), EMANWeightAveraging(device=device)
    callback.setup(trainer := lightning.Trainer(accelerator="cpu", logger=False), module, "fit")
    callback.on_fit_start(trainer, module.to("meta"))
    assert {tensor.device.type for tensor in callback._average_model.module.state_dict().values()} == {expected}


@pytest.mark.cuda
def test_steps_skipped_by_the_scaler_on_a_gpu(tmp_path):
    expected, found = [], []

    class Recorder(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            found.append(not all(p.grad.isfinite().all() for p in module.parameters()))

        def on_train_batch_end(self, trainer, module, *_):
            if not found[-1]:
                expected.append({k: v.cpu() for k, v in module.net.state_dict().items()})

    module, callback = Module(), EMANWeightAveraging(decay=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, backoff_factor=2.0**-30)
    fit([Recorder(), callback], module, tmp_path, accelerator="gpu", devices=1,
        plugins=[MixedPrecision("16-mixed", "cuda", scaler=scaler)])  # fmt: skip
    assert found == [True] + 7 * [False]
    assert callback._average_model.step == 7
    average = expected[0]
    for state in expected[1:]:
        average = {k: v.lerp(state[k], 0.1) if v.is_floating_point() else state[k] for k, v in average.items()}
    for name, tensor in callback._average_model.module.net.state_dict().items():
        assert tensor.is_cuda
        torch.testing.assert_close(tensor.cpu(), average[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_the_scaler_are_not_averaged(tmp_path, fused):
    """16-mixed with torch's GradScaler on the CPU. Gradients overflow at the first scale, but not at the next, 1024.

    With a fused optimizer every step() is called, and the optimizer itself skips the update.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    expected, skipped = [], []

    class Recorder(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            skipped.append(not all(p.grad.isfinite().all() for p in module.parameters()))

        def on_train_batch_end(self, trainer, module, *_):
            if not skipped[-1]:
                expected.append({k: v.clone() for k, v in module.net.state_dict().items()})

    module, callback = Module(fused=fused), EMANWeightAveraging(decay=0.9)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit([Recorder(), callback], module, tmp_path, plugins=[plugin])
    assert skipped == [True] + 7 * [False]
    assert callback._average_model.step == 7
    average = expected[0]
    for state in expected[1:]:
        average = {k: v.lerp(state[k], 0.1) if v.is_floating_point() else state[k] for k, v in average.items()}
    for name, tensor in callback._average_model.module.net.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-6, atol=1e-7)


def test_a_skipped_step_does_not_skip_the_update_of_its_epoch(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    callback, module = EMANWeightAveraging(update_starting_at_epoch=0), Module(fused=True)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(callback, module, tmp_path, plugins=[plugin], limit_train_batches=1)
    assert callback._average_model.n_averaged == 1
    assert callback._average_model.module.net[1].num_batches_tracked == 1


def test_snapshots_of_averages_resume_and_load(tmp_path):
    """Two epochs of 8 steps in one run and in two: the same snapshots, which load into the module."""
    folders = {name: tmp_path / name for name in ("whole", "parts")}
    fit(EMANSnapshots(folders["whole"], every=4), Module(), tmp_path, max_epochs=2)
    first = fit(EMANSnapshots(folders["parts"], every=4), Module(), tmp_path)
    first.save_checkpoint(tmp_path / "resume.ckpt")
    module = Module()
    fit(EMANSnapshots(folders["parts"], every=4), module, tmp_path, str(tmp_path / "resume.ckpt"), max_epochs=2)
    networks = {name: read_folder(folder) for name, folder in folders.items()}
    assert [n.step for n in networks["whole"]] == [n.step for n in networks["parts"]] == [4, 4, 8, 8, 12, 12, 16, 16]
    for whole, parts in zip(*networks.values(), strict=True):
        tensors = dict(parts.tensors())
        for name, tensor in whole.tensors():
            assert_same_bits(tensors[name], tensor, name)
    average = synthesize(folders["parts"], 0.1)
    module.load_state_dict(average)
    assert average["net.1.num_batches_tracked"] == 16


@pytest.mark.filterwarnings("ignore:the 2 snapshots do not represent the average")  # they are of one step
def test_example_of_snapshots_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = examples(inspect.getdoc(EMANSnapshots))
    options = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "enable_progress_bar": False}
    names = {"Trainer": lightning.Trainer, "model": Module(), "batches": batches(), "options": options}
    exec(example, names)
    assert [network.step for network in read_folder("snapshots")] == [8, 8]


def test_the_last_step_is_stored(tmp_path):
    fit(EMANSnapshots(tmp_path / "snapshots", every=5, sigma_rels=[0.1], dtype=torch.float32), Module(), tmp_path)
    assert [network.step for network in read_folder(tmp_path / "snapshots")] == [5, 8]
