"""The losses of students in training, against the same computed from all logits."""

import pytest
import torch
from moekit.distill import (
    AuxiliaryHeadSpec,
    DualHeadStudent,
    GradientAlignment,
    alignment_factor,
    head_losses,
)
from moekit.distill.aligned_features import align
from moekit.distill.fused import tiles
from moekit.distill.gradient_alignment import feature_products, parameter_products
from moekit.distill.language_head import NonFiniteLogitsError, logit_scale
from moekit.distill.losses import LOSSES, ValidRows, masked_mean, valid_rows, valid_tokens
from moekit.distill.recipe import DistillationRecipe
from moekit.distill.student import StudentInTraining
from moekit.distill.task_head import UnsupportedStudentError, task_head
from moekit.distill.teachers import ModelTeacher, NonFiniteTeacherError
from torch.nn.functional import cross_entropy

from .largest import Largest
from .students import NUM_LABELS, STUDENTS, inputs_for, student_model

LANGUAGE = sorted(name for name in STUDENTS if name.endswith("-lm"))
SEQUENCES = ["bert-sequence", "llama-sequence", "vit-image", "resnet-image"]
TOKENS = ["bert-token", "llama-token"]
DHKD = {"loss": "binary-kl-norm", "heads": "dual", "options": {"center": "mean"}}


def batch_for(name, model):
    inputs = inputs_for(model)
    if name in LANGUAGE:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[0, :3] = -100  # a prompt
        rows = valid_rows(labels, inputs["attention_mask"])
        return inputs, rows.labels, rows
    if name in TOKENS:
        labels = torch.arange(21).view(3, 7) % NUM_LABELS
        labels[1, 2] = -100
        rows = valid_tokens(labels, inputs["attention_mask"])
        return inputs, rows.labels, rows
    return inputs, torch.tensor([0, 1, 2]), None


def in_training(name, recipe, **arguments):
    torch.manual_seed(1)
    student = student_model(name)
    if recipe.heads == "dual":
        student = DualHeadStudent(student, AuxiliaryHeadSpec(kind="linear"))
    return StudentInTraining(student, recipe, **arguments).train()


def dense(student, recipe, inputs, labels, rows, teacher):
    """The two losses from whole logits, and the features that two heads read."""
    features = None
    if recipe.heads == "dual":
        both = student.student(**inputs)
        logits, heard, features = both.logits, both.auxiliary_logits, both.features
    else:
        logits = heard = student.plain(**inputs).logits
    with torch.no_grad():
        said = teacher(**inputs).logits
    if rows is not None:
        logits, heard, said = rows.pack(logits), rows.pack(heard), rows.pack(said)
    method = LOSSES[recipe.loss]
    labelled = {"labels_N": labels} if method.needs_labels else {}
    loss_N = method.function(heard, said, **recipe.arguments, **labelled)
    weight = recipe.weight_for(heard.shape[-1])
    return recipe.label_weight * cross_entropy(logits, labels), weight * masked_mean(loss_N), features


def gradients(student):
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*LANGUAGE, *SEQUENCES, *TOKENS])
@pytest.mark.parametrize("values", [DHKD, {"loss": "kl", "temperature": 2.0}, {"loss": "mse"}], ids=str)
def test_values_and_gradients_equal_the_dense_losses(name, values):
    assert_equal_to_dense(name, DistillationRecipe(**values))


