"""What cannot be distributed is refused before the training, as far as one process can show it."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from moekit.moe import KSchedule
from moekit.scripts import train_arguments
from moekit.scripts.options import TrainOptions
from moekit.scripts.train_export import check_export
from moekit.scripts.train_prepare import TrainJob

from ..scripts.tiny_training import tiny_llama

FSDP, DEEPSPEED = DistributedType.FSDP, DistributedType.DEEPSPEED


def job(form: Any) -> TrainJob:
    """One that asks for a form, and nothing else."""
    made = object.__new__(TrainJob)
    for name, value in {
        "options": TrainOptions(model="m", form=form),
        "schedule": KSchedule("linear", 1, 4, 4),
    }.items():
        object.__setattr__(made, name, value)
    return made


def trainer(kind: DistributedType, zero: dict[str, Any] | None = None) -> Any:
    plugin = None if zero is None else SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    is_divided = kind in (FSDP, DEEPSPEED)  # as Trainer's of that kind say
    return SimpleNamespace(accelerator=SimpleNamespace(state=state), is_divided=is_divided)


@pytest.mark.parametrize("form", ["stock", "dense"])
@pytest.mark.parametrize("kind", [FSDP, DEEPSPEED])
def test_forms_that_need_the_whole_model(form, kind):
    with pytest.raises(ValueError, match=f"--form {form} needs the whole model in one process"):
        check_export(job(form), trainer(kind), tiny_llama())


def test_zero_3_that_could_not_save():
    with pytest.raises(ValueError, match="zero3_save_16bit_model: true"):
        check_export(job("moekit"), trainer(DEEPSPEED, {"stage": 3}), tiny_llama())


@pytest.mark.parametrize(
    "zero", [{"stage": 2}, {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, {}]
)
def test_zero_that_can_save(zero):
    check_export(job("moekit"), trainer(DEEPSPEED, zero), tiny_llama())


@pytest.mark.parametrize(
    ("processes", "kind"), [(2, DistributedType.NO), (1, DEEPSPEED), (1, DistributedType.NO)]
)
def test_processes_that_know_nothing_of_each_other(monkeypatch, processes, kind):
    class Arguments(train_arguments.TrainingArguments):
        """With a state of its own, of processes that are not there."""

        distributed_state = SimpleNamespace(num_processes=processes, distributed_type=kind)

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"2 processes were started and {processes} work together"):
        train_arguments.check_processes(Arguments.__new__(Arguments))


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
@pytest.mark.parametrize("found", [DistributedType.NO, DistributedType.MULTI_CPU])
def test_sharding_that_is_left_out(monkeypatch, name, found):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"was asked for .* and gives {found.value}"):
        train_arguments.check_sharding(found)
