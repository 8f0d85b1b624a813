"""Starts `moekit` on two processes, as torchrun and accelerate do it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 600
"""Seconds for one start; most mistakes show as a hang."""
SHOWN = 6000
"""Characters of the output in a failure."""
EXTENSIONS = Path(sys.prefix) / "torch_extensions" / torch.__version__
"""Where DeepSpeed's own extension is compiled to, once for each torch."""
BUILD = (
    "from deepspeed.accelerator import get_accelerator; "
    "get_accelerator().create_op_builder('ShareMemCommBuilder').load()"
)
ON_TWO = {"num_processes": 2, "use_cpu": True}


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to train on two processes."""

    kind: str
    """Accelerate's DistributedType."""
    config: dict[str, Any] | None = None
    """Accelerate's own; without one, torchrun starts the processes."""
    environment: dict[str, str] = field(default_factory=dict)
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's own configuration, instead of the keys that Accelerate has for it."""
    fsdp_version: int | None = None
    zero_stage: int | None = None

    @property
    def is_divided(self) -> bool:
        """Whether each process holds a part of the parameters."""
        return self.fsdp_version is not None or self.zero_stage == 3


def _fsdp() -> dict[str, Any]:
    options = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # by the model's own _no_split_modules
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": False,
    }
    return {"distributed_type": "FSDP", **ON_TWO, "fsdp_config": options}


DEEPSPEED = {"distributed_type": "DEEPSPEED", **ON_TWO}
ZERO_2 = {
    "zero_stage": 2,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
}
ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,  # or no parameter of a small model is really divided
    },
}

BACKENDS = {
    "ddp": Backend("MULTI_CPU"),
    "fsdp2": Backend("FSDP", _fsdp(), {"CPU_FSDP": "1"}, fsdp_version=2),
    "zero2": Backend("DEEPSPEED", DEEPSPEED | {"deepspeed_config": ZERO_2}, zero_stage=2),
    "zero3": Backend("DEEPSPEED", DEEPSPEED, deepspeed=ZERO_3, zero_stage=3),
}
REFUSED = {
    # Accelerate starts one process only.
    "start them with torchrun": Backend("MULTI_CPU", {"distributed_type": "MULTI_CPU", **ON_TWO}),
    # Two processes that know nothing of each other: Accelerate has FSDP for accelerators.
    "2 processes were started and": Backend("FSDP", _fsdp()),
    # DeepSpeed is left out.
    "asked for DEEPSPEED and gives MULTI_CPU": Backend(
        "DEEPSPEED", BACKENDS["zero2"].config, {"ACCELERATE_USE_CPU": "true"}
    ),
}
"""Ways that silently are not what they seem, by what `moekit train` says of them."""


def launch(
    backend: Backend, folder: Path, command: Sequence[object], worker: Path = WORKER
) -> subprocess.CompletedProcess[str]:
    """Run `moekit` with a command's words on two processes, which leave their notes in a folder."""
    port = str(_free_port())
    if backend.config is None:
        starter = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    else:
        file = _write_config(backend, folder)
        starter = ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", port]
    started = [sys.executable, "-m", *starter, str(worker), str(folder), *map(str, command)]
    return _run(started, _environment() | backend.environment)


def _write_config(backend: Backend, folder: Path) -> Path:
    """Accelerate's file, and DeepSpeed's beside it."""
    config = dict(backend.config or {})
    if backend.deepspeed is not None:
        file = folder / "deepspeed.json"
        file.write_text(json.dumps(backend.deepspeed), encoding="utf-8")
        config["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": True}
    path = folder / "accelerate.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def build_extension() -> None:
    """Compile what DeepSpeed needs on the CPU, a minute's work with g++ and ninja; once, for all tests."""
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    name = "deepspeed_shm_comm"
    with FileLock(EXTENSIONS / "moekit.lock", timeout=2 * TIMEOUT):
        if (EXTENSIONS / name / f"{name}.so").exists():
            return
        # Of a compilation that was killed; everybody would wait for its end.
        (EXTENSIONS / name / "lock").unlink(missing_ok=True)
        done = _run([sys.executable, "-c", BUILD], _environment())
        assert done.returncode == 0, done.stdout[-SHOWN:]


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command, and end it with its children when it takes too long."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            process.terminate()  # the launchers end their processes then
            output, _ = process.communicate()
            raise AssertionError(f"no end after {TIMEOUT} s: {output[-SHOWN:]}") from error
    return subprocess.CompletedProcess(command, process.returncode, output)


def _environment() -> dict[str, str]:
    """This process's, without what a training in it has left, on one thread, with the venv's ninja."""
    left = ("ACCELERATE_", "FSDP_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    return kept | own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
