"""The losses of TRL's `GRPOTrainer`, which is called as it stands on a stand-in for its trainer."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from .samples import MAX_LENGTH, case, policy_logits, raw_batch, statistics

pytestmark = pytest.mark.slow

LOSSES = {
    "grpo": ("grpo", "token"),
    "dr-grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
}


@pytest.fixture(scope="module")
def trl_loss():
    """``(case, now) -> loss, metrics`` of TRL."""
    pytest.importorskip("trl", reason="TRL, the oracle of the common losses, is not installed")
    module = pytest.importorskip("trl.trainer.grpo_trainer", reason="this TRL has no GRPOTrainer")

    def compute(name, sample, now):
        batch, settings = sample.batch, sample.algorithm.hyperparameters()
        mask = batch.policy_mask.long()
        loss_type, level = LOSSES[name]
        high = settings["epsilon_high"]
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (now.logprobs, now.entropies, None),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=0.0,
            loss_type=loss_type,
            epsilon_low=settings["epsilon"],
            epsilon_high=settings["epsilon"] if high is None else high,
            args=SimpleNamespace(delta=settings.get("delta"), steps_per_generation=1),
            use_vllm=False,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            max_completion_length=MAX_LENGTH,
            accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
        )
        inputs = {
            "prompt_ids": batch.prompt_ids,
            "prompt_mask": batch.prompt_mask.long(),
            "completion_ids": batch.completion_ids,
            "completion_mask": mask,
            "advantages": batch.advantages[:, 0],
            "old_per_token_logps": batch.old_logprobs,
            "num_items_in_batch": mask.sum(),
        }
        loss = module.GRPOTrainer._compute_loss(trainer, None, inputs)
        return loss, trainer._metrics["train"]

    return compute


@pytest.mark.parametrize("settings", [{}, {"epsilon": 0.05, "epsilon_high": 0.4, "delta": 1.6}])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_clip_shares(trl_loss, name, settings):
    if name == "gspo":
        settings = {key: value for key, value in settings.items() if key != "delta"}
    sample = case(name, raw_batch().select(range(8)), **settings)
    ours, theirs = (policy_logits()[:8].requires_grad_() for _ in range(2))
    ids = sample.batch.completion_ids
    loss = sample.loss(statistics(ours, ids))
    expected, metrics = trl_loss(name, sample, statistics(theirs, ids))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
    found = sample.token_loss("policy_loss", statistics(ours, ids)).metrics
    for flag in ("low", "high"):
        shares = found[f"clip_ratio/{flag}"]
        mean = shares[:, 0].mean() if name == "gspo" else shares[sample.batch.policy_mask].mean()
        assert float(mean) == pytest.approx(metrics[f"clip_ratio/{flag}_mean"][0], abs=1e-6)
