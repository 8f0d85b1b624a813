"""`moekit demo`: compress the small model that comes with moekit, to see what the report looks like."""

import shutil
from pathlib import Path

from . import compress
from .options import CompressOptions, DemoOptions
from .prepare import SAMPLE_FILE, bundled_folder
from .record import is_run_folder

SHARE = 0.5
SEQ_LEN = 256
CALIBRATION_TOKENS = 32768
EVAL_TOKENS = 32768


def run(options: DemoOptions) -> Path | None:
    """Compress the bundled model to half its experts.

    Returns:
        The folder that was made.

    Raises:
        ValueError: The output folder holds something else than an earlier demo, or this installation came
            without the model.
    """
    bundled = bundled_folder()
    if not (bundled / "config.json").is_file():
        raise ValueError(f"this installation of moekit came without the demo's model: '{bundled}' has none")
    if is_run_folder(options.out):
        shutil.rmtree(options.out)
    return compress.run(
        CompressOptions(
            model=str(bundled),
            out=options.out,
            ratio=SHARE,
            data=str(bundled / SAMPLE_FILE),
            seq_len=SEQ_LEN,
            calibration_tokens=CALIBRATION_TOKENS,
            eval_tokens=EVAL_TOKENS,
            debug=options.debug,
        )
    )
