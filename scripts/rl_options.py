"""The options of `moekit rl`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from .options import (
    CommonOptions,
    Names,
    OptionalInt,
    OptionalNumber,
    OptionalPath,
    OptionalText,
)

Template = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")]
Assignments = Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...", help_behavior_hint="")]
PolicyModel = Positional[Annotated[str, arg(metavar="POLICY")]]
AlgorithmName = Literal[
    "grpo",
    "dr-grpo",
    "dapo",
    "gspo",
    "rloo",
    "reinforce",
    "gtpo",
    "clip-cov",
    "kl-cov",
    "rl-plus",
    "hbpo",
    "rover",
    "dph-rl",
    "epo",
]
Preset = Literal["none", "tiny", "paper"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions(CommonOptions):
    """What is to be learned."""

    model: PolicyModel
    """Folder or hub id of a causal language model, a compressed one above all."""
    data: OptionalText = None
    """Prompts: rows with a prompt (text, or chat messages) and the columns that rewards read.
    A .jsonl, .csv, .tsv or .parquet file, or a `datasets` name; or tasks made by reasoning-gym, such as
    reasoning-gym:chain_sum:min_terms=2,max_terms=3,size=2000."""
    eval_data: OptionalText = None
    """The like, held out; otherwise up to a tenth of the data, which is then not trained on."""
    eval_prompts: int = 64
    """Most held-out prompts to evaluate on; 0 for no evaluation, which leaves all data to the training."""
    prompt_template: Template = None
    """How a prompt is made of a row's columns, such as "Q: {question}\\nA:" (\\n is a line break)."""
    reward: Names = ("exact-match",)
    """What completions earn: names of rewards, module:function or file.py:function.
    The first decides which completions pass in evaluations."""
    reward_weights: Annotated[tuple[float, ...], arg(metavar="FLOAT ...", help_behavior_hint="")] = ()
    """Of the rewards in their order; 1 each unless said otherwise, 0 for one that is only watched."""
    reward_timeout: float = 10.0
    """Seconds of one call of a reward; what takes longer costs its completions, not the run."""
    pass_at: float = 0.5
    """A completion passes whose first reward reaches this."""
    tokenizer: OptionalText = None
    """Folder or hub id of a tokenizer, if not beside the policy."""
    out: OptionalPath = None
    """Folder to make, which may not exist yet or be empty."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions(TaskOptions):
    """How it is learned."""

    algorithm: AlgorithmName = "grpo"
    """The method; see docs/rl.md."""
    set: Assignments = ()
    """Settings of the method, such as epsilon=0.1; a wrong name is answered with those that there are."""
    preset: Preset = "none"
    """Values of options that are not given.
    tiny: for models of a few million parameters on a CPU.
    paper: the authors' number of optimizer steps in each step, and their weights of loss terms."""
    steps: int = 100
    """Rollout steps: sample, reward, learn."""
    prompts_per_step: OptionalInt = None
    """Prompts of each, all processes together; 8 unless said otherwise."""
    num_generations: OptionalInt = None
    """Completions of each prompt; 8 unless said otherwise."""
    mini_batches: OptionalInt = None
    """Optimizer steps in one pass over the completions of a step; 1, or what the method needs."""
    num_iterations: OptionalInt = None
    """Passes over them; 1, or what the method needs."""
    micro_batch_size: OptionalInt = None
    """Completions in a forward pass on each device; 16 unless said otherwise."""
    max_prompt_length: OptionalInt = None
    """Prompts of more tokens are refused."""
    max_completion_length: OptionalInt = None
    """Tokens; 256 unless said otherwise."""
    mask_truncated_completions: bool = False
    """Leave completions that met that limit out of the loss."""
    temperature: OptionalNumber = None
    """Of sampling; 1 unless said otherwise."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this mass."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Sample among tokens of at least this share of the likeliest one's probability."""
    stop: Texts = ()
    """Strings that end a completion (\\n is a line break)."""
    beta: OptionalNumber = None
    """Weight of the KL divergence from the policy as it was; 0 unless said otherwise."""
    entropy_coef: OptionalNumber = None
    """Weight of an entropy bonus; 0 unless the method has one."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of the experts."""
    router_replay: bool = False
    """Replay in the updates the experts that were chosen when old log-probs were computed."""
    max_sampling_rounds: int = 10
    """For dapo: how often a step samples on, at most, for groups whose rewards differ."""
    rehearsal_share: float = 0.125
    """For dph-rl: rehearsal samples of a step, as a share of its completions."""
    rehearsal_threshold: float = 1.0
    """For dph-rl: share of right completions before the training that makes a prompt a rehearsed one."""


@dataclass(frozen=True, kw_only=True)
class RlOptions(MethodOptions):
    """Fine-tune a policy by reinforcement learning with rewards that can be computed.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.
    """

    command: ClassVar[str] = "rl"
    model: PolicyModel
    """Folder or hub id of a causal language model, a compressed one above all."""
    learning_rate: OptionalNumber = None
    """Largest of the run; 1e-6 unless said otherwise."""
    lr_scheduler: str = "constant"
    """A schedule of Transformers: constant, constant_with_warmup, linear or cosine."""
    warmup: float = 0.0
    """Optimizer steps in which the learning rate rises, whatever the schedule; below 1 as a share of all."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to it; 0 for never."""
    lora: OptionalInt = None
    """Train LoRA adapters of this rank, not the weights; fused experts are no linear maps and stay."""
    lora_alpha: OptionalNumber = None
    """Their scale; twice the rank unless said otherwise."""
    lora_targets: Names = ()
    """Names of the modules that get adapters; all linear maps but the head unless said otherwise."""
    bf16: bool = False
    """Compute in bfloat16; the weights stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    eval_steps: int = 10
    """Steps between evaluations; 0 for one at the beginning and one at the end."""
    eval_generations: int = 8
    """Completions of each held-out prompt, n of pass@k."""
    eval_temperature: float = 1.0
    """Of these; 0 for a single greedy one."""
    save_steps: int = 50
    """Steps between checkpoints; at most so many are lost by an interruption."""
    logging_steps: int = 1
    """Steps between lines of progress."""
    report_to: Names = ()
    """Trackers of accelerate, such as tensorboard or trackio, which have to be installed.
    What they write to the disk is in trackers/ of the result."""
    resume: bool = False
    """Refuse to begin anew: there must be an unfinished run to go on with."""
    seed: int = 0
    """Of everything random."""
    device: OptionalText = None
    """Such as cpu or cuda; by default the accelerator, if there is one."""
    max_shard_size: str = "5GB"
    """Largest file of weights, such as 500MB or 5GB."""
