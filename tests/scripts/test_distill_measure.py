"""How near a student is to its teacher, against the same computed from all logits."""

import pytest
import torch
from moekit.distill import head_losses
from moekit.distill.losses import kl, valid_rows
from moekit.scripts import distill_measure
from moekit.scripts.distill_measure import agreement
from torch.nn.functional import cross_entropy

from ..distill.largest import Largest
from ..distill.students import NUM_LABELS, inputs_for, student_model


def frozen(name, seed=0):
    return student_model(name, seed).requires_grad_(False)


def compare(teacher, student, batches, num_columns=None):
    return agreement(
        teacher,
        student,
        batches,
        is_language_model=teacher.get_output_embeddings() is not None,
        num_columns=num_columns,
        shows_progress=False,
    )


def assert_means(found, theirs, ours, labels):
    assert found.rows == len(labels)
    for prefix, logits in (("", ours), ("teacher_", theirs)):
        loss, right = cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()
        assert getattr(found, f"{prefix}cross_entropy") == pytest.approx(float(loss), rel=1e-5)
        assert getattr(found, f"{prefix}accuracy") == pytest.approx(float(right), rel=1e-5)
    assert found.kl == pytest.approx(float(kl(ours, theirs).mean()), rel=1e-4)
    alike = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    assert found.top1_agreement == pytest.approx(float(alike), rel=1e-5)


@pytest.mark.parametrize("name", ["llama-tied-lm", "gemma2-lm", "granite-lm"])
@pytest.mark.parametrize("num_columns", [None, 35])
def test_language_models_without_their_logits(name, num_columns, monkeypatch):
    for module in (head_losses, distill_measure):
        monkeypatch.setattr(module, "TILE_ROWS", 16)
    teacher, student = frozen(name, seed=7), frozen("llama-lm")
    batches = [inputs_for(student, batch=14, seed=seed) for seed in (0, 1)]
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"] = labels.masked_fill(labels >= (num_columns or 40), -100)
    with Largest() as seen:
        found = compare(teacher, student, batches, num_columns)
    packed = [valid_rows(batch["labels"], batch["attention_mask"]) for batch in batches]
    assert seen.elements < min(map(len, packed)) * 35
    of_teacher, of_student = (
        torch.cat(
            [
                rows.pack(model(batch["input_ids"], batch["attention_mask"]).logits)[:, :num_columns]
                for rows, batch in zip(packed, batches, strict=True)
            ]
        )
        for model in (teacher, student)
    )
    assert_means(found, of_teacher, of_student, torch.cat([rows.labels for rows in packed]))


def test_classifiers():
    teacher, student = frozen("llama-sequence", seed=7), frozen("bert-sequence")
    inputs, labels = inputs_for(student, batch=6), torch.arange(6) % NUM_LABELS
    found = compare(teacher, student, [{**inputs, "labels": labels}])
    assert_means(found, teacher(**inputs).logits, student(**inputs).logits, labels)
