"""EMANCallback in transformers' Trainer, compared with torch's AveragedModel."""

import copy
import re

import pytest
import torch
from conftest import adapters_example, assert_same_bits
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn  # noqa: E402

from eman_kernels.integrations import transformers as adapter  # noqa: E402
from eman_kernels.integrations.transformers import EMANCallback, EMANTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:(transformers|accelerate|torch)")
OPTIONS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "learning_rate": 0.05,
    "logging_strategy": "no",
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


DATA = [{"input_ids": [i % 16, 2, 3], "labels": i % 2} for i in range(24)]


class OtherTrainer(EMANTrainer, transformers.Seq2SeqTrainer):
    pass


def make_trainer(callbacks: list, folder: object, kind: type = transformers.Trainer, optimizer=None, **options: object):
    arguments = transformers.TrainingArguments(str(folder), **OPTIONS | options)
    model = network()
    optimizers = (None if optimizer is None else optimizer(model.parameters()), None)
    return kind(model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=callbacks, optimizers=optimizers)


def test_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", adapter.__doc__, re.S)
    names = {"model": network(), "folder": str(tmp_path), "data": DATA, "options": OPTIONS}
    exec(example, names)
    average = type(names["model"]).from_pretrained(str(tmp_path / "average"))
    assert names["average"].teacher.step == 6
    for name, tensor in average.state_dict().items():
        assert_same_bits(tensor, names["average"].teacher.module.state_dict()[name], name)


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(adapters_example("transformers"), names)
    assert names["average"].teacher.step == 6


