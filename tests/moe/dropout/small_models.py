"""Small dense models, their SMoE-Dropout conversions and a Trainer, for the tests of training."""

import torch
import transformers
from moekit.moe.dropout.convert import to_smoe_dropout
from moekit.moe.dropout.trainer import DropoutTrainer
from transformers import TrainingArguments

VOCAB = 48


def llama(seed: int = 0) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(
    width: int = 16, layers: int = 2, dropout: float = 0.0, vocab_size: int = VOCAB
) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        n_positions=32,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def smoe(
    router: str, k: int = 2, dense: transformers.PreTrainedModel | None = None
) -> transformers.PreTrainedModel:
    """Eight experts, K active."""
    combine = "softmax" if router == "learned" else "uniform"  # which alone has gradients
    return to_smoe_dropout(dense or llama(), 8, combine, router=router, active_experts=k, logit_std=1.0)


def token_ids(rows: int = 3, length: int = 8, seed: int = 5, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randint(2, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def trainer(model, folder, *, maker=DropoutTrainer, callbacks=None, data=None, options=None, **arguments):
    """A trainer of three steps on eight rows of tokens."""
    rows = token_ids(24) if data is None else data
    data = [{"input_ids": ids_S, "labels": ids_S} for ids_S in rows]
    arguments = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.01, **arguments}
    return maker(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            logging_steps=1,
            save_strategy="no",
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
        **(options or {}),
    )


def losses(trained) -> list[float]:
    return [record["loss"] for record in trained.state.log_history if "loss" in record]
