"""Record what each MoE layer does while the model runs; padding never counts.

The experts' forward is wrapped for the time of the recording: it is called with every choice as a token of
its own and weight 1, by whatever implementation is active, so the outputs of single experts are seen without
computing anything twice, and are then weighted and added as before.
"""

# T tokens, K active experts, S = T * K choices, E logical experts, D hidden (model) width

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .discovery import expert_layers
from .layer import ExpertLayer
from .masks import AttentionMasks, LayerMasks
from .statistics import LayerStatistics, RoutingStatistics


class _LayerRecorder:
    """Adds up one layer's statistics on the layer's own device."""

    def __init__(self, layer: ExpertLayer, masks: LayerMasks) -> None:
        self.layer = layer
        self.masks = masks
        self.sums = LayerStatistics.zeros(layer.num_experts, layer.hidden_size, layer.top_k)
        for name, tensor in self.sums.tensors.items():
            setattr(self.sums, name, tensor.to(layer.device))
        self.entropy = torch.zeros((), dtype=torch.float64, device=layer.device)

    def add_logits(self, logits_TE: Tensor) -> None:
        """Gram matrix and entropy of the router logits."""
        if not self.masks.is_running:
            return
        mask_T = self.masks.of(logits_TE.shape[0])
        with torch.no_grad(), torch.autocast(logits_TE.device.type, enabled=False):
            logits_TE = _at_least_float(logits_TE)
            logits_TE = logits_TE if mask_T is None else logits_TE[mask_T.to(logits_TE.device)]
            self.sums.logit_gram += logits_TE.T @ logits_TE
            self.entropy += torch.special.entr(logits_TE.softmax(-1)).sum()

    def add_choices(self, ids_TK: Tensor, weights_TK: Tensor, outputs_TKD: Tensor) -> None:
        """Everything that is summed over the tokens of an expert."""
        if not self.masks.is_running:
            return
        num_tokens = len(ids_TK)
        mask_T = self.masks.of(num_tokens)
        # A weight of 0 is a choice that was not served (over capacity); ids from E on have no weights.
        real_TK = (weights_TK != 0) & (ids_TK < self.layer.num_experts)
        if mask_T is not None:
            mask_T = mask_T.to(ids_TK.device)
            real_TK = real_TK & mask_T.unsqueeze(1)
            num_tokens = int(mask_T.sum())
        self.sums.num_tokens += num_tokens
        bins_TK = torch.where(real_TK, ids_TK, self.layer.num_experts)
        with torch.no_grad(), torch.autocast(ids_TK.device.type, enabled=False):
            self._add_coactivation(bins_TK)
            self._add_outputs(bins_TK.flatten(), weights_TK.flatten(), outputs_TKD.flatten(0, 1))

    def _add_coactivation(self, bins_TK: Tensor) -> None:
        num_experts = self.layer.num_experts
        chosen_TE = torch.zeros(len(bins_TK), num_experts + 1, device=bins_TK.device)
        chosen_TE = chosen_TE.scatter_(1, bins_TK, 1.0)[:, :num_experts]
        self.sums.coactivation += (chosen_TE.T @ chosen_TE).round().long()

    def _add_outputs(self, bins_S: Tensor, weights_S: Tensor, outputs_SD: Tensor) -> None:
        num_experts, sums = self.layer.num_experts, self.sums
        outputs_SD = _at_least_float(outputs_SD)
        norms_S = torch.linalg.vector_norm(outputs_SD, dim=-1).double()
        weights_S = weights_S.double()
        scalars_5S = torch.stack(
            [torch.ones_like(norms_S), weights_S, norms_S, norms_S * weights_S, norms_S.square()]
        )
        scalars_5E = scalars_5S.new_zeros(5, num_experts + 1).index_add_(1, bins_S, scalars_5S)[:, :-1]
        sums.counts += scalars_5E[0].long()
        sums.routing_weight_sums += scalars_5E[1]
        sums.output_norm_sums += scalars_5E[2]
        sums.gated_output_norm_sums += scalars_5E[3]
        sums.output_square_sums += scalars_5E[4]
        summed_ED = outputs_SD.new_zeros(num_experts + 1, outputs_SD.shape[1])
        sums.output_sums += summed_ED.index_add_(0, bins_S, outputs_SD)[:-1]
        highest_E = norms_S.new_zeros(num_experts + 1).scatter_reduce_(0, bins_S, norms_S, "amax")
        sums.max_output_norm = torch.maximum(sums.max_output_norm, highest_E[:-1])

    def finish(self) -> LayerStatistics:
        """The sums, on the CPU."""
        for name, tensor in self.sums.tensors.items():
            setattr(self.sums, name, tensor.cpu())
        self.sums.router_entropy_sum = float(self.entropy)
        return self.sums


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def record_routing(
    model: PreTrainedModel, layers: list[ExpertLayer] | None = None
) -> Iterator[RoutingStatistics]:
    """Record the routing of everything that `model` computes inside the context.

    The statistics are filled when the context ends. Positions whose ``attention_mask`` is 0 do not count
    (behind an encoder: ``decoder_attention_mask``; without it every position of the decoder counts); with a
    key-value cache only new tokens do, and repeats by gradient checkpointing do not. The model's output is
    the same up to the rounding of a different order of addition.

    Args:
        model: Any supported model, merged ones included (statistics are by logical expert).
        layers: The layers to record; all by default.

    Yields:
        Statistics by layer name. Layers that never ran (a vision tower on text) are left out.

    Raises:
        ValueError: A layer is being recorded already, or a mask does not say which positions are padding.

    *Departs from the idea of one pass* for Llama-4, whose experts see a scaled input: its "ungated" outputs
    are those of the scaled input.
    """
    layers = expert_layers(model) if layers is None else layers
    statistics = RoutingStatistics()
    masks = AttentionMasks(model)
    recorders = [_LayerRecorder(layer, masks.around(layer)) for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(masks.watch())
        for recorder in recorders:
            stack.enter_context(recorder.layer.observe_logits(recorder.add_logits))
            stack.enter_context(recorder.layer.observe_outputs(recorder.add_choices))
        yield statistics
    for recorder in recorders:
        if recorder.sums.num_tokens:
            statistics.layers[recorder.layer.name] = recorder.finish()