def test_average_equals_torchs(tmp_path):
    """Trainer has no average of its own to compare with."""
    theirs = []

    class Recorder(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            theirs.append(AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)))
            theirs[0].n_averaged += 1  # so that its first update does not copy

        def on_optimizer_step(self, args, state, control, model, **_):
            theirs[0].update_parameters(model)

    callback = EMANCallback(momentum=0.9)
    make_trainer([callback, Recorder()], tmp_path, gradient_accumulation_steps=2).train()
    assert callback.teacher.step == 6
    ours = callback.teacher.module
    for (name, tensor), other in zip(ours.named_parameters(), theirs[0].module.parameters(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("evaluate_with", ["teacher", "student"])
@pytest.mark.parametrize("several", [False, True])
def test_evaluation_uses_the_teacher_and_leaves_training_unchanged(evaluate_with, several, tmp_path):
    callback, seen = EMANCallback(momentum=1.0, evaluate_with=evaluate_with), []
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer([callback], tmp_path, EMANTrainer, **options)
    if several:
        trainer.eval_dataset = {"a": DATA, "b": DATA[:4]}
    initial = trainer.model.classifier.weight.detach().clone()
    trainer.model.register_forward_pre_hook(
        lambda model, _: None if model.training else seen.append(torch.equal(model.classifier.weight, initial))
    )
    trainer.train()
    assert seen
    assert all(is_average == (evaluate_with == "teacher") for is_average in seen)
    plain = make_trainer([], tmp_path / "plain")
    plain.train()
    saved = network().from_pretrained(str(tmp_path / "checkpoint-6"))
    for (name, tensor), other in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert_same_bits(tensor, other, name)
        assert_same_bits(saved.get_parameter(name), other, name)
    assert callback.teacher.step == 6
    # After training too.
    seen.clear()
    trainer.evaluate()
    trainer.predict(DATA[:4])
    assert seen
    assert all(is_average == (evaluate_with == "teacher") for is_average in seen)
    assert not callback.teacher.is_swapped
    with callback.teacher.swapped():
        trainer.evaluate()
        assert callback.teacher.is_swapped


class CopyingCallback(transformers.TrainerCallback):
    """What other callbacks do with the model."""

    def __init__(self, folder: object) -> None:
        self.folder, self.copies = folder, []

    def on_step_end(self, args, state, control, model, **_):
        before = model.classifier.weight.detach().clone()
        copied = copy.deepcopy(model).eval()
        assert not any(module.training for module in copied.modules())
        assert_same_bits(copied.classifier.weight, before)
        assert_same_bits(model.classifier.weight, before)
        torch.save(model, self.folder / "whole.pt")
        assert_same_bits(torch.load(self.folder / "whole.pt", weights_only=False).classifier.weight, before)
        model.eval()  # and no train() before the checkpoint is saved
        assert_same_bits(model.classifier.weight, before)
        self.copies.append(before)


@pytest.mark.parametrize("evaluate_with", ["teacher", "student"])
@pytest.mark.parametrize("other_first", [False, True])
def test_other_callbacks_may_copy_save_and_switch_the_model(evaluate_with, other_first, tmp_path):
    average, other = EMANCallback(0.9, evaluate_with=evaluate_with), CopyingCallback(tmp_path)
    callbacks = [other, average] if other_first else [average, other]
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(callbacks, tmp_path, EMANTrainer, **options)
    trainer.train()
    assert not [name for name in vars(trainer.model) if name in ("train", "eval", "forward")]
    assert len(other.copies) == 6
    for at in (3, 6):
        saved = network().from_pretrained(str(tmp_path / f"checkpoint-{at}"))
        assert_same_bits(saved.classifier.weight, other.copies[at - 1])
    plain = EMANCallback(0.9)
    make_trainer([plain], tmp_path / "plain").train()
    resumed = EMANCallback(0.9, evaluate_with=evaluate_with)
    make_trainer([resumed], tmp_path, EMANTrainer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in plain.teacher.state_dict().items():
        assert_same_bits(average.teacher.state_dict()[name], tensor, name)
        assert_same_bits(resumed.teacher.state_dict()[name], tensor, name)


class ScheduleFree(torch.optim.Optimizer):
    """eval() and train() change the weights, as those of schedule-free optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})
        self.trains = True

    def train(self):
        self._exchange(True)

    def eval(self):
        self._exchange(False)

    @torch.no_grad()
    def _exchange(self, trains: bool) -> None:
        if trains != self.trains:
            for parameter in self.param_groups[0]["params"]:
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], 0.1 if trains else 1 - 1 / 0.9)
            self.trains = trains

    @torch.no_grad()
    def step(self, closure=None):
        assert self.trains
        for parameter in self.param_groups[0]["params"]:
            z = self.state[parameter].setdefault("z", parameter.clone())
            z -= 0.05 * parameter.grad
            parameter.lerp_(z, 0.5)


def test_schedule_free_optimizers(tmp_path):
    """The weights are those of a training whose evaluations use the student."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 12, "optimizer": ScheduleFree}
    callbacks = [EMANCallback(0.9, evaluate_with=evaluate_with) for evaluate_with in ("teacher", "student")]
    trainers = [make_trainer([each], tmp_path, EMANTrainer, **options) for each in callbacks]
    for trainer in trainers:
        trainer.train()
    for each in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert_same_bits(*each)
    for each in zip(*(callback.teacher.parameters() for callback in callbacks), strict=True):
        assert_same_bits(*each)


def test_a_training_that_raises_leaves_nothing_behind(tmp_path):
    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise ArithmeticError

    average = EMANCallback(0.9, evaluate_with="teacher")
    trainer = make_trainer([average, failing := Fails()], tmp_path, EMANTrainer, eval_strategy="steps", eval_steps=2)
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert not [name for name, value in vars(trainer.model).items() if callable(value)]
    assert not average.teacher.is_swapped
    trainer.remove_callback(failing)
    trainer.train()
    assert average.teacher.step == 6


def test_another_trainer_cannot_evaluate_the_teacher(tmp_path):
    callback = EMANCallback(evaluate_with="teacher")
    trainer = make_trainer([callback], tmp_path)
    before = trainer.model.classifier.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"needs eman_kernels\.integrations\.transformers\.EMANTrainer"):
        trainer.train()
    assert callback.teacher is None
    assert_same_bits(trainer.model.classifier.weight, before)
    arguments = transformers.Seq2SeqTrainingArguments(str(tmp_path), **OPTIONS)
    OtherTrainer(network(), arguments, train_dataset=DATA, callbacks=[callback]).train()
    assert callback.teacher.step == 6
    with pytest.raises(RuntimeError, match="EMANTrainer"):
        make_trainer([callback], tmp_path).train()


def test_teacher_is_resumed_from_the_checkpoint(tmp_path):
    uninterrupted = EMANCallback(momentum=0.9)
    make_trainer([uninterrupted], tmp_path, save_strategy="steps", save_steps=3).train()
    resumed = EMANCallback(momentum=0.9)
    torch.manual_seed(9)
    make_trainer([resumed], tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.teacher.step == 6
    for name, tensor in uninterrupted.teacher.state_dict().items():
        assert_same_bits(resumed.teacher.state_dict()[name], tensor, name)
    (tmp_path / "checkpoint-3" / adapter.FILE).unlink()
    with pytest.warns(UserWarning, match="the average starts from the resumed model: .*eman_teacher.pt not found"):
        make_trainer([EMANCallback()], tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_teacher_of_the_best_model_is_loaded_at_the_end(tmp_path):
    callback = EMANCallback(momentum=0.9, evaluate_with="teacher")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer([callback], tmp_path, EMANTrainer, **options, load_best_model_at_end=True)
    trainer.train()
    best = tmp_path / "checkpoint-2"  # the loss increases at this learning rate
    assert trainer.state.best_model_checkpoint == str(best)
    assert callback.teacher.step == 2
    for name, tensor in torch.load(best / adapter.FILE, weights_only=True).items():
        assert_same_bits(callback.teacher.state_dict()[name], tensor, name)
    for name, tensor in network().from_pretrained(str(best)).named_parameters():
        assert_same_bits(trainer.model.get_parameter(name), tensor, name)


def test_an_evaluation_that_raised_has_swapped_back(tmp_path):
    callback = EMANCallback(momentum=1.0, evaluate_with="teacher")
    trainer = make_trainer([callback], tmp_path, EMANTrainer, eval_strategy="steps", eval_steps=2)
    initial = trainer.model.classifier.weight.detach().clone()

    def fails(model, _):
        if not model.training:
            raise ArithmeticError

    trainer.model.register_forward_pre_hook(fails)
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert not callback.teacher.is_swapped
    callback.swap_back()  # a no-op
    assert_same_bits(callback.teacher.module.classifier.weight, initial)
    assert not torch.equal(trainer.model.classifier.weight, initial)


def test_unknown_evaluate_with_raises():
    with pytest.raises(ValueError, match="evaluate_with must be 'teacher' or 'student'"):
        EMANCallback(evaluate_with="average")
