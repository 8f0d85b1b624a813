"""What compression lost: the compressed model against the original on held-out text.

Dimensions: N blocks, B blocks of a batch, S positions, T tokens that are predicted, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..moe.data import TokenBlocks
from ..moe.evaluating import evaluating

# Float32 log-probabilities of one model that exist at the same time: 64 MB, some five times over.
CHUNK_ELEMENTS = 2**24
RESAMPLE_CHUNK = 100
# A ruined model may lose hundreds of nats per token; its perplexity must still be a number for JSON.
MAX_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured mean and its 95% confidence interval; the bounds are None where there is only one block."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class DomainFidelity:
    """What was lost on one domain; every mean is over predicted tokens."""

    domain: str
    num_blocks: int
    num_tokens: int
    """Predicted tokens; padding and the first token of a block are not among them."""
    perplexity_original: Estimate
    perplexity_compressed: Estimate
    perplexity_ratio: Estimate
    """Compressed over original, resampled in pairs: much sharper than the two perplexities apart."""
    kl: Estimate
    """KL(original || compressed), nats per token."""
    top1_agreement: Estimate
    """Share of tokens at which both models' most likely next token is the same, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """The comparison over all held-out blocks and by domain."""

    overall: DomainFidelity
    domains: tuple[DomainFidelity, ...]
    seq_len: int
    data_fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, ready for JSON."""
        return asdict(self) | {"domains": [asdict(domain) for domain in self.domains]}


def confidence_interval(
    values: Shaped[np.ndarray, " N"],
    weights: Shaped[np.ndarray, " N"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Weighted mean with a percentile bootstrap interval over the N values.

    Resampled is the unit that was sampled: blocks of text, or questions, never single tokens, whose errors
    within one text are not independent. With few blocks (under about 20) the interval is too narrow.

    Args:
        values: One mean per unit; true and false count as 1 and 0.
        weights: Of each unit, for example its tokens; at least 0, and not all 0.
        resamples: Bootstrap samples.
        confidence: Probability mass of the interval, in (0, 1).
        seed: Of the resampling.

    Raises:
        ValueError: No values, lengths that differ, or weights that are negative or sum to 0.
    """
    values, weights = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.shape != weights.shape or len(values) == 0:
        raise ValueError(
            f"values {values.shape} and weights {weights.shape} must be two non-empty, equally long lists"
        )
    if (weights < 0).any() or weights.sum() <= 0:
        raise ValueError("weights must be at least 0 and must not all be 0")
    used = weights > 0
    values, weights = values[used], weights[used]
    mean = float(values @ weights / weights.sum())
    if len(values) == 1:
        return Estimate(mean, None, None)
    rng = np.random.default_rng(seed)
    uniform = np.full(len(values), 1 / len(values))
    means = []
    for start in range(0, resamples, RESAMPLE_CHUNK):
        times_drawn = rng.multinomial(len(values), uniform, size=min(RESAMPLE_CHUNK, resamples - start))
        means.append(times_drawn @ (values * weights) / (times_drawn @ weights))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(mean, float(low), float(high))


