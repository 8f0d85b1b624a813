"""`moekit distill` end to end: what it leaves, what it learns, and that it says the truth about it."""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from moekit.distill.teacher_cache_format import METADATA_KEY
from moekit.moe import expert_layers
from moekit.scripts import cli
from moekit.scripts.checkpoint_files import content_fingerprint
from moekit.scripts.distill_prepare import prepare_distillation
from moekit.scripts.load import load_tokenizer
from moekit.scripts.staging import partial_folder
from moekit.scripts.train_progress import TrainingLines
from moekit.scripts.training_record import finite
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from .tiny_checkpoints import TEXT_OPTIONS, VOCABULARY, tiny_qwen, tiny_tokenizer, write_checkpoint
from .tiny_distillation import (
    ALIGNED,
    CLASSIFY,
    FOREIGN,
    changed,
    distill,
    losses,
    record,
    tiny_judge,
    weights,
    words,
    write_foreign,
    write_pictures,
    write_vit,
)
from .tiny_training import tiny_bert, tiny_llama, write_config, write_dense


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "llama")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "llama", tiny_llama(attention_dropout=0.0))


@pytest.fixture(scope="module")
def scratch(config, checkpoint, data, tmp_path_factory) -> Path:
    """A full run from scratch, kept for all tests that look at one."""
    out = tmp_path_factory.mktemp("scratch") / "small"
    assert distill(config, checkpoint, data, out, "--save-steps", 3, "--eval-steps", 2) == 0
    return out


@pytest.fixture(scope="module")
def compressed(checkpoint, data, tmp_path_factory) -> Path:
    """The teacher with half its experts, in the moekit form."""
    out = tmp_path_factory.mktemp("compressed") / "half"
    given = ("--data", data, "--out", out, "--ratio", 0.5, "--form", "moekit", "--no-report")
    assert cli.main(["compress", str(checkpoint), *TEXT_OPTIONS, *map(str, given)]) == 0
    return out


@pytest.fixture(scope="module")
def judge(rows, tmp_path_factory) -> Path:
    """A good classifier that numbers its labels against the alphabet."""
    return write_checkpoint(tmp_path_factory.mktemp("judge") / "bert", tiny_judge(rows, ("sums", "salad")))


@pytest.fixture(scope="module")
def short(checkpoint, data, tmp_path_factory) -> Path:
    """A run from a config.json without a tokenizer, with fewer steps than there are to a line of progress."""
    folder = tmp_path_factory.mktemp("short")
    tiny_llama().config.save_pretrained(folder / "small")
    config, out = folder / "small" / "config.json", folder / "out"
    given = ("--steps", 3, "--loss", "dhkd", "--cache", folder / "cache")
    assert distill(config, checkpoint, data, out, *given, without="--logging-steps") == 0
    return out


def test_a_short_run_is_logged_at_its_half_and_its_end(short):
    logged = [row["step"] for row in record(short)["metrics"]["history"] if "loss" in row]
    assert logged == [1, 3]
    assert (short / "distillation.png").is_file()


def test_a_student_without_a_tokenizer_takes_the_teachers(short, checkpoint, judge, tmp_path, capsys):
    taken, own = (load_tokenizer(str(folder)) for folder in (short, checkpoint))
    assert taken.get_vocab() == own.get_vocab()
    student = write_vit(tmp_path / "student", 24, has_weights=False)
    teacher = write_vit(tmp_path / "teacher", 24, has_weights=True)
    (student / "preprocessor_config.json").unlink()
    pictures = write_pictures(tmp_path / "pictures")
    job = prepare_distillation(cli.parse(words(student, teacher, pictures, tmp_path / "out", *CLASSIFY)))
    assert job.teacher.is_same_reader
    said = capsys.readouterr().err
    assert f"'{student}' has no image processor beside it: taking that of '{teacher}'" in said


