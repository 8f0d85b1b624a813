"""`moekit rl`: from a policy and rewards to a better policy, and how it came about."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from ..moe import save_checkpoint
from ..moe.checkpoint import write_config_aliases
from ..rl import PolicyTrainer
from ..rl.processes import check_processes
from .console import show, step, warn
from .rl_options import RlOptions
from .rl_prepare import DEFAULT_ALPHA, RlJob, prepare_rl
from .rl_record import RlRun, progress_line, summary_table, write_rl_records
from .shared_folder import check_unfinished, shared_folder
from .staging import partial_folder
from .train_arguments import asked_sharding, check_launch, check_sharding
from .train_export import copy_legal, verify_saved
from .train_model import load_trained

WORK = "rl"
"""Folder of checkpoints and history, in the folder of the work."""


def run(options: RlOptions, *, replace: bool = False) -> Path:
    """Train, or go on with the training that the same options began.

    Args:
        options: What to do.
        replace: The output folder may hold something, which goes once the new result is whole.

    Returns:
        The folder that was made.

    Raises:
        ValueError: Something that was asked for cannot be, in almost all cases before any work.
        DiskFullError: There is no room for the result.
    """
    check_launch("rl")
    accelerator = _accelerator(options)
    job = prepare_rl(options, accelerator, replace=replace)
    out = Path(str(options.out)).expanduser()
    if job.is_main:
        check_unfinished(out, job.fingerprint, vars(options), f"{WORK}/step-*")
        _check_resume(options, out)
    with shared_folder(
        out,
        job.fingerprint,
        is_main=job.is_main,
        wait=accelerator.wait_for_everyone,
        begin=_begin,
        replace=replace,
    ) as (output, work):
        finished = _train(job, output, work / WORK)
    if job.is_main:
        show(summary_table(finished))
        for warning in finished.warnings:
            warn(warning)
        show(f"report: {out / 'report.html'}", f"model:  {options.out}")
    return out


def _accelerator(options: RlOptions) -> Accelerator:
    on_cpu = options.device == "cpu" or torch.accelerator.current_accelerator() is None
    is_launched = "WORLD_SIZE" in os.environ  # alone, accelerate fails with a backend
    handlers: Any = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and is_launched else []
    accelerator = Accelerator(
        mixed_precision="bf16" if options.bf16 else "no",
        # DeepSpeed and FSDP are silently left out where the CPU is asked for.
        cpu=options.device == "cpu" or (on_cpu and asked_sharding() is None),
        log_with=list(options.report_to) or None,
        project_dir=None if options.out is None else str(partial_folder(options.out.expanduser()) / "work"),
        kwargs_handlers=handlers,
    )
    check_processes(accelerator)
    check_sharding(accelerator.distributed_type)
    return accelerator


def _begin(work: Path) -> None:
    (work / WORK).mkdir(parents=True, exist_ok=True)


def _check_resume(options: RlOptions, out: Path) -> None:
    """Refuse `--resume` without anything to go on with."""
    if options.resume and not any((partial_folder(out) / "work" / WORK).glob("step-*")):
        raise ValueError(
            f"--resume: there is no unfinished run for '{out}' with a checkpoint; leave --resume out to begin"
        )


def _train(job: RlJob, output: Path, folder: Path) -> RlRun:
    """Do the work; every process comes through here."""
    options, accelerator = job.options, job.accelerator
    _say(job, f"Loading the policy {job.source.name}")
    model = _policy(job)
    weights = list(model.parameters())
    sizes = {
        "parameters": sum(weight.numel() for weight in weights),
        "trained_parameters": sum(weight.numel() for weight in weights if weight.requires_grad),
    }
    _say(
        job,
        f"{job.algorithm.title} on {len(job.prompts):,} prompts, {job.settings.prompts_per_step} x "
        f"{job.settings.num_generations} completions a step, {accelerator.num_processes} process(es)",
    )
    if options.report_to:
        accelerator.init_trackers("moekit-rl", config={k: str(v) for k, v in vars(options).items()})
    trainer = PolicyTrainer(
        model,
        job.processor,
        job.algorithm,
        job.rewards,
        job.prompts,
        job.settings,
        folder=folder,
        eval_prompts=job.eval_prompts,
        accelerator=accelerator,
        on_row=lambda row: _on_row(job, row),
    )
    state = trainer.train()
    model_class = _export(job, trainer, output)
    if options.report_to:
        accelerator.end_training()
    finished = RlRun(
        job=job,
        model_class=model_class,
        state=state,
        history=trainer.history.read() if job.is_main else [],
        completions=trainer.completions.read() if job.is_main else [],
        **sizes,  # from before the training, which may divide them
    )
    if job.is_main:
        write_rl_records(finished, output)
    return finished


def _say(job: RlJob, text: str) -> None:
    if job.is_main:
        step(text)


def _on_row(job: RlJob, row: dict[str, Any]) -> None:
    """Of each logged step, on the main process."""
    step(progress_line(row, job.settings.steps))
    if job.options.report_to:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        job.accelerator.log(numbers, step=row["step"])


def _policy(job: RlJob) -> Any:
    """The model as it is trained: with adapters, if they were asked for."""
    options = job.options
    model: Any = load_trained(job.source, job.source.config, "causal-lm", dtype="float32")
    if options.lora is not None:
        model = _with_adapters(model, options)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(job.accelerator.device)


def _with_adapters(model: Any, options: RlOptions) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora needs the package peft: pip install 'moekit[rl]'") from error
    assert options.lora is not None
    alpha: Any = DEFAULT_ALPHA * options.lora if options.lora_alpha is None else options.lora_alpha
    targets: Any = list(options.lora_targets) or "all-linear"
    try:
        return get_peft_model(model, LoraConfig(r=options.lora, lora_alpha=alpha, target_modules=targets))
    except ValueError as error:
        raise ValueError(f"--lora-targets {' '.join(options.lora_targets)}: {error}") from error


def _export(job: RlJob, trainer: PolicyTrainer, output: Path) -> str:
    """Write the plain model, adapters merged into it; every process has to call it.

    Raises:
        VerificationError: What was written is not what was in memory.
    """
    accelerator, model = job.accelerator, cast(Any, trainer.model)
    is_divided = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    state = trainer.state_dict() if is_divided else None
    if not job.is_main:
        return type(model).__name__
    if job.options.lora is not None:
        model.save_pretrained(output / "adapter", **({} if state is None else {"state_dict": state}))
        model, state = model.merge_and_unload(), None
    if state is not None:
        model.save_pretrained(output, state_dict=state, max_shard_size=job.options.max_shard_size)
        write_config_aliases(output / "config.json")
    else:
        save_checkpoint(model, output, max_shard_size=job.options.max_shard_size)
        verify_saved(model, output)
    job.processor.save_pretrained(output)
    copy_legal(job.source.folder, output)
    return type(model).__name__
