"""`moekit compress --until-collapse-risk`: cut, heal, measure, and stop before the tipping point."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..compress.apply import apply_plan
from ..compress.layer_plan import keep_experts
from ..compress.methods import METHODS
from ..compress.plan import CompressionPlan, ModelIdentity
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
from ..moe.layer import ExpertLayer
from ..moe.statistics import RoutingStatistics
from .calibrate import record
from .collapse_store import read_runs
from .console import is_interactive, show, step
from .descent import Cut, Reached, Trail
from .heal import heal
from .load import load_model
from .planning import planner_options
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
        self.identity = ModelIdentity.of(expert_layers(model))
        self.top_k = max(layer.top_k for layer in expert_layers(model))
        self.statistics = self._record(expert_layers(model))
        self.path = work / STATE
        self.trail = self._resume()

    @property
    def sizes(self) -> list[int]:
        """The present one and all below it."""
        return list(range(self.trail.experts, self.top_k - 1, -1))

    def believe(self, sizes: list[int]) -> Belief:
        """Of qualities at some sizes."""
        options, kept = self.job.options, np.array(sizes) / self.trail.whole
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
            )
            if decision.experts is None:
                break
            self._cut(decision)
        self.trail.stop = decision.reason
        show(f"stopped at {self.trail.experts} of {self.trail.whole} experts: {decision.reason}")
        every = list(range(self.trail.whole, self.top_k - 1, -1))
        return Reached(
            plan=self._plan(),
            statistics=self.statistics,
            trail=self.trail,
            belief=self.believe(every),
        )

    def _cut(self, decision: Decision) -> None:
        """Make a cut, and keep it or take it back."""
        job, experts = self.job, decision.experts
        assert experts is not None
        step(f"Cutting to {decision.reason}")
        layers = expert_layers(self.model)
        said = planner_options(job.options) | {"experts": experts, "ratio": None, "grouping": "uniform"}
        plan = METHODS[job.options.method](layers, self._record(layers), **said)
        cores = {layer.name: layer.cores for layer in plan.layers}
        report = apply_plan(self.model, plan)
        healing = None
        if job.options.heal != "none":
            folder = self.work / f"healing-{experts}"
            healing = heal(job, self.model, folder)
            shutil.rmtree(folder, ignore_errors=True)
        quality = self._quality()
        floor = job.options.quality_floor
        is_kept = quality >= floor
        said_of_it = "kept" if is_kept else "below the floor: back to the last good state"
        show(f"{experts} of {self.trail.whole} experts: quality {quality:.3f} ({said_of_it})")
        cut = Cut(
            experts=experts,
            risk=decision.risk,
            expected=decision.expected,
            reason=decision.reason,
            quality=quality,
            is_kept=is_kept,
        )
        self.trail.cuts.append(cut)
        if is_kept:
            self.trail.merging, self.trail.healing = report, healing
            self.trail.kept = {n: [kept[core] for core in cores[n]] for n, kept in self.trail.kept.items()}
            self._keep()
        else:
            self.trail.save(self.path)
            self.model = self._last_good()

    def _record(self, layers: list[ExpertLayer]) -> RoutingStatistics:
        blocks, progress = self.job.texts.calibration, is_interactive()
        model = self.model
        found = record(model, layers, blocks, self.job.options.batch_size, progress=progress)
        return RoutingStatistics(layers=found.layers, fingerprint={"data": blocks.fingerprint})

    def _quality(self) -> float:
        blocks, size = self.job.texts.held_out, self.job.options.batch_size
        return min(1.0, retained_quality(self.original, self.model, blocks, self.trail.information, size))

    def _keep(self) -> None:
        """Save a good state; what was good before goes once the new one counts."""
        earlier, folder = self.trail.checkpoint, self.work / f"good-{self.trail.experts}"
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
            show(f"going on at {self.trail.experts} of {self.trail.whole} experts")
            self.model = self._last_good()
            return self.trail
        options, layers = self.job.options, expert_layers(self.model)
        earlier = read_runs(options.collapse_store, run_kind(self.job, self.identity.fingerprint))
        if earlier:
            show(f"expecting what {len(earlier)} earlier run(s) saw")
        return Trail(
            earlier=earlier,
            information=context_information(self.original, self.job.texts.held_out, options.batch_size),
            whole=layers[0].num_experts,
            kept={layer.name: list(range(layer.num_experts)) for layer in layers},
        )

    def _plan(self) -> CompressionPlan:
        options, whole = self.job.options, self.trail.whole
        planned = tuple(keep_experts(name, whole, self.top_k, kept) for name, kept in self.trail.kept.items())
        return CompressionPlan(
            model=self.identity,
            method=options.method,
            form=options.form,
            router="slice",
            layers=planned,
            requested_experts=sum(layer.num_kept for layer in planned),
            settings={
                "grouping": "uniform",
                "until_collapse_risk": options.until_collapse_risk,
                "quality_floor": options.quality_floor,
                "cuts": len(self.trail.cuts),
            },
        )


def run_kind(job: Job, fingerprint: str) -> dict[str, Any]:
    """What two runs must share for one to expect what the other saw.

    Args:
        job: What is asked for.
        fingerprint: Of the model's layers.
    """
    options = job.options
    healing = [options.heal, options.heal_steps, options.heal_learning_rate]
    return {"layers": fingerprint, "method": options.method, "healing": healing, "data": job.data}


def descend(job: Job, model: PreTrainedModel, staging: Staging) -> tuple[PreTrainedModel, Reached]:
    """Cut a model as far as the risk allows; a run that was killed goes on with the same decisions."""
    torch.manual_seed(job.options.seed)
    descent = Descent(job, model, staging.work)
    reached = descent.run()
    return descent.model, reached