def test_the_record_names_teacher_and_cache_by_their_content(short, checkpoint):
    training = record(short)["training"]
    assert training["teacher_fingerprint"] == content_fingerprint(checkpoint)
    shard = short.parent / "cache" / "shard-00000.safetensors"
    with safe_open(shard, "pt") as file:
        digest = json.loads(file.metadata()[METADATA_KEY])["spec"]
    assert training["cache"] == {"kind": "hidden", "fingerprint": digest}


def test_the_card_is_named_after_the_folder_of_a_config(short, checkpoint):
    card = (short / "README.md").read_text(encoding="utf-8")
    assert f"# small: distilled from {checkpoint.name}\n" in card


def test_a_run_leaves_everything_and_nothing_else(scratch):
    assert {path.name for path in scratch.iterdir()} == {
        "README.md",
        "config.json",
        "distillation.png",
        "generation_config.json",
        "model.safetensors",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in scratch.parent.iterdir()] == ["small"]
    with Image.open(scratch / "distillation.png") as picture:
        picture.verify()


def test_it_is_evaluated_while_it_learns(scratch):
    history = record(scratch)["metrics"]["history"]
    steps = [row["step"] for row in history if "eval_cross_entropy" in row]
    assert steps == [2, 4]
    assert len(losses(scratch)) == 4
    assert losses(scratch)[-1] < losses(scratch)[0]


def test_the_numbers_are_those_of_the_saved_model(scratch, config, checkpoint, data, tmp_path):
    job = prepare_distillation(cli.parse(words(config, checkpoint, data, tmp_path / "out")))
    batch = job.collate([job.held_out_rows[index] for index in range(len(job.held_out_rows))])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][counted]
    found = record(scratch)["metrics"]["after"]
    log_probs = []
    for path, prefix in ((scratch, ""), (checkpoint, "teacher_")):
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            log_probs.append(model(**inputs).logits[:, :-1][counted].log_softmax(-1))
        loss = torch.nn.functional.nll_loss(log_probs[-1], labels).item()
        assert found[f"{prefix}cross_entropy"] == pytest.approx(loss, rel=1e-4)
        right = (log_probs[-1].argmax(-1) == labels).float().mean().item()
        assert found[f"{prefix}accuracy"] == pytest.approx(right, abs=1e-6)
    ours, theirs = log_probs
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert found["kl"] == pytest.approx(divergence, rel=1e-4)
    assert f"| {divergence:.4f} |" in (scratch / "README.md").read_text(encoding="utf-8")


def test_the_model_card_says_how_to_load_it(scratch):
    card = (scratch / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/or/hub-id", str(scratch))
    found: dict[str, object] = {}
    exec(code, found)
    assert found["model"].config.use_cache  # pyright: ignore[reportAttributeAccessIssue]


def test_the_recorded_command_repeats_the_run(scratch, tmp_path):
    recorded = shlex.split(record(scratch)["command"])[1:]
    recorded[recorded.index("--out") + 1] = str(tmp_path / "again")
    assert cli.main(recorded) == 0
    assert changed(scratch, tmp_path / "again") == []


@pytest.mark.parametrize("options", [ALIGNED, ("--loss", "jsd", "--beta", 0.3), ("--loss", "kl")])
def test_a_dense_student_of_a_mixture_of_experts(dense, checkpoint, data, tmp_path, options):
    out = tmp_path / "out"
    assert distill(dense, checkpoint, data, out, *options) == 0
    assert losses(out)[-1] < losses(out)[0]
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loaded[1].values())
    assert weights(out).keys() == weights(dense).keys()
    has_two, card = options == ALIGNED, (out / "README.md").read_text(encoding="utf-8")
    assert ("a second head, since dropped" in card) == has_two
    training = record(out)["training"]
    expected = {"start": "load", "loss": options[1], "heads": "dual" if has_two else "single", "steps": 4}
    expected |= {"aligned_at": "features" if has_two else None, "model_class": "LlamaForCausalLM"}
    assert expected.items() <= training.items()
    assert not [path for path in out.iterdir() if "head" in path.name or "alignment" in path.name]


