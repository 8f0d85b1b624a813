"""`moekit compress --stream`: a checkpoint larger than memory, one decoder layer at a time."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..compress.apply import apply_layer
from ..compress.methods import METHODS, NEEDS_SAMPLES
from ..compress.plan import CompressionPlan, ModelIdentity
from ..compress.plan_file import write_atomically
from ..moe.checkpoint import mark_form, update_expert_count, write_config_aliases
from ..moe.discovery import expert_layers
from ..moe.evaluating import evaluating
from ..moe.footprint import Footprint, footprint
from ..moe.layer_stream import HiddenFiles, LayerStream
from ..moe.recording import record_routing
from ..moe.samples import InputSamples, record_inputs
from ..moe.statistics import RoutingStatistics
from ..moe.statistics_file import FILE_NAME
from .calibrate import model_inputs
from .checkpoint_files import data_bytes, weight_files
from .console import is_interactive, show, step
from .load import check_finite, find_device, skeleton
from .measure import Measurements
from .planning import needs_samples, try_planner, with_low_rank
from .prediction import shape_layer
from .prepare import PLAN_FILE, Job, is_sequential, planner_options
from .quantised import dequantiser, told
from .record import STATISTICS_FOLDER
from .sequential import joined_plan
from .staging import Staging
from .stream_checks import check_memory, reserve_disk
from .stream_judge import StreamJudge

STATE = "stream.json"


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What came out."""

    plan: CompressionPlan
    statistics: RoutingStatistics
    form: str
    before: Footprint
    after: Footprint
    merging: dict[str, dict[str, Any]]
    """By layer, from `apply_layer`."""
    model_class: str
    dtype: torch.dtype
    measured: Measurements | None
    reload_difference: float


def compress_streamed(job: Job, staging: Staging) -> Streamed | None:
    """Record, plan, change and write one decoder layer after another.

    In memory are the embeddings, the head and one layer; what flows between layers lies in the work folder.
    A run that was interrupted goes on with the layer that it was at.

    Args:
        job: What to do.
        staging: Where to.

    Returns:
        What came out; None in other processes than the main one.

    Raises:
        NotStreamableError: The model's layers cannot be run one by one.
        ValueError: As the planner does.
    """
    options = job.options
    model = skeleton(job.source, None if options.dtype == "auto" else getattr(torch, options.dtype))
    stream = LayerStream(
        model,
        weight_files(job.source.folder),
        dtype=model.dtype,
        device=find_device(options.device),
        quantizer=dequantiser(job.source.config),
    )
    if dequantised := told(job.source.config, model.dtype):
        step(f"{job.source.name}{dequantised}")
        model.config.__dict__.pop("quantization_config")
    try_planner(options, expert_layers(model))
    check_memory(stream, job)
    stream.load_outside()
    check_finite(stream.state_dict(None).items(), job.source.name, stream.files)
    with evaluating(model):
        block_bytes = stream.check(model_inputs(model, next(job.texts.calibration.batches(1))))
    walk = _Walk(job, stream, staging)
    reserve_disk(staging, job, model_bytes=walk.before.total_bytes, block_bytes=block_bytes)
    step(f"Reading {job.texts.calibration.num_tokens:,} tokens, layer by layer")
    try:
        with evaluating(model), torch.no_grad():
            for index in tqdm(range(len(stream)), "layers", unit="layer", disable=not is_interactive()):
                walk.layer(index)
            return walk.finish() if job.processes.is_main else None
    except BaseException as error:
        # What is refused now would be again, and before a layer is done there is nothing to go on with.
        is_useless = isinstance(error, ValueError) or not (staging.work / STATE).is_file()
        if job.processes.is_main and is_useless:
            staging.discard()
        raise


