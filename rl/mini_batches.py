"""How the completions of a step are cut into mini-batches and micro-batches."""

# B completions

from .batch import PolicyBatch

Rows = list[int]
"""Of a micro-batch: places in the batch. The first of them names it, as long as the batch lives."""


def mini_batches(batch: PolicyBatch, num_mini_batches: int, micro_batch_size: int) -> list[list[Rows]]:
    """Rows of each micro-batch of each mini-batch.

    A mini-batch has whole groups, and its part of the rehearsal; its micro-batches are of similar length.

    Args:
        batch: Of this process.
        num_mini_batches: Optimizer steps in one pass.
        micro_batch_size: Most rows of a micro-batch.
    """
    group_ids = batch.group_ids.tolist()
    found: list[Rows] = [[] for _ in range(num_mini_batches)]
    for kind in (~batch.is_rehearsal, batch.is_rehearsal):
        groups = batch.group_ids[kind].unique(sorted=True).tolist()
        size = max(1, -(-len(groups) // num_mini_batches))
        place = {group: number // size for number, group in enumerate(groups)}
        for row, group in enumerate(group_ids):
            if group in place:
                found[place[group]].append(row)
    lengths = (batch.token_mask.sum(1) + batch.prompt_mask.sum(1)).tolist()
    ordered = [sorted(rows, key=lambda row: lengths[row]) for rows in found]
    return [
        [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)] for rows in ordered
    ]