def compare_models(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    blocks: TokenBlocks,
    batch_size: int = 8,
    *,
    progress: bool = False,
) -> FidelityReport:
    """Measure both models on the same held-out blocks.

    Every token but the first of a block is predicted from those before it. An encoder-decoder model reads
    the first half of a block and predicts the second. Padding never counts, and the result does not depend
    on `batch_size`. Full-vocabulary logits exist for one batch at a time only; log-probabilities are
    float32.

    Args:
        original: The reference model.
        compressed: The model to judge; same vocabulary.
        blocks: Held-out text, none of which was used for calibration.
        batch_size: Blocks per forward pass.
        progress: Show a progress bar.

    Raises:
        ValueError: No blocks, ids or vocabularies that do not fit, or logits that are not numbers.
    """
    if len(blocks) == 0:
        raise ValueError("there are no held-out blocks to compare the models on")
    _check_vocabulary(original, compressed, blocks)
    batches = blocks.batches(batch_size)
    num_batches = -(-len(blocks) // batch_size)
    sums = FidelitySums(original, compressed)
    with evaluating(original), evaluating(compressed):
        for batch in tqdm(batches, "Comparing models", total=num_batches, disable=not progress, unit="batch"):
            logits_BSV, targets_BS, counts_BS = _predictions(original, batch)
            other_BSV, _, _ = _predictions(compressed, batch)
            sums.add(logits_BSV, other_BSV, targets_BS, counts_BS)
            # Else two batches' logits would be alive during the next forward pass.
            del logits_BSV, other_BSV
    return sums.report(blocks)


class FidelitySums:
    """Sums over the blocks of a comparison, batch by batch in their order.

    Args:
        original: The reference, whose logits they are of.
        compressed: The other; both are named in errors.
    """

    def __init__(self, original: PreTrainedModel, compressed: PreTrainedModel) -> None:
        self.models = original, compressed
        self.sums: list[Tensor] = []

    def add(
        self,
        logits_BSV: Float[Tensor, "B S V"],
        other_BSV: Float[Tensor, "B S V"],
        targets_BS: Int[Tensor, "B S"],
        counts_BS: Bool[Tensor, "B S"],
    ) -> None:
        """Add a batch.

        Args:
            logits_BSV: Of the original.
            other_BSV: Of the compressed model.
            targets_BS: The tokens that they predict.
            counts_BS: Which of those count.

        Raises:
            ValueError: Logits that are not numbers.
        """
        self.sums.append(_batch_sums(logits_BSV, other_BSV, targets_BS, counts_BS))
        _check_finite(self.sums[-1], *self.models)

    def report(self, blocks: TokenBlocks) -> FidelityReport:
        """The comparison over all blocks, of which all batches were added.

        Raises:
            ValueError: The blocks are too short to predict a token in.
        """
        return _report(torch.cat(self.sums).numpy(), blocks)


def _check_vocabulary(original: PreTrainedModel, compressed: PreTrainedModel, blocks: TokenBlocks) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (original, compressed)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the original model's vocabulary has {sizes[0]} entries and the compressed one's {sizes[1]}; "
            "only models with the same vocabulary can be compared"
        )
    highest = int(blocks.input_ids.max())
    if highest >= sizes[0]:
        raise ValueError(
            f"the data holds token id {highest} but the models' vocabulary has {sizes[0]} entries: the "
            "blocks were made with another model's tokenizer"
        )


