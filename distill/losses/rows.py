"""Which rows of a batch count: the one place that knows of shift, padding, prompts and ignored labels."""

# B batch, S sequence, N rows that count, M some of them, X vocabulary or hidden width

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class ValidRows:
    """The positions of one batch that a loss counts, and what each of them should predict."""

    positions: Int[Tensor, " N"]
    """Into the flattened batch, ``b S + s``, in rising order."""
    labels: Int[Tensor, " N"]
    """The next token of each."""
    batch_shape: tuple[int, int]
    """B and S."""

    def __len__(self) -> int:
        """N."""
        return self.positions.shape[0]

    def pack(self, states_BSX: Float[Tensor, "B S X"]) -> Float[Tensor, "N X"]:
        """Take the rows that count; gradients flow back to them, and are zero elsewhere.

        Pack the hidden states before the head rather than the logits behind it where you can: what is never
        multiplied costs nothing. Use one object for student, teacher and labels, so that they cannot slip.

        Args:
            states_BSX: Logits or hidden states, not shifted.

        Raises:
            ValueError: They are of another batch than the labels.
        """
        if tuple(states_BSX.shape[:2]) != self.batch_shape:
            raise ValueError(
                f"got states of shape {tuple(states_BSX.shape)} for labels of shape {self.batch_shape}; "
                "the first two sizes must agree, so give the model's output without shifting or cutting it"
            )
        return states_BSX.flatten(0, 1).index_select(0, self.positions.to(states_BSX.device))

    def indices(self, some: "ValidRows") -> Int[Tensor, " M"]:
        """Which of these rows some of them are."""
        return torch.searchsorted(self.positions, some.positions)

    def sum_by_example(self, values_NX: Float[Tensor, "N X"]) -> Float[Tensor, "B X"]:
        """Add up what belongs to rows of the same example."""
        num_examples, length = self.batch_shape
        total_BX = values_NX.new_zeros(num_examples, values_NX.shape[1])
        return total_BX.index_add_(0, self.positions // length, values_NX)


def valid_rows(
    labels_BS: Int[Tensor, "B S"],
    attention_mask_BS: Shaped[Tensor, "B S"] | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
) -> ValidRows:
    """Find the positions of a causal language model's batch that count.

    Position s predicts the label of s + 1. It counts if that label is not ``ignore_index`` and neither
    position is padding. So prompts (ignored labels), padding on either side and the last position do not.

    Args:
        labels_BS: The input ids themselves, not shifted, with ``ignore_index`` where nothing is to be
            learnt. Several documents in one sequence: ignore the first label of each.
        attention_mask_BS: 0 for padding; nothing is padding without it.
        ignore_index: The label that does not count.

    Returns:
        The rows; none at all is allowed, see `masked_mean`.

    Raises:
        ValueError: The mask is not of the labels' shape.
    """
    counted_BS = labels_BS != ignore_index
    if attention_mask_BS is not None:
        if attention_mask_BS.shape != labels_BS.shape:
            raise ValueError(
                f"got an attention mask of shape {tuple(attention_mask_BS.shape)} for labels of shape "
                f"{tuple(labels_BS.shape)}; give the mask of [batch, sequence] that the tokenizer returns"
            )
        real_BS = attention_mask_BS != 0
        counted_BS = counted_BS & real_BS & real_BS.roll(1, dims=1)
    counted_BS = counted_BS.roll(-1, dims=1)
    counted_BS[:, -1:] = False  # where the roll brought the first label
    positions_N = counted_BS.flatten().nonzero().squeeze(-1)
    labels_N = labels_BS.roll(-1, dims=1).flatten()[positions_N]
    num_sequences, length = labels_BS.shape
    return ValidRows(positions_N, labels_N, (num_sequences, length))


def valid_tokens(
    labels_BS: Int[Tensor, "B S"],
    attention_mask_BS: Shaped[Tensor, "B S"] | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
) -> ValidRows:
    """Find the positions of a token classifier's batch that count: those with a label that are no padding.

    Args:
        labels_BS: Of each token itself; nothing is shifted.
        attention_mask_BS: 0 for padding; nothing is padding without it.
        ignore_index: The label that does not count.
    """
    counted_BS = labels_BS != ignore_index
    if attention_mask_BS is not None:
        counted_BS = counted_BS & (attention_mask_BS != 0)
    positions_N = counted_BS.flatten().nonzero().squeeze(-1)
    num_sequences, length = labels_BS.shape
    return ValidRows(positions_N, labels_BS.flatten()[positions_N], (num_sequences, length))


def masked_mean(
    loss_N: Float[Tensor, " N"], num_items: int | Int[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Mean of the losses of the rows that count.

    A batch of which no row counts has loss 0. It is the sum of nothing and stays in the graph: ``backward``
    runs and gives gradients of zero, so that the other ranks of a distributed run are not left waiting.

    Args:
        loss_N: One loss for each packed row.
        num_items: What the sum is divided by; N by default. With gradient accumulation give the rows of all
            accumulated batches, or rows in short batches weigh more than others. 0 counts as 1.

    Raises:
        ValueError: ``num_items`` is a negative number.
    """
    if isinstance(num_items, Tensor):
        return loss_N.sum() / num_items.to(loss_N.device).clamp_min(1)
    count = loss_N.shape[0] if num_items is None else num_items
    if count < 0:
        raise ValueError(
            f"num_items={count} is not a number of rows; give 0 or more, or None for those of the loss"
        )
    return loss_N.sum() / max(count, 1)
