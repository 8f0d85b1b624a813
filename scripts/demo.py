"""`moekit demo`: compress the small model that comes with moekit, to see what the report looks like."""

from pathlib import Path

from . import compress
from .options import CompressOptions, DemoOptions
from .prepare import SAMPLE_FILE, bundled_folder
from .record import read_run_file

SHARE = 0.5
SEQ_LEN = 256
CALIBRATION_TOKENS = 32768
EVAL_TOKENS = 32768


def run(options: DemoOptions) -> Path | None:
    """Compress the bundled model to half its experts; an earlier demo gives way once the new one is whole.

    Returns:
        The folder that was made.

    Raises:
        ValueError: The output folder holds something else than an earlier demo, or this installation came
            without the model.
    """
    bundled = bundled_folder()
    if not (bundled / "config.json").is_file():
        raise ValueError(f"this installation of moekit came without the demo's model: '{bundled}' has none")
    job = CompressOptions(
        model=str(bundled),
        out=options.out,
        ratio=SHARE,
        data=str(bundled / SAMPLE_FILE),
        seq_len=SEQ_LEN,
        calibration_tokens=CALIBRATION_TOKENS,
        eval_tokens=EVAL_TOKENS,
        debug=options.debug,
    )
    return compress.run(job, replace=is_earlier_demo(options.out, job))


def is_earlier_demo(folder: Path, job: CompressOptions) -> bool:
    """Whether a folder holds the result of the demo, and of no other compression of the same model."""
    config = read_run_file(folder).get("config")
    if not isinstance(config, dict):
        return False
    return all(
        config.get(name) == (list(value) if isinstance(value, tuple) else value)
        for name, value in vars(job).items()
        if name not in ("out", "debug")
    )
