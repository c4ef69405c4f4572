"""EMANCallback in transformers' Trainer, compared with torch's AveragedModel."""

import re

import pytest
import torch
from conftest import assert_same_bits
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn  # noqa: E402

from eman_kernels.integrations import transformers as adapter  # noqa: E402
from eman_kernels.integrations.transformers import EMANCallback  # noqa: E402

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


def make_trainer(callbacks: list, folder: object, model: nn.Module | None = None, **options: object):
    arguments = transformers.TrainingArguments(str(folder), **OPTIONS | options)
    model = network() if model is None else model
    return transformers.Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=callbacks)


def test_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", adapter.__doc__, re.S)
    names = {"model": network(), "folder": str(tmp_path), "data": DATA, "options": OPTIONS}
    exec(example, names)
    average = type(names["model"]).from_pretrained(str(tmp_path / "average"))
    assert names["average"].teacher.step == 6
    for name, tensor in average.state_dict().items():
        assert_same_bits(tensor, names["average"].teacher.module.state_dict()[name], name)


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
    trainer = make_trainer(
        [callback], tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2
    )
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
    assert "train" not in trainer.model.__dict__


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
    callback = EMANCallback(momentum=0.9)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer([callback], tmp_path, **options, load_best_model_at_end=True)
    trainer.train()
    best = tmp_path / "checkpoint-2"  # the loss increases at this learning rate
    assert trainer.state.best_model_checkpoint == str(best)
    assert callback.teacher.step == 2
    for name, tensor in torch.load(best / adapter.FILE, weights_only=True).items():
        assert_same_bits(callback.teacher.state_dict()[name], tensor, name)
    for name, tensor in network().from_pretrained(str(best)).named_parameters():
        assert_same_bits(trainer.model.get_parameter(name), tensor, name)


def test_swap_back_after_an_evaluation_that_raised(tmp_path):
    callback = EMANCallback(momentum=1.0)
    trainer = make_trainer([callback], tmp_path, eval_strategy="steps", eval_steps=2)
    initial = trainer.model.classifier.weight.detach().clone()

    def fails(model, _):
        if not model.training:
            raise ArithmeticError

    trainer.model.register_forward_pre_hook(fails)
    with pytest.raises(ArithmeticError):
        trainer.train()
    callback.swap_back()
    assert_same_bits(callback.teacher.module.classifier.weight, initial)
    assert not torch.equal(trainer.model.classifier.weight, initial)


def test_unknown_evaluate_with_raises():
    with pytest.raises(ValueError, match="evaluate_with must be 'teacher' or 'student'"):
        EMANCallback(evaluate_with="average")
