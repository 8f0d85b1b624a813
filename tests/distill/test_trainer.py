"""The Trainer of students: accumulation, resuming, phases, what is logged and refused."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moekit.distill import AuxiliaryHeadSpec, DistillTrainer, DualHeadStudent, GradientAlignment
from moekit.distill import trainer as trainer_module
from moekit.distill.recipe import DistillationRecipe
from moekit.distill.student import StudentInTraining
from moekit.distill.teachers import ModelTeacher
from moekit.distill.trainer import NonFiniteLossError
from moekit.moe.finite import NonFiniteWeightsError
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from .students import NUM_LABELS, student_model

DHKD = DistillationRecipe(loss="binary-kl-norm", heads="dual", options={"center": "mean"})
KL = DistillationRecipe(loss="kl")
HEAD = AuxiliaryHeadSpec(width=8)


def rows_for(name, count=24):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        if name.endswith("-image"):
            picture = torch.randn(3, 8, 8, generator=generator)
            rows.append({"pixel_values": picture, "row": index, "labels": index % NUM_LABELS})
            continue
        ids_S = torch.randint(3, 40, (7,), generator=generator)
        mask_S = torch.ones(7, dtype=torch.long)
        mask_S[int(torch.randint(3, 8, (), generator=generator)) :] = 0  # so batches have different weight
        row = {"input_ids": ids_S, "attention_mask": mask_S, "row": index}
        labels = ids_S.masked_fill(mask_S == 0, -100) if name.endswith("-lm") else index % NUM_LABELS
        rows.append({**row, "labels": labels})
    return rows


def trainer_for(
    folder,
    name="llama-lm",
    recipe=DHKD,
    alignment=None,
    *,
    has_teacher=True,
    stop_epoch=None,
    spec=HEAD,
    **arguments,
) -> Any:
    torch.manual_seed(1)
    student: Any = student_model(name)
    if recipe.heads == "dual":
        student = DualHeadStudent(student, spec)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
    }
    settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2, "seed": 0}
    return DistillTrainer(
        model=StudentInTraining(student, recipe, alignment=alignment),
        args=TrainingArguments(output_dir=str(folder), **(settings | arguments)),
        train_dataset=rows_for(name),
        teacher=ModelTeacher(student_model(name, seed=7)) if has_teacher else None,
        stop_epoch=stop_epoch,
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("llama-lm", DHKD), ("llama-tied-lm", KL), ("mixtral-lm", KL), ("bert-sequence", DHKD)],
    ids=str,
)
def test_a_killed_run_goes_on_to_the_same_weights(name, recipe, tmp_path):
    """Dropout and the alignment's running factor included."""

    def alignment():
        return GradientAlignment(2, 0.5) if recipe.heads == "dual" else None

    whole = trainer_for(tmp_path / "a", name, recipe, alignment())
    whole.train()
    again = trainer_for(tmp_path / "b", name, recipe, alignment())
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert_equal(weights(again), weights(whole))
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, again)]
    assert losses[1] == losses[0]
    assert len(losses[0]) == 6


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize(
    ("name", "recipe"), [("llama-lm", KL), ("llama-sequence", DHKD), ("vit-image", DHKD)], ids=str
)
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(name, recipe, norm, tmp_path, caplog):
    """Rows weigh the same in full and in short batches."""
    settings = {"spec": AuxiliaryHeadSpec(width=8, norm=norm, dropout=0.0), "max_steps": 3}
    once = trainer_for(tmp_path, name, recipe, save_strategy="no", **settings)
    once.train()
    parts = trainer_for(
        tmp_path,
        name,
        recipe,
        save_strategy="no",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **settings,
    )
    parts.train()
    assert "BatchNorm" not in caplog.text
    for name, tensor in weights(once).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=1e-4)
    for ours, theirs in zip(parts.state.log_history, once.state.log_history, strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_parts_of_the_loss_are_logged(tmp_path):
    recipe = DistillationRecipe(loss="mse", heads="dual", load_balance=0.5)
    trainer = trainer_for(
        tmp_path, "mixtral-lm", recipe, GradientAlignment(), max_steps=2, save_strategy="no"
    )
    trainer.train()
    factors = []
    for row in trainer.state.log_history[:2]:
        assert row["loss"] == pytest.approx(
            row["task"] + row["distillation"] + 0.5 * row["expert_load"], rel=1e-5
        )
        factors.append(row["alignment_factor"])
    assert max(factors) > 1
    assert factors[-1] == pytest.approx(float(trainer.student.alignment.factor))


def test_the_second_phase_has_neither_teacher_nor_second_head(tmp_path):
    """24 rows, 4 a batch: 6 steps an epoch."""
    arguments = {"max_steps": 9, "save_steps": 3, "stop_epoch": 1.0}
    whole = trainer_for(tmp_path / "a", alignment=GradientAlignment(), **arguments)
    whole.train()
    assert whole.teacher is None
    assert whole.student.student is whole.student.plain
    named = {id(p) for p in whole.model.parameters()}
    kept = [p for group in whole.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in kept} == named
    history = [row for row in whole.state.log_history if "loss" in row]
    assert all("distillation" in row for row in history[:6])
    assert not any("distillation" in row for row in history[6:])
    assert (tmp_path / "a" / "checkpoint-3" / "dual_head.json").exists()
    assert not (tmp_path / "a" / "checkpoint-6" / "dual_head.json").exists()
    for step in (3, 6):
        folder = tmp_path / str(step) / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "a" / f"checkpoint-{step}", folder)
        again = trainer_for(folder.parent, alignment=GradientAlignment(), **arguments)
        again.train(resume_from_checkpoint=str(folder))
        assert_equal(weights(again), weights(whole))


