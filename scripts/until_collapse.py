"""`moekit compress --until-collapse-risk`: cut, heal, measure, and stop before the tipping point."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..compress.plan import CompressionPlan
from ..compress.retained_quality import context_information, retained_quality
from ..compress.tipping_point.controller import (
    Belief,
    Decision,
    believe,
    curve_of_runs,
    decide,
)
from ..moe.checkpoint import save_checkpoint
from ..moe.discovery import expert_layers
from .collapse_store import read_runs
from .console import show, step
from .cuts import CUTS, Cuts
from .descent import Cut, Reached, Trail
from .heal import heal
from .load import load_model
from .prediction import predict_footprint
from .prepare import Job
from .staging import Staging

STATE = "collapse.json"


class Descent:
    """A model on its way down.

    Args:
        job: What was asked for.
        model: The original in memory, which is cut.
        work: Folder of what a run that goes on needs.
    """

    def __init__(self, job: Job, model: PreTrainedModel, work: Path) -> None:
        self.job, self.work = job, work
        self.model = model
        self.original = load_model(job.source, dtype=job.options.dtype, device=job.options.device)
        self.cuts: Cuts = CUTS[job.options.take](job, model)
        self.path = work / STATE
        self.trail = self._resume()

    @property
    def sizes(self) -> list[int]:
        """The present one and all below it."""
        return [size for size in self.cuts.sizes if size <= self.trail.size]

    def believe(self, sizes: list[int]) -> Belief:
        """Of qualities at some sizes."""
        options, kept = self.job.options, np.array([self.cuts.share(size) for size in sizes])
        before = curve_of_runs([dict(points) for points in self.trail.earlier])
        return believe(self.trail.points, kept, options.quality_floor, before=before)

    def run(self) -> Reached:
        """Go down until no cut is allowed."""
        risk = self.job.options.until_collapse_risk
        assert risk is not None
        while True:
            decision = decide(
                self.sizes,
                self.believe(self.sizes),
                risk=risk,
                whole=self.trail.whole,
                failed=self.trail.failed,
                told=self.cuts.told,
            )
            if decision.size is None:
                break
            self._cut(decision)
        self.trail.stop = decision.reason
        show(f"stopped at {self._told(self.trail.size)}: {decision.reason}")
        every = self.cuts.sizes
        return Reached(
            plan=self._plan(),
            statistics=self.cuts.statistics,
            trail=self.trail,
            belief=self.believe(every),
            sizes=every,
            unit=self.cuts.unit,
            labels=[self.cuts.told(size) for size in every],
            num_bytes=[predict_footprint(self.original, self.cuts.plan(s)).total_bytes for s in every],
        )

    def _cut(self, decision: Decision) -> None:
        """Make a cut, and keep it or take it back."""
        job, size = self.job, decision.size
        assert size is not None
        step(f"Cutting to {decision.reason}")
        made = self.cuts.make(self.model, size, self.trail.kept)
        self.model, healing = made.model, None
        if job.options.heal != "none":
            folder = self.work / f"healing-{size}"
            healing = heal(job, self.model, folder)
            shutil.rmtree(folder, ignore_errors=True)
        quality = self._quality()
        is_kept = quality >= job.options.quality_floor
        said_of_it = "kept" if is_kept else "below the floor: back to the last good state"
        show(f"{self._told(size)}: quality {quality:.3f} ({said_of_it})")
        cut = Cut(
            size=size,
            share=self.cuts.share(size),
            risk=decision.risk,
            expected=decision.expected,
            reason=decision.reason,
            further=decision.further,
            quality=quality,
            is_kept=is_kept,
        )
        self.trail.cuts.append(cut)
        if is_kept:
            self.trail.merging, self.trail.healing, self.trail.kept = made.report, healing, made.kept
            self._keep()
        else:
            self.trail.save(self.path)
            self.model = self._last_good()

    def _told(self, size: int) -> str:
        return f"{self.cuts.told(size)} (of {self.trail.whole})"

    def _quality(self) -> float:
        blocks, size = self.job.texts.held_out, self.job.options.batch_size
        return min(1.0, retained_quality(self.original, self.model, blocks, self.trail.information, size))

    def _keep(self) -> None:
        """Save a good state; what was good before goes once the new one counts."""
        earlier, folder = self.trail.checkpoint, self.work / f"good-{self.trail.size}"
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(self.model, folder)
        self.trail.checkpoint = folder.name
        self.trail.save(self.path)
        if earlier is not None:
            shutil.rmtree(self.work / earlier, ignore_errors=True)

    def _last_good(self) -> PreTrainedModel:
        options, name = self.job.options, self.trail.checkpoint
        source = self.job.source if name is None else str(self.work / name)
        return load_model(source, dtype=options.dtype, device=options.device)

    def _resume(self) -> Trail:
        if self.path.is_file():
            self.trail = Trail.load(self.path)
            show(f"going on at {self._told(self.trail.size)}")
            self.model = self._last_good()
            return self.trail
        options, layers = self.job.options, expert_layers(self.model)
        earlier = read_runs(options.collapse_store, run_kind(self.job, self.cuts.identity.fingerprint))
        if earlier:
            show(f"expecting what {len(earlier)} earlier run(s) saw")
        return Trail(
            earlier=earlier,
            information=context_information(self.original, self.job.texts.held_out, options.batch_size),
            whole=self.cuts.whole,
            kept={layer.name: list(range(layer.num_experts)) for layer in layers},
        )

    def _plan(self) -> CompressionPlan:
        options, plan = self.job.options, self.cuts.plan(self.trail.size, self.trail.kept)
        told = {
            "until_collapse_risk": options.until_collapse_risk,
            "quality_floor": options.quality_floor,
            "cuts": len(self.trail.cuts),
        }
        return replace(plan, settings=plan.settings | told)


def run_kind(job: Job, fingerprint: str) -> dict[str, Any]:
    """What two runs must share for one to expect what the other saw.

    Args:
        job: What is asked for.
        fingerprint: Of the model's layers.
    """
    options = job.options
    healing = [options.heal, options.heal_steps, options.heal_learning_rate]
    taken = {"rank": options.sparse_rows} if options.take == "rank" else {"experts": options.method}
    return {"layers": fingerprint, "taken": taken, "healing": healing, "data": job.data}


def descend(job: Job, model: PreTrainedModel, staging: Staging) -> tuple[PreTrainedModel, Reached]:
    """Cut a model as far as the risk allows; a run that was killed goes on with the same decisions."""
    torch.manual_seed(job.options.seed)
    descent = Descent(job, model, staging.work)
    reached = descent.run()
    return descent.model, reached
