"""One of several processes: runs `moekit`, and notes what this process saw of the training.

python worker.py NOTES [moekit's arguments]
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from moekit.distill import DistillTrainer
from moekit.moe import DropoutTrainer, MoETrainer, smoe_layers
from moekit.scripts import cli
from moekit.scripts import distill as distilling
from moekit.scripts import train as training
from moekit.scripts.staging import partial_folder
from torch import Tensor, distributed, nn

KILLED = "killed"
"""Name of the output, in the folder of the notes, of a run that was killed."""
KILLED_AT = 5
"""After so many steps; its hidden folder is the copy of another run's at this moment."""


class Watched(MoETrainer):
    """Notes k, the routers and the rows of every forward of the training; goes before a Trainer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forwards: list[dict[str, Any]] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Note, then compute."""
        if model.training:
            plain = self.accelerator.unwrap_model(self.model)
            layers = smoe_layers(plain).values()
            note = {"step": self.state.global_step, "k": [layer.active_experts for layer in layers]}
            note |= {"routers": router_digest(plain), "rows": _digest([inputs["input_ids"]])}
            self.forwards.append(note)
            self._copy_as_if_killed()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _copy_as_if_killed(self) -> None:
        """Copy what is on the disk; the checkpoint before this step was finished by every process."""
        killed = partial_folder(Path(sys.argv[1]) / KILLED)
        if self.state.global_step == KILLED_AT and distributed.get_rank() == 0 and not killed.exists():
            shutil.copytree(Path(str(self.args.output_dir)).parents[1], killed)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and write the notes."""
        found = super().train(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        notes = {
            "kind": self.accelerator.distributed_type.value,
            "fsdp_version": getattr(
                getattr(self.accelerator.state, "fsdp_plugin", None), "fsdp_version", None
            ),
            "zero_stage": None if plugin is None else plugin.zero_stage,
            "world": self.accelerator.num_processes,
            "backend": distributed.get_backend(),
            "local_parameters": sum(_local_size(weight) for weight in self.model_wrapped.parameters()),
            "forwards": self.forwards,
        }
        path = Path(sys.argv[1]) / f"rank{distributed.get_rank()}.json"
        path.write_text(json.dumps(notes), encoding="utf-8")
        return found


class WatchedDropoutTrainer(Watched, DropoutTrainer):
    """Of `moekit train`."""


class WatchedDistillTrainer(Watched, DistillTrainer):
    """Of `moekit distill`."""


def router_digest(model: Any) -> str:
    """Hash of the bytes of all routers' buffers."""
    return _digest([buffer for layer in smoe_layers(model).values() for buffer in layer.router.buffers()])


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _local_size(weight: Any) -> int:
    """Numbers of a parameter that this process holds."""
    if hasattr(weight, "ds_tensor"):  # ZeRO-3
        return weight.ds_tensor.numel()
    return (weight.to_local() if hasattr(weight, "to_local") else weight).numel()


def main() -> None:
    """Run."""
    if os.environ.get("CPU_FSDP") == "1":
        from cpu_fsdp import allow_fsdp_on_cpu  # beside this file, which runs as a script

        allow_fsdp_on_cpu()
    training.DropoutTrainer = WatchedDropoutTrainer
    distilling.DistillTrainer = WatchedDistillTrainer
    cli.command(sys.argv[2:])


if __name__ == "__main__":
    main()