def assert_equal_to_dense(name, recipe):
    student = in_training(name, recipe).eval()  # no dropout; the losses are the same
    teacher = student_model(name, seed=7)
    inputs, labels, rows = batch_for(name, student.plain)
    task, distilled, _ = dense(student, recipe, inputs, labels, rows, teacher)
    (task + distilled).backward()
    wanted = gradients(student)
    student.zero_grad()
    said = ModelTeacher(teacher).says({**inputs, "labels": None}, rows)
    parts = student(inputs, labels=labels, rows=rows, said=said)
    parts["loss"].backward()
    torch.testing.assert_close(parts["loss"], task + distilled, rtol=1e-4, atol=1e-5)
    found = gradients(student)
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied-lm", "gemma2-lm", "granite-lm"])
@pytest.mark.parametrize("loss", ["bild", "binary-kl", "dkd", "top-k-kl", "uld"])
@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_losses_of_rows_equal_the_dense_ones(name, loss, label_weight):
    options = {"k": 6} if loss in ("bild", "top-k-kl") else {}
    assert_equal_to_dense(
        name, DistillationRecipe(loss=loss, weight=2.0, label_weight=label_weight, options=options)
    )


@pytest.mark.parametrize("heads", ["single", "dual"])
def test_what_the_teacher_does_not_have_is_learned_from_labels(heads):
    """Labels count at all rows, the teacher at its own, each sum over its own number."""
    recipe = DistillationRecipe(loss="uld", heads=heads, weight=2.0)
    student = in_training("llama-lm", recipe).eval()
    inputs, labels, rows = batch_for("llama-lm", student.plain)
    assert rows is not None
    kept = torch.tensor([0, 2, 5])
    taught = ValidRows(rows.positions[kept], labels[kept], rows.batch_shape)
    teacher = student_model("gpt2-lm", seed=7)
    said = ModelTeacher(teacher).says(inputs, taught)
    parts = student(inputs, labels=labels, rows=rows, said=said, taught=taught, num_items=20, num_taught=5)
    if heads == "dual":
        both = student.student(**inputs)
        logits, heard = both.logits, both.auxiliary_logits
    else:
        logits = heard = student.plain(**inputs).logits
    task = cross_entropy(rows.pack(logits), labels, reduction="sum") / 20
    loss_N = LOSSES["uld"].function(taught.pack(heard), taught.pack(teacher(**inputs).logits))
    torch.testing.assert_close(parts["task"], task)
    torch.testing.assert_close(parts["distillation"], 2 * loss_N.sum() / 5)
    torch.testing.assert_close(parts["loss"], parts["task"] + parts["distillation"])


@pytest.mark.parametrize("name", LANGUAGE)
def test_without_labels_a_language_model_is_measured(name):
    student = in_training(name, DistillationRecipe()).eval()
    inputs, labels, rows = batch_for(name, student.plain)
    assert rows is not None
    logits = rows.pack(student.plain(**inputs).logits)
    wanted = [
        cross_entropy(logits, labels, reduction="none"),
        torch.ones(len(rows)),
        logits.argmax(-1) == labels,
    ]
    torch.testing.assert_close(student(inputs, rows=rows)["measures"], torch.stack(wanted, 1).detach())
    torch.testing.assert_close(student(inputs)["logits"], student.plain(**inputs).logits)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("heads", ["single", "dual"])
def test_logits_of_all_rows_are_never_made(loss, heads, monkeypatch):
    """84 rows of 40 tokens, 16 at a time; 84 x 24 in the feed-forward layers."""
    for module in (tiles, head_losses):
        monkeypatch.setattr(module, "TILE_ROWS", 16)
    monkeypatch.setattr(tiles, "COLUMN_TILE_ELEMENTS", 16 * 40)
    options = {"k": 8} if loss == "top-k-kl" else {}
    student = in_training("llama-lm", DistillationRecipe(loss=loss, heads=heads, options=options))
    teacher = ModelTeacher(student_model("llama-lm", seed=7))
    inputs = inputs_for(student.plain, batch=14)
    rows = valid_rows(inputs["input_ids"])
    assert len(rows) == 84
    with Largest() as seen:
        said = teacher.says(inputs, rows)
        student(inputs, labels=rows.labels, rows=rows, said=said)["loss"].backward()
        student(inputs, rows=rows)
    assert seen.elements < 84 * 40