def forward_arguments(
    model: PreTrainedModel, batch: dict[str, Tensor]
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Keyword arguments of one forward pass, and the targets and mask that its logits line up with."""
    ids_BS, mask_BS = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    if not model.config.is_encoder_decoder:
        arguments = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False}
        return arguments, ids_BS[:, 1:], (mask_BS[:, 1:] * mask_BS[:, :-1]).bool()
    half = ids_BS.shape[1] // 2
    first = model.config.decoder_start_token_id
    targets_BS = ids_BS[:, half:]
    decoder_ids_BS = torch.cat([torch.full_like(targets_BS[:, :1], first), targets_BS[:, :-1]], dim=1)
    arguments = {
        "input_ids": ids_BS[:, :half],
        "attention_mask": mask_BS[:, :half],
        "decoder_input_ids": decoder_ids_BS,
        "use_cache": False,
    }
    return arguments, targets_BS, mask_BS[:, half:].bool()


def _predictions(
    model: PreTrainedModel, batch: dict[str, Tensor]
) -> tuple[Float[Tensor, "B S V"], Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Logits, the tokens that they predict, and which of those count."""
    arguments, targets_BS, counts_BS = forward_arguments(model, batch)
    logits_BSV = model(**arguments).logits[:, : targets_BS.shape[1]]
    return logits_BSV, targets_BS, counts_BS


def _batch_sums(
    logits_BSV: Float[Tensor, "B S V"],
    other_BSV: Float[Tensor, "B S V"],
    targets_BS: Int[Tensor, "B S"],
    counts_BS: Bool[Tensor, "B S"],
) -> Float[Tensor, "B 5"]:
    """Per block, on the CPU, sums over tokens: 1, both negative log-likelihoods, KL, agreement."""
    num_blocks, num_positions = targets_BS.shape
    step = max(1, CHUNK_ELEMENTS // (num_blocks * logits_BSV.shape[-1]))
    sums = torch.zeros(num_blocks, 5, dtype=torch.float64)
    for start in range(0, num_positions, step):
        part = slice(start, start + step)
        counts = counts_BS[:, part]
        block_of_T = counts.nonzero()[:, 0]
        logp_TV = logits_BSV[:, part][counts].float().log_softmax(-1)
        other_logp_TV = other_BSV[:, part][counts.to(other_BSV.device)].to(logp_TV).log_softmax(-1)
        target_T1 = targets_BS[:, part][counts].unsqueeze(1)
        p_TV = logp_TV.exp()
        kl_T = torch.where(p_TV > 0, p_TV * (logp_TV - other_logp_TV), 0.0).sum(-1)
        columns = [
            torch.ones_like(kl_T),
            -logp_TV.gather(1, target_T1).squeeze(1),
            -other_logp_TV.gather(1, target_T1).squeeze(1),
            kl_T,
            (logp_TV.argmax(-1) == other_logp_TV.argmax(-1)).to(kl_T),
        ]
        sums.index_add_(0, block_of_T.cpu(), torch.stack(columns, dim=1).cpu().double())
    return sums


def _check_finite(
    sums_B5: Float[Tensor, "B 5"], original: PreTrainedModel, compressed: PreTrainedModel
) -> None:
    for role, model, column in (("original", original, 1), ("compressed", compressed, 2)):
        if not sums_B5[:, column].isfinite().all():
            raise ValueError(
                f"the {role} model '{model.name_or_path or type(model).__name__}' gives logits that are NaN "
                f"or infinite: its weights are damaged, or {model.dtype} overflows (try float32)"
            )


def _report(sums_N5: Float[np.ndarray, "N 5"], blocks: TokenBlocks) -> FidelityReport:
    if not sums_N5[:, 0].any():
        raise ValueError("the held-out blocks are too short to predict a token in; use a larger --seq-len")
    names = np.array(blocks.domains)
    parts = {name: sums_N5[names == name] for name in sorted(set(blocks.domains))}
    return FidelityReport(
        overall=_domain("all", sums_N5),
        domains=tuple(_domain(name, part_N5) for name, part_N5 in parts.items() if part_N5[:, 0].any()),
        seq_len=blocks.seq_len,
        data_fingerprint=blocks.fingerprint,
    )


def _domain(name: str, sums_N5: Float[np.ndarray, "N 5"]) -> DomainFidelity:
    tokens_N = sums_N5[:, 0]
    nll_original, nll_compressed, kl, agreement = (
        column / np.maximum(tokens_N, 1) for column in sums_N5[:, 1:].T
    )
    return DomainFidelity(
        domain=name,
        num_blocks=len(sums_N5),
        num_tokens=int(tokens_N.sum()),
        perplexity_original=_exponential(confidence_interval(nll_original, tokens_N)),
        perplexity_compressed=_exponential(confidence_interval(nll_compressed, tokens_N)),
        perplexity_ratio=_exponential(confidence_interval(nll_compressed - nll_original, tokens_N)),
        kl=confidence_interval(kl, tokens_N),
        top1_agreement=confidence_interval(agreement, tokens_N),
    )


def _exponential(estimate: Estimate) -> Estimate:
    """The estimate of exp(x); the exponential is monotone, so the bounds carry over."""

    def exp(x: float) -> float:
        return math.exp(min(x, MAX_EXPONENT))

    low, high = (None if bound is None else exp(bound) for bound in (estimate.low, estimate.high))
    return Estimate(exp(estimate.value), low, high)
