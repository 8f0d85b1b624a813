"""The self-slimming curve: quality and speed of one model at every number of active experts."""

# N examples, E experts, K active experts

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, distributed

from ..moe import set_active_experts, smoe_layers
from ..moe.dropout.load import RelativeLoad, add_choices
from ..moe.dropout.observe import RoutedTokens, observe_routers
from .console import table

CURVE_FILE = "slimming_curve.json"
PICTURE_FILE = "slimming_curve.png"
FORMAT = "moekit.slimming_curve"
REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One model at one number of active experts."""

    active_experts: int | None
    """K; None for the dense model."""
    ffn_work: float
    """Multiplications of its converted FFNs, in those of the dense FFNs."""
    loss: float
    """Cross-entropy on the held-out examples, nats for each label."""
    accuracy: float
    """Share of labels that are the most likely."""
    perplexity: float | None
    """exp(loss), for language models."""
    bits_per_token: float | None
    speed: float
    """Units (tokens or pictures) per second of one process, in the fastest forward."""
    load: dict[str, list[int]]
    """By layer: how many held-out tokens each expert got."""

    @property
    def relative_load(self) -> RelativeLoad | None:
        """Of the layers where it is worst; None where nothing was counted."""
        loads = [RelativeLoad.of(torch.tensor(counts)) for counts in self.load.values()]
        if not loads:
            return None
        return RelativeLoad(max(load.max_load for load in loads), min(load.min_load for load in loads))

    @property
    def dead_experts(self) -> dict[str, list[int]]:
        """By layer: experts that no held-out token reached."""
        dead = {
            name: [e for e, count in enumerate(counts) if not count] for name, counts in self.load.items()
        }
        return {name: experts for name, experts in dead.items() if experts}


@dataclass(frozen=True, kw_only=True)
class SlimmingCurve:
    """Points in the order of K."""

    task: str
    """causal-lm, classification or images."""
    unit: str
    """What speed counts."""
    points: tuple[CurvePoint, ...]
    k_trained: tuple[int, int] | None
    """Ends of the schedule."""
    dense_speed: float | None
    """Of a dense model of the same config, timed in turns with the others; None where that was not done."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the load by expert is left to run.json."""
        points = []
        for point in self.points:
            values = {
                key: value for key, value in asdict(point).items() if key != "load" and value is not None
            }
            load = point.relative_load
            if load is not None:
                dead = sum(map(len, point.dead_experts.values()))
                values |= {"max_load": load.max_load, "min_load": load.min_load, "dead_experts": dead}
            points.append(values)
        return {
            "format": FORMAT,
            "version": 1,
            "task": self.task,
            "speed_unit": f"{self.unit}/s",
            "k_trained": self.k_trained,
            "dense_speed": self.dense_speed,
            "points": points,
        }


