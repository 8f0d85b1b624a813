"""Training routers alone: the cheap way to heal a compressed model."""

from transformers import PreTrainedModel

from ..moe import expert_layers


def train_only_routers(model: PreTrainedModel) -> int:
    """Freeze everything but the routers of a model's expert layers.

    After experts were pruned, merged or edited the routers no longer know what is behind them. Distilled from
    the original model (``kl``, no labels) a very small share of the weights learns it.

    Args:
        model: With experts.

    Returns:
        How many numbers are trained.

    Raises:
        UnsupportedModelError: The model has no experts.

    Reference: Router KD, arXiv:2603.02217.
    """
    model.requires_grad_(False)
    for layer in expert_layers(model):
        layer.router.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
