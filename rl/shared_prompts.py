"""Reading a prompt once for all its completions in an update, as sampling does.

The completions of a prompt stand side by side behind it in one row; a mask lets each see the prompt and
itself, and positions begin anew behind the prompt. Outputs and gradients are those of rows of their own, up
to rounding.
"""

# B completions, P prompt positions, L completion positions, U distinct prompts, G most completions of one,
# S = P + G L columns, N tokens, D hidden width

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..moe.evaluating import evaluating
from ..moe.language_head import COARSE, RELATIVE_ERROR, hidden_states

MOST_TOKENS = 0.8
"""Of the tokens in rows of their own; with more, sharing is not worth its wider attention."""
MOST_ATTENTION = 1.5
"""Of the pairs of positions in rows of their own."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """A batch as the model reads it.

    Attributes:
        input_ids: Prompts, then completions.
        weights: Completions that a token stands for; 0 for padding.
        attention_mask: ``[U, S]``, or which position sees which, ``[U, 1, S, S]``.
        position_ids: None where the model makes them.
        rows: Row of each completion.
        starts: Column of its first token.
        num_prompt: P.
    """

    input_ids: Int[Tensor, "U S"]
    weights: Int[Tensor, "U S"]
    attention_mask: Tensor
    position_ids: Int[Tensor, "U S"] | None
    rows: Int[Tensor, " B"]
    starts: Int[Tensor, " B"]
    num_prompt: int

    def inputs(self) -> dict[str, Tensor]:
        """For the model's forward."""
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return found if self.position_ids is None else found | {"position_ids": self.position_ids}

    def before(
        self, hidden_USD: Float[Tensor, "U S D"], rows_N: Int[Tensor, " N"], columns_N: Int[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """What the head reads to predict tokens of completions.

        Args:
            hidden_USD: Of this arrangement.
            rows_N: Completion of each token.
            columns_N: Its place in the completion.
        """
        inside_N = self.starts[rows_N] + columns_N - 1
        columns = torch.where(columns_N == 0, self.num_prompt - 1, inside_N)
        return hidden_USD[self.rows[rows_N], columns]


def plain_arrangement(ids_BS: Tensor, mask_BS: Tensor, num_completion: int) -> Arrangement:
    """A row for each completion."""
    num_rows, length = ids_BS.shape
    weights_BS = (mask_BS != 0).long()
    num_prompt = length - num_completion
    rows_B = torch.arange(num_rows, device=ids_BS.device)
    return Arrangement(
        input_ids=ids_BS,
        weights=weights_BS,
        attention_mask=weights_BS,
        position_ids=(weights_BS.cumsum(1) - 1).clamp_min(0),
        rows=rows_B,
        starts=torch.full_like(rows_B, num_prompt),
        num_prompt=num_prompt,
    )


def shared_arrangement(
    ids_BS: Int[Tensor, "B S"], mask_BS: Shaped[Tensor, "B S"], num_completion: int
) -> Arrangement | None:
    """A row for each prompt, or None where that would not save work.

    Args:
        ids_BS: Left-padded prompts before right-padded completions.
        mask_BS: 0 for padding.
        num_completion: L.
    """
    num_rows, length = ids_BS.shape
    num_prompt = length - num_completion
    prompts_BX = torch.cat([ids_BS[:, :num_prompt], mask_BS[:, :num_prompt].long()], 1)
    prompts_UX, rows_B, counts_U = prompts_BX.unique(dim=0, return_inverse=True, return_counts=True)
    most = int(counts_U.max())
    width = num_prompt + most * num_completion
    if (
        len(counts_U) * width > MOST_TOKENS * num_rows * length
        or len(counts_U) * width**2 > MOST_ATTENTION * num_rows * length**2
    ):
        return None
    # Place among the completions of its prompt.
    order_B = rows_B.argsort(stable=True)
    first_U = counts_U.cumsum(0) - counts_U
    slots_B = torch.empty_like(rows_B)
    slots_B[order_B] = torch.arange(num_rows, device=ids_BS.device) - first_U[rows_B[order_B]]

    def spread(prompts_UP: Tensor, completions_BL: Tensor) -> Tensor:
        slots_UGL = completions_BL.new_zeros(len(counts_U), most, num_completion)
        slots_UGL[rows_B, slots_B] = completions_BL
        return torch.cat([prompts_UP, slots_UGL.flatten(1)], 1)

    prompt_mask_UP = prompts_UX[:, num_prompt:]
    mask_BL = mask_BS[:, num_prompt:].long()
    is_token_US = spread(prompt_mask_UP, mask_BL) != 0
    lengths_B1 = prompt_mask_UP.sum(1)[rows_B, None]
    positions_BL = lengths_B1 + torch.arange(num_completion, device=ids_BS.device)
    return Arrangement(
        input_ids=spread(prompts_UX[:, :num_prompt], ids_BS[:, num_prompt:]),
        weights=spread(prompt_mask_UP * counts_U[:, None], mask_BL),
        attention_mask=_visible(is_token_US, num_prompt, num_completion),
        position_ids=spread((prompt_mask_UP.cumsum(1) - 1).clamp_min(0), positions_BL),
        rows=rows_B,
        starts=num_prompt + slots_B * num_completion,
        num_prompt=num_prompt,
    )


def _visible(is_token_US: Tensor, num_prompt: int, num_completion: int) -> Tensor:
    """``[U, 1, S, S]``: of the columns before it, a position sees the prompt and its own completion."""
    columns_S = torch.arange(is_token_US.shape[1], device=is_token_US.device)
    slots_S = torch.where(columns_S < num_prompt, -1, (columns_S - num_prompt) // num_completion)
    sees_SS = (columns_S[:, None] >= columns_S) & ((slots_S == -1) | (slots_S[:, None] == slots_S))
    visible_USS = sees_SS & is_token_US[:, None, :]
    # A row of nothing would be NaN; padding may see itself, nobody looks at it.
    visible_USS |= torch.eye(len(columns_S), dtype=torch.bool, device=is_token_US.device)
    return visible_USS[:, None]


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel, head: nn.Module) -> bool:
    """Whether a model reads such rows as it reads plain ones; found by trying.

    Recurrent and sliding layers do not, nor models that make masks of their own.

    Args:
        model: A causal language model with whole weights.
        head: Its output embeddings.
    """
    config = model.config.get_text_config()
    is_full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    if config._attn_implementation != "sdpa" or not is_full:
        return False
    vocab_size = config.vocab_size
    # Two prompts and three completions of each; a prompt and a completion are padded.
    ids_BS = torch.arange(6 * 24, device=model.device).view(6, 24) * 7 % vocab_size
    ids_BS[:3, :18], ids_BS[3:, :18] = ids_BS[0, :18].clone(), ids_BS[3, :18].clone()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[3:, :5] = 0
    mask_BS[1, -3:] = 0
    shared = shared_arrangement(ids_BS, mask_BS, 6)
    assert shared is not None
    rows_N, columns_N = mask_BS[:, 18:].nonzero(as_tuple=True)
    said: list[Any] = []
    try:
        with evaluating(model):
            for arrangement in (plain_arrangement(ids_BS, mask_BS, 6), shared):
                hidden_USD = hidden_states(model, head, {**arrangement.inputs(), "use_cache": False})
                said.append(arrangement.before(hidden_USD, rows_N, columns_N).double())
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError):
        return False  # another kind of mask, or no positions
    plain_ND, shared_ND = said
    tolerance = RELATIVE_ERROR.get(model.dtype, COARSE)
    return bool((plain_ND - shared_ND).norm() <= tolerance * plain_ND.norm())