def measure_curve(
    trainer: Any,
    experts: Sequence[int],
    batch: tuple[dict[str, Tensor], int],
    *,
    task: str,
    unit: str,
    k_trained: tuple[int, int] | None,
    expert_share: float,
    dense: Any = None,
    say: Callable[[str], None] = lambda text: None,
) -> SlimmingCurve:
    """Evaluate and time a model at each K, and leave it at ``k_trained[1]``; every process has to call it.

    Args:
        trainer: With evaluation data and `summarise` as its metrics.
        experts: The numbers of active experts; none for a dense model.
        batch: To time, and how many units it holds.
        task: Of the model.
        unit: What speed counts.
        k_trained: Ends of the schedule.
        expert_share: Width of an expert in that of the dense FFN: 1 / E for slices, 1 for copies.
        dense: A dense model to be timed beside, on the same device.
        say: Told what begins.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    choices: Sequence[int | None] = experts or (None,)
    metrics, loads = [], []
    for k in choices:
        say("Evaluating" if k is None else f"Evaluating with {k} active experts")
        _activate(model, k)
        counts = {
            name: torch.zeros(layer.num_experts, dtype=torch.int64, device=trainer.args.device)
            for name, layer in smoe_layers(model).items()
        }
        with observe_routers(model, partial(_count, counts)) if counts else nullcontext():
            metrics.append(trainer.evaluate(metric_key_prefix=_prefix(k)))
        loads.append(_of_all_processes(counts))
    say("Timing")
    speeds, dense_speed = _speeds(trainer, model, choices, batch, dense)
    if k_trained is not None:
        set_active_experts(model, k_trained[1])
    points = []
    for k, found, load, speed in zip(choices, metrics, loads, speeds, strict=True):
        loss = found[f"{_prefix(k)}_cross_entropy"]
        is_text = task == "causal-lm"
        points.append(
            CurvePoint(
                active_experts=k,
                ffn_work=1.0 if k is None else k * expert_share,
                loss=loss,
                accuracy=found[f"{_prefix(k)}_accuracy"],
                perplexity=_perplexity(loss) if is_text else None,
                bits_per_token=loss / math.log(2) if is_text else None,
                speed=speed,
                load=load,
            )
        )
    return SlimmingCurve(
        task=task, unit=unit, points=tuple(points), k_trained=k_trained, dense_speed=dense_speed
    )


def summarise(rows_N3: Any) -> dict[str, float]:
    """Cross-entropy and accuracy of what `row_metrics` found, every label counting alike."""
    loss, count, right = np.asarray(rows_N3, dtype=np.float64).sum(0).tolist()
    return {"cross_entropy": loss / max(count, 1), "accuracy": right / max(count, 1)}


def _perplexity(loss: float) -> float | None:
    """None where it is too large for JSON."""
    return math.exp(loss) if loss < 700 else None


def _activate(model: Any, k: int | None) -> None:
    if k is not None:
        set_active_experts(model, k)


def _prefix(k: int | None) -> str:
    return "eval" if k is None else f"eval_k{k}"


def _count(counts: dict[str, Tensor], routed: RoutedTokens) -> None:
    add_choices(counts[routed.layer], routed)


def _of_all_processes(counts: dict[str, Tensor]) -> dict[str, list[int]]:
    """Sums over the processes; layers that no token reached are left out."""
    if distributed.is_available() and distributed.is_initialized():
        for counts_E in counts.values():
            distributed.all_reduce(counts_E)
    return {name: counts_E.tolist() for name, counts_E in counts.items() if counts_E.any()}


@torch.no_grad()
def _speeds(
    trainer: Any, model: Any, choices: Sequence[int | None], batch: tuple[dict[str, Tensor], int], dense: Any
) -> tuple[list[float], float | None]:
    """Units per second at each K and of a dense model, of the fastest of some forwards in turns.

    The fastest, because whatever else the machine does can only slow a forward down.
    """
    inputs = {key: value.to(trainer.args.device) for key, value in batch[0].items()}
    runs = [(trainer.model_wrapped, k) for k in choices] + ([] if dense is None else [(dense, None)])
    times: list[list[float]] = [[] for _ in runs]
    trainer.model_wrapped.eval()
    for _ in range(REPEATS + 1):
        for (timed, k), found in zip(runs, times, strict=True):
            _activate(model, k)
            _wait(trainer.args.device)
            start = time.perf_counter()
            with trainer.compute_loss_context_manager():
                timed(**inputs)
            _wait(trainer.args.device)
            found.append(time.perf_counter() - start)
    speeds = [batch[1] / min(found[1:]) for found in times]
    return (speeds, None) if dense is None else (speeds[:-1], speeds[-1])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def curve_table(curve: SlimmingCurve) -> Table:
    """The table that ends the command."""
    quality = ["perplexity", "bits/token"] if curve.task == "causal-lm" else ["accuracy"]
    columns = ["active experts", "FFN work", *quality, "loss", f"{curve.unit}/s", "load max", "min", "dead"]
    rows = []
    for point in curve.points:
        measured = (
            [_figure(point.perplexity), _figure(point.bits_per_token)]
            if curve.task == "causal-lm"
            else [f"{point.accuracy:.1%}"]
        )
        load = point.relative_load
        loads = ["", "", ""] if load is None else [f"{load.max_load:.2f}", f"{load.min_load:.2f}"]
        if load is not None:
            loads.append(str(sum(map(len, point.dead_experts.values()))))
        name = "dense" if point.active_experts is None else str(point.active_experts)
        rows.append(
            [name, f"{point.ffn_work:.4g}", *measured, f"{point.loss:.4f}", f"{point.speed:,.0f}", *loads]
        )
    if curve.dense_speed is not None:
        rows.append(["dense model", "1", *[""] * (len(quality) + 1), f"{curve.dense_speed:,.0f}", "", "", ""])
    trained = (
        "" if curve.k_trained is None else f"; trained with {curve.k_trained[0]} to {curve.k_trained[1]}"
    )
    return table(f"Self-slimming curve, held-out examples{trained}", columns, rows)


def _figure(value: float | None) -> str:
    return "over 1e304" if value is None else f"{value:.4g}"


def write_curve(curve: SlimmingCurve, folder: Path) -> None:
    """Write the numbers, and for more than one point the picture."""
    text = json.dumps(curve.to_dict(), indent=1)
    (folder / CURVE_FILE).write_text(text + "\n", encoding="utf-8")
    if len(curve.points) > 1:
        draw_curve(curve, folder / PICTURE_FILE)


def draw_curve(curve: SlimmingCurve, path: Path) -> None:
    """Quality against K, and speed below it, beside the dense model's where it is known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6))
    figure.subplots_adjust(left=0.17, right=0.97, top=0.94, bottom=0.09)
    upper, lower = figure.subplots(2, 1, sharex=True)
    ks = [point.active_experts or 0 for point in curve.points]
    if curve.task == "causal-lm":
        upper.plot(ks, [point.loss for point in curve.points], "o-", color="C0")
        upper.set_ylabel("held-out loss, nats per token")
    else:
        upper.plot(ks, [point.accuracy for point in curve.points], "o-", color="C0")
        upper.set_ylabel("held-out accuracy")
    lower.plot(ks, [point.speed for point in curve.points], "o-", color="C1", label="this model")
    if curve.dense_speed is not None:
        lower.axhline(curve.dense_speed, color="0.4", linestyle="--", label="dense model")
        lower.legend()
    lower.set_ylabel(f"{curve.unit} per second")
    lower.set_ylim(0, 1.1 * max([point.speed for point in curve.points] + [curve.dense_speed or 0]))
    lower.set_xlabel("active experts")
    lower.set_xticks(ks)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if curve.k_trained is not None:
            axes.axvspan(*sorted(curve.k_trained), color="C0", alpha=0.08)
    upper.set_title("Self-slimming curve (shaded: numbers of experts met in training)", fontsize=10)
    figure.savefig(path, dpi=100)