@pytest.mark.parametrize("name", ["llama-lm", "bert-sequence"])
def test_without_a_teacher_there_is_the_labels_loss(name):
    student = in_training(name, DistillationRecipe(**DHKD)).eval()
    inputs, labels, rows = batch_for(name, student.plain)
    parts = student(inputs, labels=labels, rows=rows)
    logits = student.plain(**inputs).logits
    logits = logits if rows is None else rows.pack(logits)
    torch.testing.assert_close(parts["loss"], cross_entropy(logits, labels))
    assert "distillation" not in parts


def test_alignment_on_the_way_back_is_the_factor_of_the_two_gradients():
    torch.manual_seed(0)
    features = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    heads = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) % 4
    alignment = GradientAlignment()
    for sign in (1.0, -1.0):
        parted = align(features, alignment)
        losses = [
            s * cross_entropy(part @ head, labels)
            for part, head, s in zip(parted, heads, (1, sign), strict=True)
        ]
        by_features, by_heads = torch.autograd.grad(losses, [features, heads])
        plain = [s * cross_entropy(features @ head, labels) for head, s in zip(heads, (1, sign), strict=True)]
        factor = alignment_factor(*feature_products(plain[0], plain[1], features))
        (wanted,) = torch.autograd.grad(factor * plain[0] + plain[1], features, retain_graph=True)
        torch.testing.assert_close(by_features, wanted, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(by_heads, torch.autograd.grad(plain, heads)[0])  # as without it
        torch.testing.assert_close(alignment.factor.double(), factor, rtol=1e-6, atol=1e-9)


def backbone(student):
    """What both losses reach, by name: without the heads, but with a head that is an embedding."""
    named = student.plain.named_parameters()
    return [p for name, p in named if name.partition(".")[0] not in ("lm_head", "classifier")]


@pytest.mark.parametrize("name", ["llama-lm", "llama-tied-lm", "bert-sequence", "bert-token"])
@pytest.mark.parametrize("where", ["features", "backbone", "all"])
def test_an_aligned_student_measures_its_factor(name, where):
    """Of two second heads, each against the other: a teacher that is sure pulls the features both ways."""
    recipe = DistillationRecipe(loss="mse", heads="dual", weight=50.0)
    teacher = student_model(name, seed=7)
    with torch.no_grad():
        task_head(teacher).linear.weight.mul_(1000)
    factors = []
    for sign in (1, -1):
        student = in_training(name, recipe, alignment=GradientAlignment(where=where)).eval()
        with torch.no_grad():
            student.student.auxiliary_head.weight.mul_(sign)
        inputs, labels, rows = batch_for(name, student.plain)
        said = ModelTeacher(teacher).says({**inputs, "labels": None}, rows)
        student(inputs, labels=labels, rows=rows, said=said)["loss"].backward()
        assert student.alignment is not None
        assert student.alignment.measured == 1
        student.student.alignment = None
        task, distilled, features = dense(student, recipe, inputs, labels, rows, teacher)
        if where == "features":
            wanted = alignment_factor(*feature_products(task, distilled, features))
        else:
            measured = list(student.parameters()) if where == "all" else backbone(student)
            wanted = alignment_factor(*parameter_products(task, distilled, measured))
        torch.testing.assert_close(student.alignment.factor, wanted, rtol=1e-3, atol=1e-4)
        factors.append(float(wanted))
    assert min(factors) == 1
    assert max(factors) > 1.01


def test_a_lagging_alignment_takes_what_the_step_before_said():
    alignment = GradientAlignment(every_n_steps=2)
    alignment.begin_step(0, num_parts=2)
    for dot in (-1.0, -5.0):
        alignment.observe(torch.tensor(dot), torch.tensor(3.0))
        assert alignment.factor == 1
    alignment.finish_step()
    assert alignment.factor == 2
    alignment.begin_step(1, num_parts=2)
    assert not alignment.is_measuring
    alignment.finish_step()
    assert (alignment.factor, alignment.measured) == (2, 1)


@pytest.mark.parametrize("name", LANGUAGE)
def test_what_becomes_of_logits_is_found(name):
    model = student_model(name)
    scale = logit_scale(model)
    wanted = {"gemma2-lm": (1.0, 3.0), "granite-lm": (0.25, None)}.get(name, (1.0, None))
    assert (pytest.approx(scale.scale, rel=1e-5), scale.softcap) == wanted


def test_logits_that_are_something_else_are_refused():
    model = student_model("llama-lm")
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits**3))
    with pytest.raises(UnsupportedStudentError, match="a factor and a softcap"):
        logit_scale(model)