def test_labels_alone(tmp_path):
    trainer = trainer_for(tmp_path, recipe=KL, has_teacher=False, max_steps=2, save_strategy="no")
    trainer.train()
    assert "distillation" not in trainer.state.log_history[0]


def test_the_checkpoint_is_the_plain_models(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.train()
    loaded = type(trainer.student.plain).from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(dict(loaded.state_dict()), dict(trainer.student.plain.state_dict()))
    assert load_file(tmp_path / "checkpoint-2" / "auxiliary_head.safetensors")


class Poison(TrainerCallback):
    """Makes the teacher say NaN from some step on."""

    def __init__(self, teacher, step):
        self.teacher, self.step = teacher, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.teacher.model.model.norm.weight.data[0] = float("nan")


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_teacher_that_becomes_nan_stops_the_run_before_anything_is_saved(logging_steps, tmp_path):
    trainer = trainer_for(tmp_path, logging_steps=logging_steps)
    trainer.add_callback(Poison(trainer.teacher, 3))
    with pytest.raises(NonFiniteLossError, match="before step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("bad_step", [1, 3])
def test_a_step_in_which_nothing_counts_is_refused_whenever_it_comes(bad_step, tmp_path):
    trainer = trainer_for(tmp_path, recipe=KL, max_steps=4, save_strategy="no")
    before = {}
    fetched = trainer._get_num_items_in_batch

    def count(batches, device):
        if trainer.state.global_step + 1 == bad_step:
            before.update(weights(trainer))
            batches[0]["labels"] = torch.full_like(batches[0]["labels"], -100)
        return fetched(batches, device)

    trainer._get_num_items_in_batch = count
    with pytest.raises(ValueError, match=f"in step {bad_step} no position counts"):
        trainer.train()
    assert_equal(weights(trainer), before)


def test_data_of_which_nothing_counts_are_refused_at_once(tmp_path):
    trainer = trainer_for(tmp_path, recipe=KL, max_steps=1, save_strategy="no")
    for row in trainer.train_dataset:
        row["labels"] = torch.full_like(row["labels"], -100)
    with pytest.raises(ValueError, match="no position counts"):
        trainer.train()


@pytest.mark.parametrize("where", ["backbone", "all"])
def test_alignment_over_parameters_of_parts_of_a_batch_is_refused(where, tmp_path):
    with pytest.raises(ValueError, match="align at the features"):
        trainer_for(tmp_path, alignment=GradientAlignment(where=where), gradient_accumulation_steps=2)


@pytest.mark.parametrize("given", [{"label_smoothing_factor": 0.1}, {"torch_compile": True}], ids=str)
def test_arguments_that_would_be_ignored_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match=f"no use for {next(iter(given))}"):
        trainer_for(tmp_path, **given)


def test_evaluation_is_the_plain_models(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, save_strategy="no")
    found = trainer.evaluate(rows_for("llama-lm", 4))
    batch = trainer.data_collator(rows_for("llama-lm", 4))
    rows, _ = trainer._counted(batch)
    with torch.no_grad():
        logits = trainer.student.plain(batch["input_ids"], batch["attention_mask"]).logits
    wanted = torch.nn.functional.cross_entropy(rows.pack(logits), rows.labels)
    assert found["eval_loss"] == pytest.approx(float(wanted), rel=1e-5)
    found = trainer.predict(rows_for("llama-lm", 4)).predictions
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    right = (logits[:, :-1].argmax(-1) == labels).sum(1)
    wanted_B3 = torch.stack([loss.sum(1), (labels != -100).sum(1), right], 1)
    torch.testing.assert_close(torch.tensor(found), wanted_B3, rtol=1e-5, atol=1e-5)


def test_labels_and_teacher_count_their_own_rows(tmp_path):
    """A teacher with another tokenizer has fewer; cut into micro-batches, the losses are the same."""
    histories = []
    for parts in (1, 2):
        trainer = trainer_for(
            tmp_path,
            recipe=DistillationRecipe(loss="uld"),
            max_steps=1,
            save_strategy="no",
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
        )
        for index, row in enumerate(trainer.train_dataset):
            row["teacher_positions"] = torch.arange(7).masked_fill(torch.arange(7) % 3 == index % 2, -1)
        batch = trainer.data_collator(trainer.train_dataset[:4])
        rows, taught = trainer._counted(batch)
        assert 0 < len(taught) < len(rows)
        assert trainer._get_num_items_in_batch([batch], trainer.args.device) == len(rows)
        assert trainer.num_taught == len(taught)
        trainer.train()
        histories.append(trainer.state.log_history[0])
    once, cut = histories
    for name in ("task", "distillation"):
        assert cut[name] == pytest.approx(once[name], rel=1e-4)


def test_the_factor_that_is_logged_is_the_mean_since_the_last(tmp_path):
    each = trainer_for(tmp_path / "a", alignment=GradientAlignment())
    each.train()
    factors = [row["alignment_factor"] for row in each.state.log_history if "loss" in row]
    every_third = trainer_for(tmp_path / "b", alignment=GradientAlignment(), logging_steps=3)
    every_third.train()
    logged = [row["alignment_factor"] for row in every_third.state.log_history if "loss" in row]
    assert len(set(factors)) > 2
    assert logged == pytest.approx([sum(factors[:3]) / 3, sum(factors[3:]) / 3])


def test_what_counts_is_found_once_for_each_micro_batch(tmp_path, monkeypatch):
    calls = []
    find = trainer_module.labelled_rows
    monkeypatch.setattr(
        trainer_module, "labelled_rows", lambda *args, **kwargs: calls.append(1) or find(*args, **kwargs)
    )
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer_for(tmp_path, recipe=KL, save_strategy="no", **arguments).train()
    assert len(calls) == 6


def test_labels_of_another_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_names=\['answers'\]: distillation reads 'labels'"):
        trainer_for(tmp_path, label_names=["answers"])


@pytest.mark.parametrize(
    ("stop_epoch", "arguments", "ends"),
    [
        (1.0, {"max_steps": 6}, r"after epoch 1, and the training ends after 1 \(6 steps, 6 an epoch\)"),
        (2.0, {"max_steps": -1, "num_train_epochs": 2}, r"ends after 2 \(12 steps, 6 an epoch\)"),
        (0.9, {"max_steps": 2, "gradient_accumulation_steps": 4}, r"ends after 1 \(2 steps, 2 an epoch\)"),
        (1.0, {"max_steps": 6, "per_device_train_batch_size": 5, "dataloader_drop_last": True}, None),
        (1.8, {"max_steps": -1, "num_train_epochs": 2}, None),
    ],
)
def test_a_second_phase_that_does_not_come_is_refused(stop_epoch, arguments, ends, tmp_path):
    """24 rows, 4 a batch."""
    if ends is None:
        trainer_for(tmp_path, stop_epoch=stop_epoch, **arguments)
        return
    with pytest.raises(ValueError, match=ends):
        trainer_for(tmp_path, stop_epoch=stop_epoch, **arguments)


def test_batch_statistics_of_a_part_of_the_batch_are_warned_of(tmp_path, caplog):
    trainer_for(tmp_path, "vit-image")
    assert "BatchNorm" not in caplog.text
    trainer = trainer_for(tmp_path, "vit-image", gradient_accumulation_steps=2)
    assert "one micro-batch of one process, and a step has 2 x 1" in caplog.text
    assert caplog.text.count("BatchNorm") == 1
    caplog.clear()
    student = trainer.student.student
    for device, is_shared in (("cpu", False), ("cuda", True)):
        arguments = SimpleNamespace(world_size=2, gradient_accumulation_steps=1, process_index=0)
        arguments.device = torch.device(device)
        DistillTrainer._share_batch_statistics(SimpleNamespace(args=arguments), student)  # pyright: ignore
        assert any(isinstance(m, nn.SyncBatchNorm) for m in student.auxiliary_head.modules()) == is_shared
        assert ("a step has 1 x 2" in caplog.text) != is_shared
        caplog.clear()


def test_weights_that_overflow_in_the_last_step_are_not_saved(tmp_path):
    trainer = trainer_for(tmp_path, recipe=KL, max_steps=3, save_steps=2)

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.student.head.linear.weight.grad.fill_(float("inf"))

    trainer.add_callback(Overflow())
    with pytest.raises(NonFiniteWeightsError, match="after step 3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
