"""`moekit demo`: compress the small model that comes with moekit, and train what is left of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import compress
from .compress_presets import with_preset
from .options import CommonOptions, CompressOptions, DemoOptions
from .prepare import SAMPLE_FILE, bundled_folder
from .record import read_run_file
from .rl_data import import_gym
from .rl_options import RlOptions
from .staging import check_output, partial_folder

OUT, RL_OUT = Path("moekit-demo"), Path("moekit-demo-rl")
SHARE = 0.5
SEQ_LEN = 256
CALIBRATION_TOKENS = 32768
EVAL_TOKENS = 32768
TASK = "reasoning-gym:chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=2,size=4000"
RL_STEPS = 200
RL: dict[str, Any] = {
    "data": TASK,
    "prompt_template": "Q: {question}\\nA:",
    "stop": ("\\n",),
    "max_completion_length": 16,
    "preset": "tiny",
    "learning_rate": 1e-4,
    "lr_scheduler": "linear",
    "eval_prompts": 128,
    "eval_steps": 20,
    "logging_steps": 5,
}


def run(options: DemoOptions) -> Path | None:
    """Compress the bundled model to half its experts; then, for the job rl, train it to do sums.

    An earlier demo gives way once the new one is whole.

    Returns:
        The folder that was made.

    Raises:
        ValueError: The output folder holds something else than an earlier demo, or this installation came
            without the model.
    """
    bundled = bundled_folder()
    if not (bundled / "config.json").is_file():
        raise ValueError(f"this installation of moekit came without the demo's model: '{bundled}' has none")
    is_rl = options.job == "rl"
    out = options.out or (RL_OUT if is_rl else OUT)
    # Beside the result, so that both can be looked at.
    compressed = out.with_name(f"{out.name}-compressed") if is_rl else out
    given = CompressOptions(
        model=str(bundled),
        out=compressed,
        ratio=SHARE,
        data=str(bundled / SAMPLE_FILE),
        seq_len=SEQ_LEN,
        calibration_tokens=CALIBRATION_TOKENS,
        eval_tokens=EVAL_TOKENS,
        debug=options.debug,
    )
    job = with_preset(given)  # as it will be recorded
    return _carry_out_rl(job, out) if is_rl else _carry_out(job, out, compress.run)


def _carry_out(job: Any, out: Path, work: Callable[..., Path | None]) -> Path | None:
    return work(job, replace=is_earlier_demo(out, job))


def _carry_out_rl(job: CompressOptions, out: Path) -> Path | None:
    """Compress, unless a training of what that gave was interrupted, which needs the same files; train."""
    from . import rl

    training = RlOptions(model=str(job.out), out=out, steps=RL_STEPS, debug=job.debug, **RL)
    # Before a minute's work, not after it.
    import_gym(TASK)
    check_output(out, replace=is_earlier_demo(out, training))
    assert job.out is not None
    if not (partial_folder(out).is_dir() and is_earlier_demo(job.out, job)):
        _carry_out(job, job.out, compress.run)
    return _carry_out(training, out, rl.run)


def is_earlier_demo(folder: Path, job: CommonOptions) -> bool:
    """Whether a folder holds the result of the demo, and of no other run of the same model."""
    config = read_run_file(folder).get("config")
    if not isinstance(config, dict):
        return False
    return all(
        config.get(name) == (list(value) if isinstance(value, tuple) else value)
        for name, value in vars(job).items()
        if name not in ("out", "debug")
    )
