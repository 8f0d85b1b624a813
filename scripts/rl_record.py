"""What a finished `moekit rl` leaves behind: run.json, the model card, the report, the last table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..moe.checkpoint import METHOD
from ..rl import RunState
from ..rl.report import write_rl_report
from ..rl.report_content import pass_names, signs_of_collapse
from .console import millions, table
from .options import command_line
from .rl_prepare import RlJob
from .training_record import ModelCard, made_by, model_name, write_facts, write_model_card

SHOWN = {
    "eval_reward": "reward",
    "eval_distinct": "distinct completions",
    "eval_distinct_correct": "different right completions of a prompt",
    "eval_length": "tokens of a completion",
    "eval_truncated": "at the length limit",
}
"""Of an evaluation, beside pass@k."""
LINE = {
    "reward": "reward",
    "entropy": "entropy",
    "kl": "KL",
    "completions/mean_length": "length",
    "grad_norm": "gradient",
    "completions_per_second": "completions/s",
}
"""Of a line of progress, and how they are called there."""


@dataclass(frozen=True, kw_only=True)
class RlRun:
    """A finished training."""

    job: RlJob
    model_class: str
    state: RunState
    history: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    parameters: int
    trained_parameters: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reader must know first."""
        return (*self.faults, *signs_of_collapse(self.history))

    @property
    def faults(self) -> tuple[str, ...]:
        """What went wrong, beside what the curves show."""
        state, found = self.state, []
        if failed := {name: count for name, count in state.failures.items() if count}:
            shown = ", ".join(f"{name}: {count}" for name, count in sorted(failed.items()))
            found.append(f"rewards failed and cost their completions ({shown})")
        if state.skipped:
            found.append(
                f"{state.skipped} of {state.step} steps changed nothing, because all completions of each "
                "prompt earned the same; take harder or easier prompts, or more completions of each"
            )
        return tuple(found)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Rows of the history that have one."""
        return [row for row in self.history if "eval_pass@1" in row]

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Name, before and after, of what held-out prompts show."""
        if not (found := self.evaluations):
            return []
        first, last = found[0], found[-1]
        names = {name: name.removeprefix("eval_") for name in pass_names(found)} | SHOWN
        return [(label, f"{first[n]:.3f}", f"{last[n]:.3f}") for n, label in names.items() if n in first]


def progress_line(row: dict[str, Any], steps: int) -> str:
    """A step in one line: what was trained on, and what held-out prompts show if they were looked at."""
    shown = [f"{label} {row[name]:.3g}" for name, label in LINE.items() if row.get(name) is not None]
    parts = [", ".join(shown)] if shown else []
    if names := pass_names([row]):
        ends = dict.fromkeys((names[0], names[-1]))
        passed = ", ".join(f"{name.removeprefix('eval_')} {row[name]:.3f}" for name in ends)
        parts.append(f"held out: {passed}, reward {row['eval_reward']:.3g}")
    return f"step {row['step']} of {steps}: {'; '.join(parts)}"


def summary_table(run: RlRun) -> Table:
    """What came out, for the terminal."""
    if run.rows:
        title = f"On {len(run.job.eval_prompts)} held-out prompts"
        return table(title, ("", "before", "after"), run.rows)
    rewards = [row["reward"] for row in run.history if row.get("reward") is not None]
    shown = [("reward", f"{rewards[0]:.3f}", f"{rewards[-1]:.3f}")] if rewards else []
    return table("On training prompts", ("", "first step", "last step"), shown)


def write_rl_records(run: RlRun, folder: Path) -> None:
    """Write everything beside the model."""
    _write_run_file(run, folder)
    write_rl_report(
        folder,
        title=f"{model_name(run.job.options.model)}: {run.job.algorithm.title}",
        history=run.history,
        completions=run.completions,
        facts=_facts(run),
        warnings=run.faults,  # the report looks for signs of collapse itself
    )
    write_model_card(run, folder, _card(run))


def _facts(run: RlRun) -> dict[str, str]:
    job, settings = run.job, run.job.settings
    facts = {
        "policy": job.source.name,
        "method": f"{job.algorithm.title} ({_paper(job)})",
        "prompts": f"{len(job.prompts):,} to train on, {len(job.eval_prompts):,} held out",
        "a step": f"{settings.prompts_per_step} prompts x {settings.num_generations} completions",
        "updates of a step": str(settings.updates_per_rollout),
        "rewards": ", ".join(job.options.reward),
        "trained": f"{millions(run.trained_parameters)} of {millions(run.parameters)} parameters",
    }
    method = ", ".join(f"{name}={value}" for name, value in sorted(job.algorithm.hyperparameters().items()))
    chosen = ("learning_rate", "temperature", "max_completion_length", "beta", "entropy_coef", "seed")
    facts |= {name.replace("_", " "): str(getattr(settings, name)) for name in chosen}
    return facts | {"settings of the method": method or "none", "command": command_line("rl", job.options)}


def _write_run_file(run: RlRun, folder: Path) -> None:
    job, options = run.job, run.job.options
    write_facts(
        run,
        folder,
        training={
            "algorithm": options.algorithm,
            "paper": job.algorithm.paper,
            "method_settings": job.algorithm.hyperparameters(),
            "settings": vars(job.settings),
            "model_class": run.model_class,
            "parameters": run.parameters,
            "trained_parameters": run.trained_parameters,
            "steps": run.state.step,
            "updates": run.state.updates,
            "skipped_steps": run.state.skipped,
            "processes": job.accelerator.num_processes,
        },
        fingerprint=job.fingerprint["prompts"],
        examples={"train": len(job.prompts), "held_out": len(job.eval_prompts)},
        metrics={"reward_failures": run.state.failures, "history": run.history},
    )


def _paper(job: RlJob) -> str:
    paper = job.algorithm.paper
    return f"arXiv:{paper}" if paper[0].isdigit() else paper


def _card(run: RlRun) -> ModelCard:
    job, options = run.job, run.job.options
    size = millions(run.parameters)
    summary = (
        f"{made_by(run)}: trained with {job.algorithm.title} ({_paper(job)}) for "
        f"{run.state.step} steps on `{options.data}` with the rewards {', '.join(options.reward)}. "
        f"{size} parameters, in float32."
    )
    if options.lora is not None:
        summary += " `adapter/` holds the LoRA adapters alone, which are merged into these weights."
    lines = ["| held-out prompts | before | after |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in run.rows]
    quantised: Any = getattr(job.source.config, "quantization_config", None) or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    return ModelCard(
        tags=("moekit", "reinforcement-learning", options.algorithm),
        title=f"fine-tuned with {job.algorithm.title}",
        summary=summary,
        numbers="\n".join(lines) if run.rows else "No prompts were held out.",
        picture="`report.html` has the curves.",
        needs_moekit=method == METHOD,
    )
