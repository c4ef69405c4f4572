"""EMANHandler in ignite's engines, compared with EMAHandler: the cases of ignite's own tests, run with both."""

import pytest
import torch
from conftest import adapters_example, assert_same_bits, examples, lerp
from torch import nn

pytest.importorskip("ignite", reason="ignite is not installed")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, EMAHandler

from eman_kernels.integrations import ignite as adapter
from eman_kernels.integrations.ignite import EMANHandler

both = pytest.mark.parametrize("handler_class", [EMAHandler, EMANHandler])


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def train(model):
    """An engine that changes the weights and, by a forward pass, the statistics."""

    def step(engine, batch):
        model(torch.randn(16, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)

    return Engine(step)


def ones():
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def count_up(*models):
    """An engine that adds 1 to the weights in each iteration: 2, 3, 4, ..."""

    def step(engine, batch):
        for model in models:
            model.weight.data.add_(1)

    return Engine(step)


def test_examples_run():
    model = net()
    names = {"model": model, "train_step": train(model)._process_function, "batches": range(3)}
    (example,) = examples(adapter.__doc__)
    exec(example, names)
    assert names["average"][1].num_batches_tracked == 6
    names = {"model": model, "trainer": train(model)}
    exec(adapters_example("ignite"), names)
    names["trainer"].run(range(2))
    assert names["ema_handler"].ema_model[1].num_batches_tracked == 8


@both
@pytest.mark.parametrize("momentum", [-1, 0, 1, 2])
def test_momentum_out_of_range(handler_class, momentum):
    with pytest.raises(ValueError, match="Invalid momentum"):
        handler_class(ones(), momentum=momentum)


@both
def test_arguments_that_are_not_networks_or_unknown(handler_class):
    with pytest.raises(ValueError, match=r"should be an instance of nn\.Module"):
        handler_class("a network")
    with pytest.raises(ValueError, match="handle_buffers can only be one of"):
        handler_class(ones(), handle_buffers="average")


@both
@pytest.mark.parametrize(("first", "last"), [(0.0, 0.5), (1.0, 0.5)])
def test_the_momentum_moves_in_a_line_to_its_final_value(handler_class, first, last):
    model, seen = ones(), []
    engine = count_up(model)
    handler_class(model, last, momentum_warmup=first, warmup_iters=5).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.ema_momentum))
    engine.run(range(8))
    expected = [first + (last - first) * min(i / 4, 1) for i in range(8)]
    assert seen == pytest.approx(expected)


@both
@pytest.mark.parametrize(("every", "expected"), [(1, 4.0625), (2, 3.5)])
@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel])
def test_weights_after_four_iterations(handler_class, every, expected, wrap):
    """(((1 + 2) / 2 + 3) / 2 + 4) / 2 + 5) / 2, or with every second student ((1 + 3) / 2 + 5) / 2."""
    plain = ones()
    model = wrap(plain) if wrap is nn.DataParallel else plain
    engine = count_up(plain)
    handler = handler_class(model, momentum=0.5)
    handler.attach(engine, event=Events.ITERATION_COMPLETED(every=every))
    engine.run(range(2), max_epochs=2)
    average = next(handler.ema_model.parameters())
    assert torch.equal(average, torch.full((1, 2), expected))
    assert isinstance(handler.ema_model, type(model))
    assert torch.equal(plain.weight, torch.full((1, 2), 5.0))


@both
def test_two_handlers_of_one_engine(handler_class):
    models = ones(), ones()
    engine = count_up(*models)
    handlers = [handler_class(model, momentum=0.5) for model in models]
    handlers[0].attach(engine, "first")
    handlers[1].attach(engine, "second", event=Events.ITERATION_COMPLETED(every=2))
    engine.run(range(2), max_epochs=2)
    assert [handler.ema_model.weight[0, 0].item() for handler in handlers] == [4.0625, 3.5]
    with pytest.warns(UserWarning, match="Attribute 'first' already exists"):
        handler_class(ones()).attach(engine, "first")