def test_a_smaller_mixture_of_experts(checkpoint, data, tmp_path):
    small = write_checkpoint(tmp_path / "small", tiny_qwen(num_experts=4))
    out = tmp_path / "out"
    assert distill(small, checkpoint, data, out, "--load-balance", 0.1, "--gradient-checkpointing") == 0
    assert losses(out)[-1] < losses(out)[0]
    assert all(load >= 1 for load in losses(out, "expert_load"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert [layer.num_experts for layer in expert_layers(model)] == [4, 4]


def test_routers_heal_a_compressed_model(compressed, checkpoint, data, tmp_path):
    out = tmp_path / "out"
    healing = ("--train-only", "routers", "--label-weight", 0, "--steps", 24, "--learning-rate", 0.005)
    assert distill(compressed, checkpoint, data, out, *healing) == 0
    routers = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]
    assert changed(compressed, out) == routers
    metrics = record(out)["metrics"]
    assert metrics["after"]["kl"] < metrics["before"]["kl"]
    trained = sum(weights(out)[name].numel() for name in routers)
    assert record(out)["training"]["trained_parameters"] == trained
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(layer.num_physical_experts for layer in expert_layers(model)) == 8
    assert "import moekit.moe" in (out / "README.md").read_text(encoding="utf-8")


def test_a_classifier_takes_over_the_teachers_numbers(dense, judge, rows, tmp_path):
    """Taught by the teacher alone, it would name everything wrongly if they were mixed up."""
    out = tmp_path / "out"
    given = (*CLASSIFY, "--label-weight", 0, "--steps", 20, "--eval-share", 0.2)
    assert distill(dense, judge, rows, out, *given) == 0
    after = record(out)["metrics"]["after"]
    assert after["accuracy"] == after["teacher_accuracy"] == after["top1_agreement"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "sums", 1: "salad"}
    assert record(out)["training"]["labels"] == ["sums", "salad"]


def test_a_classifier_of_a_teacher_with_another_tokenizer(dense, rows, tmp_path):
    teacher = write_foreign(tmp_path / "teacher", tiny_judge(rows, ("salad", "sums"), FOREIGN))
    out = tmp_path / "out"
    given = (*CLASSIFY, "--label-weight", 0, "--steps", 20, "--eval-share", 0.2)
    assert distill(dense, teacher, rows, out, *given) == 0
    after = record(out)["metrics"]["after"]
    assert after["teacher_accuracy"] == after["accuracy"] == 1


def test_a_teacher_that_tells_the_texts_of_a_pair_apart(judge, rows, tmp_path):
    """The student's inputs do not say which token is of which text."""
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    settings = DistilBertConfig(vocab_size=VOCABULARY, pad_token_id=1, **sizes)  # pyright: ignore
    student = write_checkpoint(tmp_path / "student", DistilBertForSequenceClassification(settings))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", model_input_names=names)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizers = [
        word for who in ("--tokenizer", "--teacher-tokenizer") for word in (who, tmp_path / "tokenizer")
    ]
    for model, is_alike in ((student, False), (judge, True)):
        given = words(model, judge, rows, tmp_path / "out", *CLASSIFY, *tokenizers)
        job = prepare_distillation(cli.parse(given))
        batch = job.collate([job.train_rows[0], job.train_rows[1]])
        assert job.teacher.is_same_reader == is_alike
        assert ("token_type_ids" in batch) == is_alike
        assert is_alike or "token_type_ids" in batch["teacher_inputs"]


