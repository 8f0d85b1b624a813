"""A run that is killed, wherever, and goes on ends bit for bit where it would have ended."""

import json
import shutil
from pathlib import Path

import pytest
from moekit.rl import NamedReward, RewardSet

from .tiny_rl import (
    LIKED,
    KilledError,
    assert_same,
    killed,
    liked,
    optimizer_state,
    rewards_of,
    tiny_prompts,
    tiny_trainer,
    untimed,
    weights,
)


def begins_well(completion_ids, **_):
    """All or nothing, so that groups may be of equal rewards."""
    return [float(ids[0] in LIKED) for ids in completion_ids]


CASES = {
    "grpo": {"mini_batches": 2, "num_iterations": 2},
    "kl-cov": {"mini_batches": 2, "beta": 0.1},
    "epo": {"num_iterations": 2, "router_replay": True},
    "gtpo": {},
    "dph-rl": {},
    "dapo": {"num_generations": 2, "rewards": rewards_of(begins_well)},
}
STEPS = {"steps": 4, "save_steps": 2, "lr_scheduler": "linear", "warmup": 2.0}


class KillingRewards(RewardSet):
    """Kills the run at a call."""

    def __init__(self, base: RewardSet, calls: int) -> None:
        super().__init__([NamedReward(name="liked", function=base.functions[0].function)])
        self.calls = calls

    def score(self, *args, **kwargs):
        self.calls -= 1
        if self.calls < 0:
            raise KilledError
        return super().score(*args, **kwargs)


def end_run(folder: Path, name: str, **more):
    trainer = tiny_trainer(folder, name, **STEPS, **CASES[name], **more)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing interrupts."""
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = end_run(tmp_path_factory.mktemp(name), name, eval_prompts=tiny_prompts(2))
        return runs[name]

    return run


def begin(folder: Path, name: str, **more):
    return tiny_trainer(folder, name, eval_prompts=tiny_prompts(2), **{**STEPS, **CASES[name], **more})


def assert_as_uninterrupted(found, expected):
    assert found.state == expected.state
    assert_same(weights(found), weights(expected))
    assert_same(optimizer_state(found), optimizer_state(expected))
    assert untimed(found.history.read()) == untimed(expected.history.read())
    assert found.completions.path.read_bytes() == expected.completions.path.read_bytes()
    assert [path.name for path in found.folder.glob("step-*")] == ["step-4"]
    states = [
        json.loads((run.folder / "step-4" / "policy_state.json").read_text()) for run in (found, expected)
    ]
    assert states[0] == states[1]


def count_down(function, calls, *, after=False):
    """The function, until it has been called so often; then it kills, perhaps after its work."""
    left = [calls]

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0 and not after:
            raise KilledError
        found = function(*args, **kwargs)
        if left[0] < 0:
            raise KilledError
        return found

    return call


def kill_in_update(trainer, number):
    optimizer = trainer.learner.updater.optimizer
    optimizer.step = count_down(optimizer.step, number)


def kill_in_save(trainer, number):
    """Half of it is written."""

    def save_state(folder):
        try:
            save(folder)
        except KilledError:
            (Path(folder) / "optimizer.bin").write_bytes(b"half")
            raise

    save = count_down(trainer.accelerator.save_state, number, after=True)
    trainer.accelerator.save_state = save_state


def kill_after_save(trainer, number):
    trainer.save = count_down(trainer.save, number, after=True)


def kill_before_save(trainer, number):
    """The row of the step is there already."""
    trainer.save = count_down(trainer.save, number)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("updates", [1, 3])
def test_killed_in_an_update(tmp_path, whole, name, updates):
    trainer = begin(tmp_path, name)
    per_step = trainer.settings.updates_per_rollout
    kill_in_update(trainer, updates * per_step - 1)
    with killed():
        trainer.train()
    resumed = begin(tmp_path, name)
    resumed.train()
    assert_as_uninterrupted(resumed, whole(name))


@pytest.mark.parametrize("kill", [kill_in_save, kill_after_save, kill_before_save])
@pytest.mark.parametrize("number", [0, 1])
def test_killed_while_saving(tmp_path, whole, kill, number):
    trainer = begin(tmp_path, "grpo")
    kill(trainer, number)
    with killed():
        trainer.train()
    resumed = begin(tmp_path, "grpo")
    resumed.train()
    assert_as_uninterrupted(resumed, whole("grpo"))


@pytest.mark.parametrize("name", ["grpo", "dph-rl", pytest.param("dapo", marks=pytest.mark.slow)])
def test_killed_again_and_again_while_rewarding(tmp_path, whole, name):
    base, kills = CASES[name].get("rewards", rewards_of(liked)), 0
    most_calls = {"grpo": 2, "dph-rl": 3, "dapo": 8}[name]
    while True:
        trainer = begin(tmp_path, name, rewards=KillingRewards(base, most_calls), save_steps=1)
        try:
            trainer.train()
        except KilledError:
            kills += 1
            assert kills < 10
            continue
        break
    assert kills > 0
    assert_as_uninterrupted(trainer, whole(name))


def test_the_same_trainer_goes_on_after_a_kill(tmp_path, whole):
    trainer = begin(tmp_path, "kl-cov")
    step = trainer.learner.updater.optimizer.step
    kill_in_update(trainer, 5)
    with killed():
        trainer.train()
    trainer.learner.updater.optimizer.step = step
    trainer.train()
    assert_as_uninterrupted(trainer, whole("kl-cov"))


def test_the_first_evaluation_is_not_repeated(tmp_path):
    trainer = begin(tmp_path, "grpo")
    kill_after_save(trainer, 0)
    with killed():
        trainer.train()
    resumed = begin(tmp_path, "grpo")
    steps = []
    resumed.log.on_row = lambda row: steps.append((row["step"], "eval_pass@1" in row))
    resumed.train()
    assert steps == [(3, False), (4, True)]


def test_a_finished_run_has_nothing_to_do(tmp_path, whole):
    finished = whole("grpo")
    shutil.copytree(finished.folder, tmp_path / "run")
    again = begin(tmp_path / "run", "grpo", rewards=KillingRewards(rewards_of(), calls=0))
    again.train()
    assert_as_uninterrupted(again, finished)