@both
@pytest.mark.parametrize("mode", ["update", "copy", "ema_train"])
def test_buffers(handler_class, mode):
    model = nn.BatchNorm1d(2)
    model.register_buffer("level", torch.tensor(1.0))

    def step(engine, batch):
        model(torch.randn(8, 2) + 3)
        model.level += 1

    handler = handler_class(model, momentum=0.5, handle_buffers=mode)
    average = handler.ema_model
    assert average.training == (mode == "ema_train")
    engine = Engine(step)
    handler.attach(engine)
    engine.run(range(4))
    assert average.level.item() == {"update": 4.0625, "copy": 5.0, "ema_train": 1.0}[mode]
    assert average.num_batches_tracked == {"update": 4, "copy": 4, "ema_train": 0}[mode]
    assert torch.equal(average.running_mean, model.running_mean) == (mode == "copy")
    assert average.running_mean.any() == (mode != "ema_train")


@pytest.mark.parametrize("mode", ["update", "copy", "ema_train"])
def test_averages_agree_with_ignites(mode):
    """ignite computes (1 - m) t + m s, which rounds twice; ours has the bits of torch.lerp."""
    model = net()
    theirs, ours = (each(model, 0.1, handle_buffers=mode) for each in (EMAHandler, EMANHandler))
    engine = train(model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def follow(engine):
        for name, tensor in model.state_dict().items():
            is_weight = name in dict(model.named_parameters())
            if is_weight or (mode == "update" and tensor.is_floating_point()):
                expected[name] = lerp(expected[name], tensor, 0.9)
            elif mode != "ema_train":
                expected[name] = tensor.clone()

    theirs.attach(engine, "theirs")
    ours.attach(engine, "ours")
    engine.add_event_handler(Events.ITERATION_COMPLETED, follow)
    engine.run(range(10))
    for name, tensor in ours.ema_model.state_dict().items():
        assert_same_bits(tensor, expected[name], name)
        torch.testing.assert_close(tensor, theirs.ema_model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_statistics_are_averaged_by_default():
    assert EMANHandler(net()).handle_buffers == "update"


def test_copied_buffers_stay_the_averages_own():
    """EMAHandler lets both networks share the buffers' memory: then a forward of one writes to the other."""
    model = net()
    handlers = [each(model, handle_buffers="copy") for each in (EMAHandler, EMANHandler)]
    engine = train(model)
    for i, handler in enumerate(handlers):
        handler.attach(engine, f"momentum {i}")
    engine.run(range(2))
    theirs, ours = (handler.ema_model[1].running_mean for handler in handlers)
    assert theirs.data_ptr() == model[1].running_mean.data_ptr()
    assert ours.data_ptr() != model[1].running_mean.data_ptr()
    assert torch.equal(ours, model[1].running_mean)


@both
def test_resuming_from_a_checkpoint_of_ignite(handler_class):
    """The average is stored as a plain network: each handler loads the other's."""
    model = net()
    handler = handler_class(model, 0.1, handle_buffers="update")
    engine = train(model)
    handler.attach(engine)
    engine.run(range(3))
    saved = {"model": model.state_dict(), "ema_model": handler.ema_model.state_dict()}
    saved = {key: {name: tensor.clone() for name, tensor in state.items()} for key, state in saved.items()}

    resumed = net()
    other = EMANHandler(resumed, 0.1)
    Checkpoint.load_objects({"model": resumed, "ema_model": other.ema_model}, checkpoint=saved)
    other_engine = train(resumed)
    other.attach(other_engine)
    for each in (engine, other_engine):
        torch.manual_seed(1)
        each.run(range(3), max_epochs=2 if each is engine else 1)
    for name, tensor in other.ema_model.state_dict().items():
        torch.testing.assert_close(tensor, handler.ema_model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_networks_that_differ():
    handler = EMANHandler(ones())
    engine = count_up(handler.model)
    handler.attach(engine)
    handler.model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the teacher has none"):
        engine.run(range(1))
    assert torch.equal(handler.ema_model.weight, torch.ones(1, 2))