class _Walk:
    """The state of a run: which layers are done, and what they became."""

    def __init__(self, job: Job, stream: LayerStream, staging: Staging) -> None:
        self.job, self.stream, self.staging = job, stream, staging
        self.identity = ModelIdentity.of(expert_layers(stream.model))
        self.before = footprint(stream.model, expert_layers(stream.model))
        self.parts = staging.work / "layers"
        self.parts.mkdir(parents=True, exist_ok=True)
        self.merging: dict[str, dict[str, Any]] = {}
        self.hidden = HiddenFiles(staging.work / "hidden" / job.processes.name)
        own = job.processes.share(job.texts.calibration, job.options.batch_size)
        self.inputs = [model_inputs(stream.model, batch) for batch in own.batches(job.options.batch_size)]
        self.judge = None
        if job.processes.is_main:
            folder, size = staging.work / "held out", job.options.batch_size
            compares = job.options.report
            self.judge = StreamJudge(stream, job.texts.held_out, folder, size, compares=compares)
        self.said = planner_options(job.options)
        self.plans: list[CompressionPlan] = []
        self.done = 0
        self._resume()

    def _resume(self) -> None:
        """Take up what an interrupted run has finished: plans and written layers."""
        path = self.staging.work / STATE
        if path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.done = state["done"]
            self.plans = [CompressionPlan.from_json(text) for text in state["plans"]]
            self.merging = state["merging"]
            if self.judge is not None:
                self.judge.digests = state["digests"]
            show(f"going on after decoder layer {self.done} of {len(self.stream)}")

    def _keep(self, index: int) -> None:
        path = self.staging.work / STATE
        plans = [plan.to_json() for plan in self.plans]
        digests = None if self.judge is None else self.judge.digests
        state = {"done": index + 1, "plans": plans, "merging": self.merging, "digests": digests}
        write_atomically(path, json.dumps(state))

    def layer(self, index: int) -> None:
        """Do one decoder layer, or give it the shape that it was written with."""
        layers = self.stream.expert_layers(index)
        if index < self.done:
            for layer in layers:
                self._reshape(layer)
            return
        self.stream.load(index)
        check_finite(self.stream.state_dict(index).items(), self.job.source.name, self.stream.files)
        known, samples = self._record(index, layers)
        if self.judge is not None:
            self.judge.before(index)
        for layer in layers:
            self._compress(layer, known, samples)
        if layers and is_sequential(self.job.options):
            self.stream.push(index, self.inputs, self.hidden)
        if self.judge is not None:
            self.judge.after(index)
        processes = self.job.processes
        processes.wait()  # what the next layer reads is there in all of them
        if processes.is_main:
            if layers:
                known.save(self.staging.work / f"statistics-{index}.safetensors")
            self._write(index)
            self._keep(index)
        self.stream.drop(index)
        self.hidden.forget(index)
        if self.judge is not None:
            self.judge.forget(index)

    def _record(self, index: int, layers: list[Any]) -> tuple[RoutingStatistics, InputSamples | None]:
        """What all processes see of a layer."""
        processes, options = self.job.processes, self.job.options
        samples = None
        if needs_samples(self.job):
            samples = processes.empty_samples(layers, self.job.texts.calibration, options.batch_size)
        return processes.joined(self._push(index, layers, samples), samples)

    def _push(self, index: int, layers: list[Any], samples: InputSamples | None) -> RoutingStatistics:
        """Run the calibration text through a layer, and keep what comes out for the next."""
        model = self.stream.model
        with record_routing(model, layers) as statistics, record_inputs(model, layers, samples=samples):
            self.stream.push(index, self.inputs, self.hidden)
        return statistics

    def _compress(self, layer: Any, known: RoutingStatistics, samples: InputSamples | None) -> None:
        method = self.job.options.method
        given = {"samples": samples} if method in NEEDS_SAMPLES else {}
        plan = with_low_rank(METHODS[method]([layer], known, **self.said, **given), self.job.options)
        self.merging[layer.name] = apply_layer(
            layer, plan.layers[0], plan, known=known.layers.get(layer.name), samples=samples
        )
        self.plans.append(plan)

    def _reshape(self, layer: Any) -> None:
        """A layer without weights becomes as large as it was written."""
        plan = next(plan for plan in self.plans if plan.layers[0].name == layer.name)
        shape_layer(layer, plan.layers[0], plan)

    def _write(self, index: int | None) -> None:
        """A decoder layer, or all that lies outside, under the names of the checkpoint."""
        model = self.stream.model
        if self.judge is not None:
            self.judge.note(index)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        own = {name: tensor for name, tensor in self.stream.state_dict(index).items() if name not in tied}
        tensors = revert_weight_conversion(model, own)
        kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        stem = "outside" if index is None else f"layer-{index:05d}"
        shards = split_torch_state_dict_into_shards(
            kept,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=self.job.options.max_shard_size,
        )
        for name, names in shards.filename_to_tensors.items():
            save_file({key: kept[key] for key in names}, self.parts / name, metadata={"format": "pt"})

    def finish(self) -> Streamed:
        """Write what lies outside of the layers, the index and the config."""
        model, output = self.stream.model, self.staging.output
        plan = joined_plan(self.plans, self.identity, sequential=is_sequential(self.job.options))
        if plan.form == "stock":
            update_expert_count(model, plan.layers[0].num_experts, plan.layers[0].num_kept)
        form = mark_form(model)
        self._write(None)
        write_index(self.parts, output)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = self.stream.dtype
        model.config.save_pretrained(output)
        write_config_aliases(output / "config.json")
        if model.can_generate():
            model.generation_config.save_pretrained(output)
        statistics = RoutingStatistics(fingerprint={"data": self.job.texts.calibration.fingerprint})
        for path in sorted(self.staging.work.glob("statistics-*.safetensors"), key=_number):
            statistics.layers |= RoutingStatistics.load(path).layers
        plan.save(output / PLAN_FILE)
        statistics.save(output / STATISTICS_FOLDER / FILE_NAME)
        assert self.judge is not None  # in the main process
        measured, after = self.judge.measure(), footprint(model, expert_layers(model))
        step("Reading the checkpoint back, layer by layer")
        return Streamed(
            measured=measured,
            reload_difference=self.judge.verify(output),
            plan=plan,
            statistics=statistics,
            form=form,
            before=self.before,
            after=after,
            merging=self.merging,
            model_class=type(model).__name__,
            dtype=self.stream.dtype,
        )


def write_index(parts: Path, folder: Path) -> None:
    """Put the written parts where `from_pretrained` looks for them, with their index.

    The parts stay until the run has ended, so that one that is killed here need not write them again.
    """
    files = [path for stem in ("layer", "outside") for path in sorted(parts.glob(f"{stem}*.safetensors"))]
    weight_map = {}
    for number, part in enumerate(files, 1):
        target = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        try:
            os.link(part, target)
        except OSError:  # a file system without links
            shutil.copyfile(part, target)
        with safe_open(target, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), target.name)
    index = {
        "metadata": {"total_size": sum(map(data_bytes, files))},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
