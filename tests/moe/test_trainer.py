import pytest
import torch
import transformers
from moekit.moe.finite import NonFiniteWeightsError
from moekit.moe.trainer import MoETrainer, reload_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
FAMILIES = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
}


def tiny_model(family="Qwen3Moe", seed=0, **overrides):
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], **overrides)
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def token_data():
    ids_NS = torch.randint(32, (24, 8), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": ids_S, "labels": ids_S} for ids_S in ids_NS]


def trainer_for(trainer_class, model, folder, max_steps=6, **arguments):
    arguments = {"save_steps": 3, "learning_rate": 0.01, **arguments}
    return trainer_class(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=11,
            **arguments,
        ),
        train_dataset=token_data(),
        eval_dataset=token_data()[:8],
    )


def tensors_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def different(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def experts_of(model):
    return {name for name, _ in model.named_parameters() if ".experts." in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_and_three_resumed_are_six_steps(family, tmp_path):
    uninterrupted = trainer_for(MoETrainer, tiny_model(family), tmp_path)
    uninterrupted.train()
    expected = tensors_of(uninterrupted.model)
    assert different(expected, tensors_of(tiny_model(family)))

    # Other initial values: whatever is not read from the checkpoint shows.
    resumed = trainer_for(MoETrainer, tiny_model(family, seed=1), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert different(tensors_of(resumed.model), expected) == []

    plain = trainer_for(Trainer, tiny_model(family, seed=1), tmp_path)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    lost = set(different(tensors_of(plain.model), expected))
    assert lost >= experts_of(plain.model), (
        f"transformers {transformers.__version__} resumes {family} exactly by itself: "
        "when it does so for every family here, moe/trainer.py has done its work and can be removed"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_model_comes_back_whole(family, tmp_path):
    def train(trainer_class, folder):
        # A loss that counts as better when it is greater makes the first checkpoint the best one.
        trainer = trainer_for(
            trainer_class,
            tiny_model(family),
            folder,
            max_steps=4,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-2")
        best = type(trainer.model).from_pretrained(folder / "checkpoint-2")
        return set(different(tensors_of(trainer.model), tensors_of(best)))

    assert train(MoETrainer, tmp_path / "ours") == set()
    assert train(Trainer, tmp_path / "plain") >= experts_of(tiny_model(family)), (
        f"transformers {transformers.__version__} restores the best {family} by itself: "
        "when it does so for every family here, moe/trainer.py has done its work and can be removed"
    )


def test_adapters_resume_exactly(tmp_path):
    def adapted(trainer_class):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return trainer_for(trainer_class, get_peft_model(tiny_model(), config), tmp_path)

    uninterrupted = adapted(MoETrainer)
    uninterrupted.train()
    resumed = adapted(MoETrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert different(tensors_of(resumed.model), tensors_of(uninterrupted.model)) == []
    assert different(tensors_of(resumed.model), tensors_of(adapted(MoETrainer).model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_checkpoint_is_read_whole(family, tmp_path):
    saved, model = tiny_model(family), tiny_model(family, seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    trainer_for(MoETrainer, model, tmp_path)._load_from_checkpoint(str(tmp_path))
    assert different(tensors_of(model), tensors_of(saved)) == []


def test_the_model_keeps_its_parameters_and_each_keeps_its_dtype(tmp_path):
    def mixed(seed):
        model = tiny_model(seed=seed).to(torch.bfloat16)
        for layer in model.model.layers:
            layer.mlp.gate.float()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        return model

    saved, model = mixed(0), mixed(1)
    saved.save_pretrained(tmp_path)
    before = dict(model.named_parameters())
    reload_weights(model, tmp_path)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}
    assert different(tensors_of(model), tensors_of(saved)) == []


def test_tied_embeddings_stay_tied(tmp_path):
    saved, model = (tiny_model(seed=seed, tie_word_embeddings=True) for seed in (0, 1))
    saved.save_pretrained(tmp_path)
    reload_weights(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert different(tensors_of(model), tensors_of(saved)) == []


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 2 weights of the model, such as 'model\.layers\.1\.mlp\.experts"
    ):
        reload_weights(tiny_model(), tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    other = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, **{**FAMILIES["Qwen3Moe"], "num_experts": 6})
    )
    with pytest.raises(ValueError, match=r"(?s)is of another model: .*size mismatch"):
        reload_weights(other, tmp_path)


def test_a_folder_without_a_checkpoint_gets_the_trainers_own_message(tmp_path):
    trainer = trainer_for(MoETrainer, tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer._load_from_checkpoint(str(tmp_path))


class Overflow(TrainerCallback):
    """Makes the update of a step overflow."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            next(model.parameters()).data[0, 0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [4, 5])
def test_weights_that_overflow_are_not_saved(tmp_path, step, value):
    """Neither in the checkpoint of the step, nor by whoever saves the model in the end."""
    trainer = trainer_for(MoETrainer, tiny_model(), tmp_path, max_steps=5, save_steps=2)
    trainer.add_callback(Overflow(step, value))
    with pytest.raises(NonFiniteWeightsError, match=f"after step {step}, .* Lower the learning rate"):
        trainer.train()
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved == ({"checkpoint-2"} if step == 4 else {"checkpoint-2", "checkpoint-4"})


def test_large_weights_are_none_of_that(tmp_path):
    trainer = trainer_for(MoETrainer, tiny_model(), tmp_path, max_steps=1)
    next(trainer.model.parameters()).data[0, 0] = 1e30
    trainer.check_weights()