def test_experts_are_evened_out_by_a_term_of_their_own():
    recipe = DistillationRecipe(loss="kl", load_balance=0.1)
    student = in_training("mixtral-lm", recipe)
    inputs, labels, rows = batch_for("mixtral-lm", student.plain)
    load = student(inputs, labels=labels, rows=rows)["expert_load"]
    assert 1 <= float(load.detach()) < 4
    load.backward()
    routers = [p.grad for name, p in student.named_parameters() if "gate.weight" in name]
    assert all(gradient is not None and gradient.any() for gradient in routers)


def test_padded_vocabularies_share_their_real_columns():
    recipe = DistillationRecipe(loss="kl", weight=2.0)
    student = in_training("llama-lm", recipe, num_columns=30).eval()
    teacher = student_model("llama-lm", seed=7)
    inputs, labels, rows = batch_for("llama-lm", student.plain)
    assert rows is not None
    said = ModelTeacher(teacher, num_columns=30).says({**inputs, "labels": None}, rows)
    parts = student(inputs, labels=labels, rows=rows, said=said)
    ours, theirs = (rows.pack(model(**inputs).logits) for model in (student.plain, teacher))
    wanted = 2 * LOSSES["kl"].function(ours[:, :30], theirs[:, :30]).mean()
    torch.testing.assert_close(parts["distillation"], wanted)
    torch.testing.assert_close(parts["task"], cross_entropy(ours, labels))


def test_a_teacher_that_says_nan_is_refused():
    teacher = student_model("llama-lm", seed=7)
    wrapped = ModelTeacher(teacher)
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("nan")
    inputs, _, rows = batch_for("llama-lm", teacher)
    with pytest.raises(NonFiniteTeacherError, match="says NaN"):
        wrapped.says({**inputs, "labels": None}, rows)


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_teacher_that_overflows_is_refused_for_that(value):
    """And not for what its logits are of its head's output, which cannot be seen."""
    teacher = student_model("llama-lm", seed=7)
    with torch.no_grad():
        teacher.lm_head.weight.fill_(value)
        teacher.model.norm.weight.fill_(1e10)
    with pytest.raises(NonFiniteTeacherError, match=r"NaN or infinity; .*--teacher-dtype float32"):
        ModelTeacher(teacher)
    with pytest.raises(NonFiniteLogitsError, match=r"Llama.* says NaN or infinity in torch\.float32"):
        logit_scale(teacher)


BAD = {
    "loss='k'": {"loss": "k"},
    "heads='three'": {"heads": "three"},
    "weight=-1.0": {"weight": -1.0},
    "leave nothing to learn": {"weight": 0.0, "label_weight": 0.0},
    "task head untrained": {"heads": "dual", "label_weight": 0.0},
    "takes beta, not 'skew'": {"loss": "jsd", "options": {"skew": 0.1}},
}


@pytest.mark.parametrize("message", BAD)
def test_recipes_that_cannot_be(message):
    with pytest.raises(ValueError, match=message):
        DistillationRecipe(**BAD[message])


def test_heads_that_are_not_the_recipes():
    with pytest.raises(ValueError, match="wrap it in DualHeadStudent"):
        StudentInTraining(student_model("bert-sequence"), DistillationRecipe(heads="dual"))
    with pytest.raises(ValueError, match="aligned between two heads"):
        StudentInTraining(student_model("bert-sequence"), DistillationRecipe(), alignment=GradientAlignment())
