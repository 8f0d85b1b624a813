"""Dual-head students of every kind."""

import json

import pytest
import torch
from moekit.distill import AuxiliaryHeadSpec, DualHeadStudent, UnsupportedStudentError, task_head
from moekit.distill.auxiliary_head import has_batch_norm
from torch import nn
from transformers import BertConfig, BertModel

from .students import NUM_LABELS, STUDENTS, inputs_for, student_model

KINDS = sorted(STUDENTS)


def dual(name, **spec):
    torch.manual_seed(1)
    return DualHeadStudent(student_model(name), AuxiliaryHeadSpec(**spec) if spec else None)


@pytest.mark.parametrize("name", KINDS)
def test_the_task_head_says_what_the_plain_model_says(name):
    student = dual(name)
    inputs = inputs_for(student.model)
    with torch.no_grad():
        plain, both = student.model(**inputs).logits, student(**inputs)
    assert torch.equal(both.logits, plain)
    assert both.auxiliary_logits.shape == plain.shape
    assert not torch.equal(both.auxiliary_logits, plain)
    assert both.features.shape[-1] == task_head(student.model).num_features


@pytest.mark.parametrize("name", KINDS)
def test_a_copied_head_says_the_same(name):
    """Softcap, scale and pooling happen to both heads alike."""
    student = dual(name, kind="copy")
    both = student(**inputs_for(student.model))
    torch.testing.assert_close(both.auxiliary_logits, both.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_each_head_hears_its_own_loss_only(name):
    student = dual(name, kind="copy").train()
    head = task_head(student.model)
    both = student(**inputs_for(student.model))
    both.auxiliary_logits.square().sum().backward(retain_graph=True)
    if "tied" not in name and name not in ("gemma2-lm", "gpt2-lm"):  # a tied head is an embedding too
        assert head.linear.weight.grad is None or not head.linear.weight.grad.any()
    assert all(p.grad is not None for p in student.auxiliary_head.parameters())
    backbone = [p for p in student.model.base_model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in backbone)
    student.zero_grad(set_to_none=True)
    both.logits.square().sum().backward()
    assert head.linear.weight.grad is not None
    assert not any(p.grad.any() for p in student.auxiliary_head.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", KINDS)
def test_saved_with_both_heads_and_loaded_again(name, tmp_path):
    student = dual(name)
    inputs = inputs_for(student.model)
    student.save_pretrained(tmp_path / "both")
    loaded = DualHeadStudent.from_pretrained(tmp_path / "both").eval()
    assert loaded.spec == student.spec
    with torch.no_grad():
        mine, theirs, plain = student(**inputs), loaded(**inputs), student.export()(**inputs).logits
    # The file's alignment decides how a product is rounded.
    torch.testing.assert_close(theirs.logits, mine.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.auxiliary_logits, mine.auxiliary_logits, rtol=1e-5, atol=1e-6)
    alone = type(student.model).from_pretrained(tmp_path / "both").eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(**inputs).logits, plain, rtol=1e-5, atol=1e-6)
    for name_, tensor in student.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name_])


def test_the_exported_model_is_plain_and_unchanged():
    model = student_model("bert-sequence")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = inputs_for(model)
    student = DualHeadStudent(model)
    student(**inputs)
    exported = student.export()
    assert exported is model
    assert exported.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks for module in exported.modules())
    assert exported(**inputs).logits.shape == (3, NUM_LABELS)


def test_a_failed_forward_leaves_no_hook():
    student = dual("bert-sequence")
    with pytest.raises(ValueError, match="input_ids"):
        student(attention_mask=torch.ones(1, 3))
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize(
    ("name", "norm"),
    [("vit-image", nn.BatchNorm1d), ("bert-token", nn.RMSNorm), ("llama-sequence", nn.RMSNorm)],
)
def test_the_norm_follows_what_the_head_reads(name, norm):
    assert any(isinstance(module, norm) for module in dual(name).auxiliary_head)


