"""`moekit rl`: from a policy and rewards to a better policy, and how it came about."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from ..moe import save_checkpoint
from ..moe.checkpoint import write_config_aliases
from ..rl import PolicyTrainer
from ..rl.checkpoint import checkpoints
from ..rl.processes import check_processes
from .console import show, step, warn
from .rl_adapters import merged, save_adapters, with_adapters
from .rl_checks import check_trackers
from .rl_options import RlOptions
from .rl_prepare import RlJob, prepare_rl
from .rl_record import RlRun, progress_line, summary_table, write_rl_records
from .shared_folder import check_unfinished, shared_folder
from .staging import partial_folder
from .train_arguments import asked_sharding, check_launch, check_sharding
from .train_export import copy_legal, verify_saved
from .train_model import load_trained

WORK = "rl"
"""Folder of checkpoints and history, in the folder of the work."""
ADAPTERS, TRACKERS = "adapter", "trackers"
"""Folders in the result."""


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
    ) as staging:
        finished = _train(job, staging.output, staging.work / WORK)
    if job.is_main:
        show(summary_table(finished))
        for warning in finished.warnings:
            warn(warning)
        show(f"report: {out / 'report.html'}", f"model:  {out}")
    return out


def _accelerator(options: RlOptions) -> Accelerator:
    check_trackers(options.report_to)
    on_cpu = options.device == "cpu" or torch.accelerator.current_accelerator() is None
    is_launched = "WORLD_SIZE" in os.environ  # alone, accelerate fails with a backend
    handlers: Any = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and is_launched else []
    accelerator = Accelerator(
        mixed_precision="bf16" if options.bf16 else "no",
        # DeepSpeed and FSDP are silently left out where the CPU is asked for.
        cpu=options.device == "cpu" or (on_cpu and asked_sharding() is None),
        log_with=list(options.report_to) or None,
        project_dir=None if options.out is None else str(_work(options.out) / TRACKERS),
        kwargs_handlers=handlers,
        # Otherwise accelerate stumbles over the "auto" of a configuration of DeepSpeed.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    check_processes(accelerator)
    check_sharding(accelerator.distributed_type)
    return accelerator


def _work(out: Path) -> Path:
    return partial_folder(out.expanduser()) / "work"


def _begin(work: Path) -> None:
    (work / WORK).mkdir(parents=True, exist_ok=True)


def _check_resume(options: RlOptions, out: Path) -> None:
    """Refuse `--resume` without anything to go on with."""
    if options.resume and not checkpoints(_work(out) / WORK):
        raise ValueError(
            f"--resume: there is no unfinished run for '{out}' with a checkpoint; leave --resume out to begin"
        )


def _train(job: RlJob, output: Path, folder: Path) -> RlRun:
    """Do the work; every process comes through here."""
    options, accelerator = job.options, job.accelerator
    _say(job, f"Loading the policy {job.source.name}")
    model = _policy(job)
    sizes = _sizes(model, options)
    _announce(job, folder)
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
    if job.is_main and (folder.parent / TRACKERS).is_dir():
        shutil.move(folder.parent / TRACKERS, output / TRACKERS)
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


def _sizes(model: Any, options: RlOptions) -> dict[str, int]:
    """Parameters of the result, and those that are trained."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    whole = sum(weight.numel() for weight in model.parameters())
    merged_away = 0 if options.lora is None else trained
    return {"parameters": whole - merged_away, "trained_parameters": trained}


def _announce(job: RlJob, folder: Path) -> None:
    """Say what will be done, and from where it goes on."""
    settings = job.settings
    _say(
        job,
        f"{job.algorithm.title} on {len(job.prompts):,} prompts, {settings.prompts_per_step} x "
        f"{settings.num_generations} completions a step, {job.accelerator.num_processes} process(es)",
    )
    if job.is_main and job.options.eval_prompts and not job.eval_prompts:
        warn(
            f"none of {len(job.prompts)} prompts is held out, which takes 10, so nothing is evaluated; "
            "give --eval-data, or --eval-prompts 0"
        )
    if last := checkpoints(folder):
        _say(job, f"Going on from {last[0].name.replace('-', ' ')}")


def _say(job: RlJob, text: str) -> None:
    if job.is_main:
        step(text)


def _on_row(job: RlJob, row: dict[str, Any]) -> None:
    """Of each logged step, on the main process."""
    step(progress_line(row, job.settings.steps))
    if job.options.report_to:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        job.accelerator.log(numbers, step=row["step"])


def _weights(job: RlJob) -> Any:
    return load_trained(job.source, job.source.config, "causal-lm", dtype="float32")


def _policy(job: RlJob) -> Any:
    """The model as it is trained: with adapters, if they were asked for."""
    model = with_adapters(_weights(job), job.options)
    if job.options.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.to(job.accelerator.device)


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
        save_adapters(model, output / ADAPTERS, state)
        # Nothing can be merged into weights in parts.
        model = model.merge_and_unload() if state is None else merged(_weights(job), output / ADAPTERS)
        state = None
    if state is not None:
        model.save_pretrained(output, state_dict=state, max_shard_size=job.options.max_shard_size)
        write_config_aliases(output / "config.json")
    else:
        save_checkpoint(model, output, max_shard_size=job.options.max_shard_size)
        verify_saved(model, output)
    job.processor.save_pretrained(output)
    copy_legal(job.source.folder, output)
    return type(model).__name__
