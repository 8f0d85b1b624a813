"""What the initial policy can do already: found, kept, and rehearsed."""

import pytest
import torch
from moekit.rl import PolicySettings, Rehearsal, RehearsalSample, policy_batch
from moekit.rl.policy import Policy, statistics_of
from moekit.rl.rehearsal_file import read_rehearsal, rehearsal_origin, write_rehearsal

from .tiny_rl import SETTINGS, rewards_of, tiny_policy, tiny_prompts, tiny_trainer

FILE = "rehearsal.safetensors"


def solved(*numbers):
    """Prompts with these numbers are always right."""
    texts = {tiny_prompts()[number].given for number in numbers}
    return rewards_of(lambda prompts, **_: [float(prompt in texts) for prompt in prompts])


def build(folder, rewards, **given):
    trainer = tiny_trainer(folder, "dph-rl", rewards=rewards, **given)
    return trainer, trainer._rehearsal()


def test_prompts_are_split_by_what_the_policy_can_do(tmp_path):
    trainer, found = build(tmp_path, solved(1, 5, 8))
    assert [sample.prompt for sample in found.samples] == [1, 5, 8]
    assert found.explored == (0, 2, 3, 4, 6, 7, 9, 10, 11)
    assert trainer.rollouts.collector.failures == {}


def test_places_count_not_the_numbers_of_rows(tmp_path):
    _, found = build(tmp_path, solved(8), prompts=tiny_prompts()[6:])
    assert [sample.prompt for sample in found.samples] == [2]
    assert found.explored == (0, 1, 3, 4, 5)


@pytest.mark.parametrize(("threshold", "is_rehearsed"), [(1.0, False), (0.75, True), (0.5, True)])
def test_the_threshold_is_a_share_of_right_ones(tmp_path, threshold, is_rehearsed):
    chosen, seen = tiny_prompts()[3].given, {}

    def three_of_four(prompts, **_):
        found = []
        for prompt in prompts:
            number = seen[prompt] = seen.get(prompt, -1) + 1
            found.append(float(prompt == chosen and number != 0))
        return found

    settings = {"rehearsal_generations": 4, "rehearsal_threshold": threshold}
    _, found = build(tmp_path, rewards_of(three_of_four), **settings)
    assert [sample.prompt for sample in found.samples] == [3] * is_rehearsed


def test_the_kept_sample_must_be_right_too(tmp_path):
    calls = []

    def first_only(prompts, **_):
        calls.append(len(prompts))
        return [float(len(calls) == 1) for _ in prompts]

    _, found = build(tmp_path, rewards_of(first_only))
    assert calls == [12 * 2, 12]
    assert found.samples == ()
    assert len(found.explored) == 12


def test_a_policy_that_solves_everything_has_nothing_to_explore(tmp_path):
    with pytest.raises(ValueError, match="solves all 12 prompts already"):
        build(tmp_path, solved(*range(12)))
    assert not (tmp_path / FILE).exists()


def test_log_probs_are_those_of_the_initial_policy(tmp_path):
    trainer, found = build(tmp_path, solved(1, 5, 8))
    groups = [sample.group(trainer.rollouts.prompts) for sample in found.samples]
    batch = policy_batch(groups, pad_id=1)
    said = statistics_of(Policy(tiny_policy()), batch, temperature=1.0).logprobs
    for row, sample in zip(said, found.samples, strict=True):
        torch.testing.assert_close(row[: len(sample.logprobs)], sample.logprobs)
    assert (batch.ref_logprobs[batch.token_mask] < 0).all()
    assert batch.is_rehearsal.all()


def test_a_step_explores_and_rehearses(tmp_path):
    rewards, settings = solved(1, 5, 8), {"rehearsal_share": 0.25, "mini_batches": 2}
    trainer = tiny_trainer(tmp_path, "dph-rl", rewards=rewards, steps=1, **settings)
    trainer.rollouts.rehearsal = rehearsal = trainer._rehearsal()
    rollouts = trainer.rollouts.sample(trainer.state)
    assert all(group.prompt.index in rehearsal.explored for group in rollouts.groups)
    batch = trainer.rollouts.batch(rollouts, trainer.state)
    assert int(batch.is_rehearsal.sum()) == trainer.state.rehearsed == 4
    assert len(set(batch.group_ids.tolist())) == 4 + 4, "a group of its own for each"


def test_draws_are_a_stream_of_shuffled_epochs():
    samples = tuple(RehearsalSample(prompt=n, completion_ids=(3,), logprobs=torch.zeros(1)) for n in range(3))
    rehearsal = Rehearsal(explored=(3,), samples=samples)
    numbers = [sample.prompt for sample in rehearsal.draw(0, 9, seed=0)]
    assert [sorted(numbers[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert [sample.prompt for sample in rehearsal.draw(4, 5, seed=0)] == numbers[4:]


def test_the_file_gives_back_what_was_written(tmp_path):
    rehearsal = Rehearsal(
        explored=(0, 2),
        samples=(
            RehearsalSample(prompt=1, completion_ids=(3, 4), logprobs=torch.tensor([-0.1, -1e-30])),
            RehearsalSample(prompt=3, completion_ids=(5,), logprobs=torch.tensor([-7.0])),
        ),
    )
    for given in (rehearsal, Rehearsal(explored=(0,), samples=())):
        write_rehearsal(tmp_path / FILE, given, "origin")
        found = read_rehearsal(tmp_path / FILE, "origin")
        assert found.explored == given.explored
        for sample, expected in zip(found.samples, given.samples, strict=True):
            assert (sample.prompt, sample.completion_ids) == (expected.prompt, expected.completion_ids)
            assert sample.logprobs.equal(expected.logprobs)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert read_rehearsal(tmp_path / "none", "origin") is None


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"noise" * 99])
def test_a_damaged_file_is_refused(tmp_path, damage):
    build(tmp_path, solved(1))
    path = tmp_path / FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged; remove it"):
        build(tmp_path, solved(1))


def test_a_file_of_other_prompts_or_settings_is_refused(tmp_path):
    build(tmp_path, solved(1))
    for given in (
        {"prompts": tiny_prompts(6)},
        {"rehearsal_threshold": 1.0},
        {"seed": 1},
        {"temperature": 0.5},
    ):
        with pytest.raises(ValueError, match="made from other prompts or settings"):
            build(tmp_path, solved(1), **given)
    # How long it trains is no part of it.
    assert build(tmp_path, solved(2), steps=9)[1].samples[0].prompt == 1
    prompts = tiny_prompts()
    assert rehearsal_origin(prompts, PolicySettings(**SETTINGS)) != rehearsal_origin(
        prompts[::-1], PolicySettings(**SETTINGS)
    )


def test_a_file_that_is_gone_cannot_be_made_again(tmp_path):
    tiny_trainer(tmp_path, "dph-rl", rewards=solved(1), steps=1).train()
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match="is gone, and the policy is no longer what it was"):
        tiny_trainer(tmp_path, "dph-rl", rewards=solved(1), steps=2).train()
