"""How a policy is trained, whatever the method."""

import math
from dataclasses import dataclass

from .algorithm import Algorithm
from .generation.settings import SamplingSettings

AT_LEAST_1 = (
    "steps",
    "prompts_per_step",
    "num_generations",
    "mini_batches",
    "num_iterations",
    "micro_batch_size",
    "max_completion_length",
    "max_sampling_rounds",
    "rehearsal_generations",
    "eval_generations",
    "save_steps",
    "logging_steps",
)
ABOVE_0 = ("learning_rate", "temperature", "rehearsal_share", "rehearsal_threshold")
NOT_NEGATIVE = (
    "beta",
    "entropy_coef",
    "router_aux_loss_coef",
    "weight_decay",
    "max_grad_norm",
    "warmup",
    "eval_steps",
    "eval_temperature",
)


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Names are TRL's where TRL has the thing.

    Attributes:
        steps: Rollout steps; each has ``mini_batches x num_iterations`` optimizer steps.
        prompts_per_step: Of all processes together.
        num_generations: Completions of each prompt, G.
        mini_batches: Optimizer steps in one pass over the completions of a step; a part of the prompts each.
        num_iterations: Passes over them.
        micro_batch_size: Completions in a forward pass on each process.
        max_completion_length: L_max, tokens.
        mask_truncated_completions: Leave completions that met that limit out of the loss.
        temperature: Of sampling, and of every log-prob.
        top_p: Keep the likeliest tokens of this mass.
        top_k: Keep so many of the likeliest; 0 for all.
        min_p: Keep tokens of at least this share of the likeliest one's probability.
        stop: Strings that end a completion.
        learning_rate: Largest of AdamW.
        lr_scheduler: One of Transformers'.
        warmup: Optimizer steps in which it rises, whatever the schedule; below 1 as a share of all.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to it; 0 for never.
        beta: Weight of the KL divergence (k3) from the reference; 0 needs none.
        entropy_coef: Weight of an entropy bonus.
        router_aux_loss_coef: Weight of the load-balancing loss of the experts, a mean over micro-batches.
        router_replay: Replay, in the updates, the experts that were chosen when old log-probs were computed.
        max_sampling_rounds: For methods that drop groups of equal rewards: how often they sample on.
        rehearsal_share: For DPH-RL: rehearsal samples of a step, as a share of its completions.
        rehearsal_generations: For DPH-RL: completions by which a prompt is judged before the training.
        rehearsal_threshold: For DPH-RL: share of right ones that makes it a rehearsed prompt.
        selection_scope: Over what Clip-Cov and KL-Cov select; ``microbatch`` as in the released codes.
        eval_steps: Steps between evaluations on held-out prompts; 0 for the first and the last alone.
        eval_generations: Completions of each of them, n of pass@k.
        eval_temperature: Of these; 0 for one greedy completion of each.
        pass_at: A completion passes whose first reward reaches this.
        save_steps: Between checkpoints.
        logging_steps: Between lines of progress.
        seed: Of everything random.
    """

    steps: int
    prompts_per_step: int = 8
    num_generations: int = 8
    mini_batches: int = 1
    num_iterations: int = 1
    micro_batch_size: int = 16
    max_completion_length: int = 256
    mask_truncated_completions: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    learning_rate: float = 1e-6
    lr_scheduler: str = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta: float = 0.0
    entropy_coef: float = 0.0
    router_aux_loss_coef: float = 0.0
    router_replay: bool = False
    max_sampling_rounds: int = 10
    rehearsal_share: float = 0.125
    rehearsal_generations: int = 8
    rehearsal_threshold: float = 1.0
    selection_scope: str = "minibatch"
    eval_steps: int = 0
    eval_generations: int = 8
    eval_temperature: float = 1.0
    pass_at: float = 0.5
    save_steps: int = 50
    logging_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ABOVE_0:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.rehearsal_threshold > 1:
            raise ValueError(f"rehearsal_threshold={self.rehearsal_threshold} is a share and at most 1")
        if self.selection_scope not in ("minibatch", "microbatch"):
            raise ValueError(f"selection_scope={self.selection_scope!r} is not 'minibatch' or 'microbatch'")
        if math.isnan(self.pass_at):
            raise ValueError("pass_at is NaN, which no reward reaches")
        _ = self.sampling  # refuses what cannot be sampled

    @property
    def sampling(self) -> SamplingSettings:
        """How completions of the training are drawn."""
        return SamplingSettings(
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop=self.stop,
        )

    @property
    def completions_per_step(self) -> int:
        """Of all processes, rehearsal left out."""
        return self.prompts_per_step * self.num_generations

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps on the completions of one step."""
        return self.mini_batches * self.num_iterations

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.updates_per_rollout

    def check(self, algorithm: Algorithm, num_processes: int) -> None:
        """Refuse what does not fit the method or the processes.

        Raises:
            ValueError: Says what, got, allowed and the fix.
        """
        updates = self.updates_per_rollout
        got = f"mini_batches={self.mini_batches} x num_iterations={self.num_iterations}"
        if updates < algorithm.min_updates:
            raise ValueError(
                f"{algorithm.title} does nothing of its own with {updates} update of each rollout ({got}); "
                f"it needs at least {algorithm.min_updates}: raise mini_batches or num_iterations"
            )
        if algorithm.max_updates is not None and updates > algorithm.max_updates:
            raise ValueError(
                f"{algorithm.title} is right for at most {algorithm.max_updates} update of each rollout, and "
                f"{got} makes {updates}"
            )
        if self.num_generations < algorithm.min_group:
            raise ValueError(
                f"num_generations={self.num_generations}: {algorithm.title} compares the completions of a "
                f"prompt and needs at least {algorithm.min_group}"
            )
        if self.prompts_per_step % (num_processes * self.mini_batches):
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} cannot be divided among {num_processes} "
                f"process(es) with {self.mini_batches} mini-batch(es) each; take a multiple of "
                f"{num_processes * self.mini_batches}"
            )
        if algorithm.hyperparameters().get("scale_rewards") == "batch" and num_processes > 1:
            raise ValueError(
                f"scale_rewards='batch' divides by the deviation of all rewards of a step, and each of the "
                f"{num_processes} processes knows only its own; take 'group' or 'none', or one process"
            )