@pytest.mark.parametrize("name", ["vit-image", "llama-sequence"])
def test_any_norm_can_be_had(name):
    for norm, module in (("rms", nn.RMSNorm), ("none", nn.Identity)):
        student = dual(name, norm=norm)
        assert any(isinstance(part, module) for part in student.auxiliary_head)
        assert not has_batch_norm(student.auxiliary_head)
        assert student(**inputs_for(student.model)).auxiliary_logits.shape == (3, NUM_LABELS)


def test_batch_statistics_of_all_processes():
    """Of one process they are the same as ever; the parameters and their names stay."""
    student = dual("vit-image")
    inputs = inputs_for(student.model)
    before, parameters = student(**inputs), list(student.parameters())
    names = list(student.state_dict())
    student.share_batch_statistics()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student.auxiliary_head)
    assert has_batch_norm(student.auxiliary_head)
    assert all(ours is theirs for ours, theirs in zip(student.parameters(), parameters, strict=True))
    assert list(student.state_dict()) == names
    torch.testing.assert_close(student(**inputs).auxiliary_logits, before.auxiliary_logits)


def test_a_teacher_with_other_classes():
    student = DualHeadStudent(student_model("bert-sequence"), num_teacher_classes=9)
    both = student(**inputs_for(student.model))
    assert both.logits.shape == (3, NUM_LABELS)
    assert both.auxiliary_logits.shape == (3, 9)
    with pytest.raises(ValueError, match="5 and 9 classes"):
        student.mixed_probabilities(**inputs_for(student.model))


def test_mixed_probabilities_at_both_ends_are_the_heads():
    student = dual("bert-sequence")
    inputs = inputs_for(student.model)
    with torch.no_grad():
        both = student(**inputs)
    task = student.mixed_probabilities(share=1.0, **inputs)
    torch.testing.assert_close(task, both.logits.softmax(-1))
    auxiliary = student.mixed_probabilities(share=0.0, temperature=2.0, **inputs)
    torch.testing.assert_close(auxiliary, (both.auxiliary_logits / 2).softmax(-1))
    torch.testing.assert_close(student.mixed_probabilities(share=0.3, **inputs).sum(-1), torch.ones(3))
    with pytest.raises(ValueError, match=r"share=2\.0"):
        student.mixed_probabilities(share=2.0, **inputs)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        student.mixed_probabilities(temperature=0.0, **inputs)


def test_refusals(tmp_path):
    with pytest.raises(UnsupportedStudentError, match="neither a language model nor a classifier"):
        DualHeadStudent(BertModel(BertConfig(**STUDENTS["bert-sequence"][2])))
    with pytest.raises(ValueError, match="norm='rms'"):
        dual("bert-token", norm="batch")
    with pytest.raises(ValueError, match="5 classes, not 7"):
        DualHeadStudent(student_model("bert-sequence"), AuxiliaryHeadSpec(kind="copy"), num_teacher_classes=7)
    student = dual("bert-sequence")
    with pytest.raises(ValueError, match="leave them out"):
        student(**inputs_for(student.model), labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="no dual-head student"):
        DualHeadStudent.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "bad", [{"kind": "deep"}, {"norm": "layer"}, {"width": 0}, {"width": -3}, {"dropout": 1.0}]
)
def test_bad_heads_are_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        AuxiliaryHeadSpec(**bad)


def test_damaged_files_are_refused(tmp_path):
    student = dual("bert-sequence")
    student.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "dual_head.json").read_text())
    (tmp_path / "dual_head.json").write_text(json.dumps(entry | {"num_teacher_classes": 6}))
    with pytest.raises(ValueError, match="does not fit"):
        DualHeadStudent.from_pretrained(tmp_path)
    (tmp_path / "dual_head.json").write_text(json.dumps(entry | {"model_class": "pipeline"}))
    with pytest.raises(ValueError, match="no dual-head student"):
        DualHeadStudent.from_pretrained(tmp_path)
    (tmp_path / "dual_head.json").write_text(json.dumps(entry))
    (tmp_path / "auxiliary_head.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="does not fit"):
        DualHeadStudent.from_pretrained(tmp_path)
