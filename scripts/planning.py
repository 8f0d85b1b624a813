"""How `moekit compress` comes by its plan: the user's, a planner's, or layer by layer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..compress.budget import sensitivity_counts
from ..compress.m_smoe import plan_m_smoe
from ..compress.methods import METHODS, NEEDS_SAMPLES
from ..compress.plan import NEEDS_SAMPLES as ALIGNS_BY_SAMPLES
from ..compress.plan import CompressionPlan
from ..compress.scores import NEEDS_NO_DATA
from ..moe.layer import ExpertLayer
from ..moe.statistics import RoutingStatistics
from .calibrate import Calibration, even_statistics
from .console import is_interactive, step
from .options import CompressOptions
from .prepare import Job, budget_options, low_rank_rule, planner_options
from .sensitivity import layer_sensitivities
from .sequential import compress_in_sequence


def try_planner(options: CompressOptions, layers: list[ExpertLayer]) -> None:
    """Ask the routers, before anything is measured, whether they can do what is asked for.

    Raises:
        ValueError: They cannot.
    """
    even, said = even_statistics(layers), planner_options(options)
    said.pop("similarity", None)  # all of a layer's weights, for "weights": too much for a trial
    groups = max(layer.router_constraints.num_groups for layer in layers)
    is_adaptive = options.grouping == "adaptive" and groups > 1
    if options.grouping == "sensitivity" or is_adaptive:
        said["grouping"] = "uniform"  # how many stay in each layer is not known yet
    if options.method not in NEEDS_SAMPLES:
        # The weights that scores without data read may not be there yet; any score asks the routers the same.
        method = "frequency" if options.method in NEEDS_NO_DATA else options.method
        plan = METHODS[method](layers, even, **said)
    else:  # without tokens to compare experts on, a merge of the same size behind the same router
        router = said.get("router", "slice" if options.method == "ream" else "redirect")
        said = {"grouping": "uniform", "router": router, "form": options.form, **budget_options(options)}
        plan = plan_m_smoe(layers, even, **said)
    if is_adaptive and plan.router in ("slice", "mean"):
        raise ValueError(
            "--grouping adaptive counts experts one by one, but the routers choose among up to "
            f"{groups} groups of one size, and --router {plan.router} "
            "keeps them: take --grouping uniform or sensitivity, or --router redirect"
        )


def needs_samples(job: Job) -> bool:
    """Whether planner or alignment read what the experts read."""
    if job.plan is not None:
        return job.plan.alignment.method in ALIGNS_BY_SAMPLES or job.plan.low_rank is not None
    options = job.options
    by_method = options.method in NEEDS_SAMPLES or options.alignment in ALIGNS_BY_SAMPLES
    return by_method or options.rank is not None


def make_plan(
    job: Job, model: PreTrainedModel, layers: list[ExpertLayer], calibration: Calibration, folder: Path
) -> CompressionPlan:
    """The user's plan, or a new one; the folder keeps what an interrupted run has measured for it."""
    if job.plan is not None:
        return job.plan
    said = planner_options(job.options)
    if job.options.grouping == "sensitivity":
        said["sensitivities"] = _sensitivities(job, model, layers, calibration, folder, said)
    return with_low_rank(_planned(job, calibration, layers, **said), job.options)


def _sensitivities(
    job: Job,
    model: PreTrainedModel,
    layers: list[ExpertLayer],
    calibration: Calibration,
    folder: Path,
    said: dict[str, Any],
) -> list[dict[int, float]]:
    """What each layer suffers alone, where tokens reach it."""
    step(f"Measuring what {len(layers)} layers suffer from being cut alone")
    known = calibration.statistics.layers
    silent = {index for index, layer in enumerate(layers) if layer.name not in known}
    options = budget_options(job.options)
    options["exclude_layers"] = {*options["exclude_layers"], *silent}

    def plan_layers(part: list[ExpertLayer], kept: int) -> CompressionPlan:
        alone = {"grouping": "uniform", "experts": kept, "ratio": None, "exclude_layers": ()}
        return _planned(job, calibration, part, **(said | alone))

    return layer_sensitivities(
        model,
        layers,
        job.texts.calibration,
        sensitivity_counts(layers, **options),
        plan_layers,
        batch_size=job.options.batch_size,
        statistics=calibration.statistics,
        samples=calibration.samples,
        progress=is_interactive(),
        keep=folder / "sensitivities.json",
    )


def with_low_rank(plan: CompressionPlan, options: CompressOptions) -> CompressionPlan:
    """The plan, with what else was asked for."""
    return replace(plan, low_rank=low_rank_rule(options))


def _planned(job: Job, calibration: Calibration, layers: list[ExpertLayer], **said: Any) -> CompressionPlan:
    """Of these layers, by the chosen method."""
    if job.options.method in NEEDS_SAMPLES:
        said["samples"] = calibration.samples
    known = calibration.statistics
    part = {layer.name: known.layers[layer.name] for layer in layers if layer.name in known.layers}
    statistics = RoutingStatistics(layers=part, fingerprint=dict(known.fingerprint))
    return METHODS[job.options.method](layers, statistics, **said)


def plan_in_sequence(
    job: Job, model: PreTrainedModel, layers: list[ExpertLayer]
) -> tuple[CompressionPlan, RoutingStatistics, dict[str, dict[str, Any]]]:
    """Plan and change the layers one after another."""
    blocks, said = job.texts.calibration, planner_options(job.options)
    step(f"Recording {blocks.num_tokens:,} tokens, merging and going on, layer by layer")

    def plan_layers(part: list[ExpertLayer], known: RoutingStatistics, samples: Any) -> CompressionPlan:
        given = {"samples": samples} if job.options.method in NEEDS_SAMPLES else {}
        plan = METHODS[job.options.method](part, known, **said, **given)
        return with_low_rank(plan, job.options)

    return compress_in_sequence(
        model,
        layers,
        blocks,
        plan_layers,
        batch_size=job.options.batch_size,
        sample_inputs=needs_samples(job),
        progress=is_interactive(),
        processes=job.processes,
    )
