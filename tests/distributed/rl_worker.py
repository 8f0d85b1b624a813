"""One of several processes: runs `moekit rl`, and notes what this process saw of the training.

python rl_worker.py NOTES [moekit's arguments]
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from moekit.rl import PolicyTrainer
from moekit.scripts import cli
from moekit.scripts import rl as training
from moekit.scripts.staging import partial_folder
from torch import Tensor, distributed

KILLED = "killed"
"""Name of the output, in the folder of the notes, of a run that was killed."""
KILLED_AT = 3
"""After so many steps; its hidden folder is the copy of another run's at this moment."""


class WatchedPolicyTrainer(PolicyTrainer):
    """Notes the prompts, the completions and the weights of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[dict[str, Any]] = []
        self._collect = self._watched(self.rollouts.collector, "collect", self._watched_collect)
        self._update = self._watched(self.learner.updater, "update", self._watched_update)

    @staticmethod
    def _watched(owner: Any, name: str, function: Any) -> Any:
        """What was there before; copies of `owner`, which evaluations use, are not watched."""
        before = getattr(owner, name)
        setattr(owner, name, function)
        return before

    def _watched_collect(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        self._copy_as_if_killed()
        groups = self._collect(prompts, *args, **kwargs)
        said = {
            number: [list(rollout.completion_ids) for rollout in group.rollouts]
            for (number, _), group in zip(prompts, groups, strict=True)
        }
        indices = [prompt.index for _, prompt in prompts]
        self.steps.append({"step": self.state.step, "prompts": indices, "completions": said})
        return groups

    def _watched_update(self, *args: Any, **kwargs: Any) -> Any:
        taken = self._update(*args, **kwargs)
        weights = [local_part(weight) for weight in self.policy.parameters()]
        self.steps[-1] |= {"updates": taken, "weights": _digest(weights)}
        return taken

    def _copy_as_if_killed(self) -> None:
        """Copy what is on the disk; the checkpoint before this step was finished by every process."""
        killed = partial_folder(Path(sys.argv[1]) / KILLED)
        if self.state.step == KILLED_AT and distributed.get_rank() == 0 and not killed.exists():
            shutil.copytree(self.folder.parents[1], killed)

    def train(self) -> Any:
        """Train, and write the notes."""
        found = super().train()
        state, weights = self.accelerator.state, list(self.policy.parameters())
        notes = {
            "kind": self.accelerator.distributed_type.value,
            "fsdp_version": getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", None),
            "zero_stage": getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", None),
            "world": self.accelerator.num_processes,
            "backend": distributed.get_backend(),
            "parameters": sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights),
            "local_parameters": sum(local_part(weight).numel() for weight in weights),
            "steps": self.steps,
        }
        path = Path(sys.argv[1]) / f"rank{distributed.get_rank()}.json"
        path.write_text(json.dumps(notes), encoding="utf-8")
        return found


def local_part(weight: Any) -> Tensor:
    """What this process holds of a parameter."""
    if hasattr(weight, "ds_tensor"):  # ZeRO-3
        return weight.ds_tensor
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Run."""
    if os.environ.get("CPU_FSDP") == "1":
        from cpu_fsdp import allow_fsdp_on_cpu  # beside this file, which runs as a script

        allow_fsdp_on_cpu()
    training.PolicyTrainer = WatchedPolicyTrainer
    cli.command(sys.argv[2:])


if __name__ == "__main__":
    main()