def test_a_last_batch_of_one_picture_of_a_teacher_that_sees_more_pixels(tmp_path):
    student = write_vit(tmp_path / "student", 16, has_weights=False)
    teacher = write_vit(tmp_path / "teacher", 24, has_weights=True)
    pictures, out = write_pictures(tmp_path / "pictures"), tmp_path / "out"
    # 19 pictures to train on: batch statistics of the second head would have nothing to be of.
    given = (*CLASSIFY, *ALIGNED, "--eval-share", 0.2, "--batch-size", 3, "--steps", 8)
    assert distill(student, teacher, pictures, out, *given) == 0
    assert record(out)["data"]["examples"] == {"train": 19, "held_out": 5}
    assert losses(out)[-1] < losses(out)[0]
    assert AutoModelForImageClassification.from_pretrained(out).config.image_size == 16


def test_a_language_model_of_a_teacher_with_another_tokenizer(dense, data, tmp_path):
    """The teacher's tokens are more than the student's, and more than it can read."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": FOREIGN}
    marks = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    teacher = write_foreign(tmp_path / "teacher", GPT2LMHeadModel(GPT2Config(**sizes, **marks)))  # pyright: ignore
    out = tmp_path / "out"
    assert distill(dense, teacher, data, out, "--loss", "uld", "--heads", "dual") == 0
    assert losses(out, "distillation")[-1] < losses(out, "distillation")[0]
    assert "kl" not in record(out)["metrics"]["after"]
    assert weights(out).keys() == weights(dense).keys()


@pytest.mark.parametrize("loss", ["uld", "dhkd", pytest.param("kl", marks=pytest.mark.slow)])
def test_a_head_that_is_padded_to_a_round_size(dense, data, tmp_path, loss):
    teacher = write_checkpoint(tmp_path / "teacher", tiny_qwen(vocab_size=VOCABULARY + 20))
    out = tmp_path / "out"
    assert distill(dense, teacher, data, out, "--loss", loss) == 0
    assert losses(out)[-1] < losses(out)[0]
    assert record(out)["metrics"]["after"]["kl"] > 0


def test_recomputing_activations_changes_nothing(dense, checkpoint, data, tmp_path):
    for name, more in (("kept", ()), ("recomputed", ("--gradient-checkpointing",))):
        assert distill(dense, checkpoint, data, tmp_path / name, *ALIGNED, *more) == 0
    assert changed(tmp_path / "kept", tmp_path / "recomputed") == []
    assert json.loads((tmp_path / "recomputed" / "config.json").read_text(encoding="utf-8"))["use_cache"]


def test_cutting_a_batch_changes_nothing(dense, checkpoint, data, tmp_path):
    cuts = {"whole": ("--batch-size", 6), "cut": ("--batch-size", 2, "--gradient-accumulation", 3)}
    for name, more in cuts.items():
        assert distill(dense, checkpoint, data, tmp_path / name, *more) == 0
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], tensor, rtol=0, atol=1e-4)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_the_last_step_of_an_epoch_may_be_short(dense, checkpoint, data, tmp_path):
    out = tmp_path / "out"
    # 103 blocks are 7 batches, and the last of 4 steps has one of 7 blocks.
    given = ("--epochs", 1, "--batch-size", 16, "--gradient-accumulation", 2, *ALIGNED)
    assert distill(dense, checkpoint, data, out, *given, without="--steps") == 0
    assert record(out)["training"]["steps"] == 4
    assert losses(out)[-1] < losses(out)[0]


@pytest.mark.parametrize("options", [ALIGNED, ("--teacher-dtype", "bfloat16")])
def test_bfloat16(dense, checkpoint, data, tmp_path, options):
    out = tmp_path / "out"
    assert distill(dense, checkpoint, data, out, "--bf16", *options) == 0
    assert losses(out)[-1] < losses(out)[0]
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}


def test_blocks_of_which_no_position_counts_are_refused(dense, tmp_path, capsys):
    """Within a character the two tokenizers never meet."""
    data, out = tmp_path / "faces.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"text": "\N{GRINNING FACE}" * 200}) + "\n", encoding="utf-8")
    teacher = write_foreign(tmp_path / "teacher", tiny_qwen(vocab_size=FOREIGN))
    given = ("--loss", "uld", "--heads", "dual", "--align-gradients", "--seq-len", 4, "--eval-steps", 2)
    assert distill(dense, teacher, data, out, *given) == 2
    assert "no position counts" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard(dense, checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert distill(dense, checkpoint, data, tmp_path / "out", "--report-to", "tensorboard") == 0
    assert list((tmp_path / "board").glob("events*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--heads", "dual", "--auxiliary-head", "copy", "--align-gradients", "--align-at", "all"),
        ("--heads", "dual", "--auxiliary-head", "linear", "--align-gradients", "--align-at", "backbone"),
        ("--loss", "bild", "--top-k", 4),
        ("--loss", "dkd", "--beta", 2),
        ("--loss", "mse", "--center", "mean", "--stop-epoch", 0.05),
        ("--loss", "skewed-kl", "--skew", 0.2, "--temperature", 2),
        ("--loss", "top-k-kl", "--top-k", 8, "--label-weight", 0),
        ("--max-shard-size", "20KB", "--no-compare"),
    ],
)
def test_what_can_be_asked_for_works(dense, checkpoint, data, tmp_path, options):
    out = tmp_path / "out"
    assert distill(dense, checkpoint, data, out, *options) == 0
    assert losses(out)[-1] < losses(out)[0]
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.slow
def test_noisy_embeddings(dense, checkpoint, data, tmp_path):
    """Trainer asks the student for its embeddings."""
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"neftune_noise_alpha": 5}), encoding="utf-8")
    for name, more in (("clear", ()), ("noisy", ("--training-arguments", file))):
        assert distill(dense, checkpoint, data, tmp_path / name, *more) == 0
    assert changed(tmp_path / "clear", tmp_path / "noisy")


@pytest.mark.slow
def test_a_bert_of_a_bert(judge, rows, tmp_path):
    student, out = write_dense(tmp_path / "student", tiny_bert()), tmp_path / "out"
    assert distill(student, judge, rows, out, *CLASSIFY, *ALIGNED, "--steps", 20, "--bf16") == 0
    assert record(out)["metrics"]["after"]["accuracy"] == 1


@pytest.mark.parametrize("norm", ["batch", "rms", "none"])
def test_the_norm_of_the_second_head(judge, rows, tmp_path, caplog, norm):
    """Statistics of a part of a batch are warned of once."""
    student, out = write_dense(tmp_path / "student", tiny_bert()), tmp_path / "out"
    given = (
        "--loss",
        "dhkd",
        "--auxiliary-norm",
        norm,
        "--auxiliary-dropout",
        0,
        "--gradient-accumulation",
        2,
    )
    assert distill(student, judge, rows, out, *CLASSIFY, *given, "--no-compare") == 0
    assert caplog.text.count("(--auxiliary-norm rms)") == (norm == "batch")


def test_numbers_that_are_none_do_not_stop_the_records():
    values = {"after": {"kl": float("nan"), "rows": 3}, "history": [{"loss": float("inf")}, {"loss": 1.5}]}
    assert finite(values) == {"after": {"kl": None, "rows": 3}, "history": [{"loss": None}, {"loss": 1.5}]}


def test_a_training_that_diverges_says_so(dense, checkpoint, data, tmp_path, monkeypatch, capsys):
    """The last update is not finite, though its loss was."""

    def overflow(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(model.parameters()).grad.fill_(float("inf"))

    monkeypatch.setattr(TrainingLines, "on_pre_optimizer_step", overflow)
    out = tmp_path / "out"
    assert distill(dense, checkpoint, data, out, "--save-steps", 2) == 2
    assert "after step 4, so they are not saved: the training has diverged. Lower" in capsys.readouterr().err
    assert not out.exists()
    assert [path.name for path in partial_folder(out).glob("work/trainer/*")] == ["checkpoint-2"]
