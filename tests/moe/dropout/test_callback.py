import json

import pytest
import torch
import transformers
from moekit.moe.discovery import UnsupportedModelError
from moekit.moe.dropout.callback import ActiveExpertsCallback
from moekit.moe.dropout.convert import set_active_experts, smoe_layers, to_smoe_dropout
from moekit.moe.dropout.schedule import KSchedule
from moekit.moe.trainer import MoETrainer
from transformers import TrainerCallback, TrainingArguments

LINEAR = KSchedule("linear", 2, 8, 8)
RANDOM = KSchedule("random", 2, 8, 8, seed=5)
STEPS = 6


def dense_model(seed=0):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def smoe_model(seed=0):
    return to_smoe_dropout(dense_model(seed), num_experts=8)


def ks_of(model):
    return tuple(layer.active_experts for layer in smoe_layers(model).values())


def record_forwards(model):
    """The k of all layers at every forward, those of training and those of evaluation."""
    seen = {True: [], False: []}
    model.register_forward_pre_hook(lambda module, _: seen[module.training].append(ks_of(module)))
    return seen[True], seen[False]


def trainer_for(model, folder, callbacks, **arguments):
    ids_NS = torch.randint(32, (24, 8), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": ids_S, "labels": ids_S} for ids_S in ids_NS]
    arguments = {"save_strategy": "no", "max_steps": STEPS, **arguments}
    return MoETrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            learning_rate=0.01,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=11,
            **arguments,
        ),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=callbacks,
    )


def scheduled(schedule, steps=range(STEPS), times=1):
    """What `record_forwards` should see of these steps."""
    ks = [schedule.active_experts(step, STEPS, 3) for step in steps]
    return [k if isinstance(k, tuple) else (k,) * 3 for k in ks for _ in range(times)]


@pytest.mark.parametrize("schedule", [LINEAR, RANDOM], ids=["linear", "random"])
def test_every_micro_batch_of_a_step_has_the_scheduled_k(schedule, tmp_path):
    model = smoe_model()
    trained, _ = record_forwards(model)
    callback = ActiveExpertsCallback(schedule)
    trainer_for(model, tmp_path, [callback], gradient_accumulation_steps=2).train()
    assert trained == scheduled(schedule, times=2)
    assert len(set(trained)) == STEPS
    assert ks_of(model) == (8, 8, 8)


def test_a_step_that_the_epoch_cuts_short_has_one_k(tmp_path):
    """12 batches an epoch in accumulations of 5: steps of 5, 5 and 2 micro-batches."""
    model = smoe_model()
    trained, _ = record_forwards(model)
    trainer = trainer_for(
        model, tmp_path, [ActiveExpertsCallback(LINEAR)],
        gradient_accumulation_steps=5, max_steps=-1, num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.max_steps == STEPS
    lengths = [5, 5, 2, 5, 5, 2]
    assert trained == [k for step, n in enumerate(lengths) for k in scheduled(LINEAR, [step], n)]


class EvaluateAtOne(TrainerCallback):
    """Leaves the model at k = 1, as the release's evaluation does."""

    def on_evaluate(self, args, state, control, model, **kwargs):
        set_active_experts(model, 1)


@pytest.mark.parametrize("eval_experts", [None, 3])
def test_evaluation_has_its_own_k_and_training_goes_on_with_the_scheduled_one(eval_experts, tmp_path):
    model = smoe_model()
    trained, evaluated = record_forwards(model)
    callback = ActiveExpertsCallback(LINEAR, eval_experts=eval_experts)
    trainer_for(
        model, tmp_path, [callback, EvaluateAtOne()],
        eval_strategy="steps", eval_steps=2, eval_on_start=True,
    ).train()  # fmt: skip
    assert trained == scheduled(LINEAR)
    assert evaluated == [(eval_experts or 8,) * 3] * 4
    assert ks_of(model) == (eval_experts or 8,) * 3


class Stream(torch.utils.data.IterableDataset):
    """Ten samples: five batches, which accumulations of two do not divide."""

    def __iter__(self):
        ids_NS = torch.randint(32, (10, 8), generator=torch.Generator().manual_seed(5))
        return iter([{"input_ids": ids_S, "labels": ids_S} for ids_S in ids_NS])


def test_data_that_end_within_a_step_do_not_let_its_k_out(tmp_path):
    model = smoe_model()
    trained, evaluated = record_forwards(model)
    trainer = trainer_for(
        model, tmp_path, [ActiveExpertsCallback(LINEAR), EvaluateAtOne()],
        eval_strategy="epoch", gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train_dataset = Stream()
    trainer.train()
    assert trained == scheduled(LINEAR, [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5])
    assert evaluated == [(8, 8, 8)] * 3
    assert ks_of(model) == (8, 8, 8)


@pytest.mark.parametrize("schedule", [LINEAR, RANDOM], ids=["linear", "random"])
def test_a_resumed_run_goes_on_with_the_same_k(schedule, tmp_path):
    whole = trainer_for(
        smoe_model(), tmp_path, [ActiveExpertsCallback(schedule)], save_strategy="steps", save_steps=2
    )
    whole.train()
    model = smoe_model(seed=1)
    trained, _ = record_forwards(model)
    resumed = trainer_for(model, tmp_path, [ActiveExpertsCallback(schedule)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trained == scheduled(schedule, [4, 5])
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_is_loaded_with_the_k_of_evaluation(tmp_path):
    trainer_for(
        smoe_model(), tmp_path, [EvaluateAtOne(), ActiveExpertsCallback(LINEAR, eval_experts=5)],
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    ).train()  # fmt: skip
    for step in (2, 4, 6):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert ks_of(loaded) == (5, 5, 5)


class Listener(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.heard.append(dict(logs))


def test_the_training_logs_say_with_which_k_the_loss_was_measured(tmp_path):
    listener = Listener()
    trainer = trainer_for(
        smoe_model(), tmp_path, [ActiveExpertsCallback(LINEAR), listener],
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=6,
    )  # fmt: skip
    trainer.train()
    ks = [LINEAR.active_experts(step, STEPS, 3) for step in range(STEPS)]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    for logs in (listener.heard, trainer.state.log_history, state["log_history"]):
        assert [record["active_experts"] for record in logs if "loss" in record] == ks
        assert not any("active_experts" in record for record in logs if "loss" not in record)


def test_of_random_k_the_mean_is_logged(tmp_path):
    trainer = trainer_for(smoe_model(), tmp_path, [ActiveExpertsCallback(RANDOM)])
    trainer.train()
    means = [sum(RANDOM.active_experts(step, STEPS, 3)) / 3 for step in range(STEPS)]
    logged = [record["active_experts"] for record in trainer.state.log_history if "loss" in record]
    assert logged == pytest.approx(means)


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="eval_experts=9 is not between 1 and 8 experts"):
        ActiveExpertsCallback(LINEAR, eval_experts=9)
    callback = ActiveExpertsCallback(KSchedule("linear", 8, 16, 16))
    with pytest.raises(ValueError, match=r"num_experts=16, but layer 'model\.layers\.0\.mlp' has 8"):
        trainer_for(smoe_model(), tmp_path, [callback]).train()
    with pytest.raises(UnsupportedModelError, match="no SMoE-Dropout layers"):
        trainer_for(dense_model(), tmp_path, [ActiveExpertsCallback(LINEAR)]).train()
