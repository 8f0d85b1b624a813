"""Completions as tensors."""

from dataclasses import fields

import pytest
import torch
from moekit.rl import Prompt, Rollout, RolloutGroup, policy_batch
from moekit.rl.batch import PolicyBatch

NAN = float("nan")


def group(prompt_ids, rollouts, rewards, **by_function):
    prompt = Prompt(index=0, text="p", ids=tuple(prompt_ids), given="p")
    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(rollouts),
        rewards=torch.tensor(rewards),
        rewards_by_function={name: torch.tensor(values) for name, values in by_function.items()},
    )


def rollout(*ids, **more):
    return Rollout(completion_ids=ids, text="", **{"is_truncated": False, **more})


def two_groups():
    first = group(
        [1, 2, 3],
        [
            rollout(4, 5, 6, sampling_logprobs=torch.tensor([-1.0, -2.0, -3.0]), policy_version=2),
            rollout(7, num_forced=1, budget=16, is_truncated=True, agent=1, turn_index=3),
        ],
        [1.0, NAN],
        length=[0.5, 0.25],
    )
    second = group(
        [9],
        [
            rollout(4, 4, 8, 8, num_forced=2, trains_forced=True, source="demonstration"),
            rollout(5, 6, source="rehearsal", ref_logprobs=torch.tensor([-0.5, -0.25])),
        ],
        [0.0, 2.0],
        answer=[0.0, 2.0],
    )
    return [first, second]


def test_layout():
    batch = policy_batch(two_groups(), pad_id=99)
    assert len(batch) == 4
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [1, 2, 3], [99, 99, 9], [99, 99, 9]]
    assert batch.prompt_mask.sum(1).tolist() == [3, 3, 1, 1]
    assert batch.completion_ids.tolist() == [[4, 5, 6, 99], [7, 99, 99, 99], [4, 4, 8, 8], [5, 6, 99, 99]]
    assert batch.lengths.tolist() == [3, 1, 4, 2]
    assert batch.loss_mask.sum(1).tolist() == [3, 0, 4, 2]
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    assert batch.budgets.tolist() == [-1, 16, -1, -1]
    assert batch.policy_versions.tolist() == [2, 0, 0, 0]
    assert batch.turn_indices.tolist() == [0, 3, 0, 0]
    assert batch.agents.tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(batch.rewards, torch.tensor([1.0, NAN, 0.0, 2.0]), equal_nan=True)


def test_masks_by_who_wrote_it():
    batch = policy_batch(two_groups(), pad_id=0)
    assert batch.external_mask.sum(1).tolist() == [0, 0, 4, 0]
    assert batch.rehearsal_mask.sum(1).tolist() == [0, 0, 0, 2]
    assert batch.policy_mask.sum(1).tolist() == [3, 0, 4, 0]


def test_logprobs_are_0_where_nobody_gave_them():
    batch = policy_batch(two_groups(), pad_id=0)
    assert batch.sampling_logprobs.tolist() == [[-1.0, -2.0, -3.0, 0.0], *[[0.0] * 4] * 3]
    assert batch.ref_logprobs.tolist() == [*[[0.0] * 4] * 3, [-0.5, -0.25, 0.0, 0.0]]
    bare = policy_batch([group([1], [rollout(1), rollout(2)], [0.0, 1.0])], pad_id=0)
    assert bare.sampling_logprobs is None
    assert bare.ref_logprobs is None


def test_reward_functions_that_a_group_never_saw_are_unknown_there():
    found = policy_batch(two_groups(), pad_id=0).rewards_by_function
    torch.testing.assert_close(found["length"], torch.tensor([0.5, 0.25, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(found["answer"], torch.tensor([NAN, NAN, 0.0, 2.0]), equal_nan=True)


def test_truncated_completions_can_be_left_out():
    groups = [group([1], [rollout(1, 2, is_truncated=True), rollout(3)], [0.0, 1.0])]
    assert policy_batch(groups, pad_id=0).loss_mask.sum(1).tolist() == [2, 1]
    masked = policy_batch(groups, pad_id=0, masks_truncated=True)
    assert masked.loss_mask.sum(1).tolist() == [0, 1]
    assert masked.lengths.tolist() == [2, 1]


def test_groups_can_be_numbered():
    assert policy_batch(two_groups(), pad_id=0, group_ids=[8, 5]).group_ids.tolist() == [8, 8, 5, 5]


def test_no_completion_is_refused():
    with pytest.raises(ValueError, match="no completions"):
        policy_batch([], pad_id=0)
    with pytest.raises(ValueError, match="no token"):
        rollout()
    with pytest.raises(ValueError, match="2 completions have 1 rewards"):
        group([1], [rollout(1), rollout(2)], [0.0])


def test_selected_rows_lose_the_padding_that_they_do_not_need():
    batch = policy_batch(two_groups(), pad_id=99)
    picked = batch.with_(old_logprobs=torch.arange(16.0).reshape(4, 4)).select([3, 1])
    assert picked.completion_ids.tolist() == [[5, 6], [7, 99]]
    assert picked.old_logprobs.tolist() == [[12.0, 13.0], [4.0, 5.0]]
    assert picked.prompt_ids.tolist() == [[99, 99, 9], [1, 2, 3]]
    assert picked.rewards_by_function["answer"][0] == 2.0
    alone = batch.select(torch.tensor([2]))
    assert alone.prompt_ids.tolist() == [[9]]
    assert len(batch.select([])) == 0


def test_every_tensor_is_selected_and_moved():
    batch = policy_batch(two_groups(), pad_id=0)
    shape = batch.completion_ids.shape
    optional = {f.name for f in fields(PolicyBatch) if f.default is None}
    batch = batch.with_(**{name: torch.ones(shape) for name in optional - {"selected"}})
    batch = batch.with_(selected=torch.ones(shape, dtype=torch.bool))
    for value in vars(batch.select([0])).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            assert len(tensor) == 1
    for value in vars(batch.to("meta")).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            assert tensor.device.type == "meta"


def test_what_nobody_computed_is_asked_for_by_name():
    batch = policy_batch(two_groups(), pad_id=0)
    with pytest.raises(ValueError, match="no old_logprobs"):
        batch.required("old_logprobs")
    assert torch.equal(batch.required("rewards")[2:], torch.tensor([0.0, 2.0]))


def test_groups_are_informative_where_known_rewards_differ():
    two = [rollout(1), rollout(2)]
    for rewards, is_informative in (([0.0, 1.0], True), ([1.0, 1.0], False), ([1.0, NAN], False)):
        assert group([1], two, rewards).is_informative == is_informative
