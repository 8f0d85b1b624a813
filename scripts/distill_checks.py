"""What the options of `moekit distill` alone say: the losses, the second head, and what cannot be."""

import torch

from ..distill import AuxiliaryHeadSpec, DistillationRecipe, GradientAlignment
from .distill_options import DistillOptions
from .options import flag
from .training_checks import check_not_negative, check_positive

OPTION_OF = {"center": "center", "beta": "beta", "skew": "skew", "top_k": "k"}
"""Options of single losses, by the arguments that they become."""
DEFAULT_TOP_K = 64
BOTTLENECK = ("auxiliary_width", "auxiliary_norm", "auxiliary_dropout")
SECOND_HEAD = ("auxiliary_head", *BOTTLENECK)
ALIGNMENT = ("align_at", "align_every", "align_smoothing")


def make_recipe(options: DistillOptions) -> DistillationRecipe:
    """The losses that the options ask for.

    Raises:
        ValueError: Options that do not go together.
    """
    is_dhkd = options.loss == "dhkd"
    if is_dhkd and options.heads == "single":
        raise ValueError("--loss dhkd is binary-kl-norm on a second head; for one head take binary-kl-norm")
    given = {name: getattr(options, name) for name in OPTION_OF}
    wanted = {name: value for name, value in given.items() if value not in (None, "none")}
    loss = "binary-kl-norm" if is_dhkd else options.loss
    try:
        return DistillationRecipe(
            loss=loss,
            heads="dual" if is_dhkd or options.heads == "dual" else "single",
            weight=options.weight,
            label_weight=options.label_weight,
            temperature=options.temperature,
            options={OPTION_OF[name]: value for name, value in wanted.items()},
            load_balance=options.load_balance,
        )
    except ValueError as error:
        shown = ", ".join(f"{flag(name)} {value}" for name, value in wanted.items())
        raise ValueError(
            f"--loss {options.loss}{' with ' if shown else ''}{shown} cannot be: {error}"
        ) from error


def check_options(options: DistillOptions, recipe: DistillationRecipe) -> None:
    """Refuse what the options alone show cannot be.

    Raises:
        ValueError: Names the option.
    """
    if options.teacher is None:
        raise ValueError("--teacher is missing: name the model to learn from")
    check_positive(options, ("temperature", "auxiliary_width", "align_every", "top_k", "stop_epoch"))
    check_not_negative(options, ("weight", "label_weight", "load_balance"))
    if not 0 <= options.align_smoothing < 1:
        raise ValueError(f"--align-smoothing {options.align_smoothing} is not at least 0 and less than 1")
    said = {
        name
        for name, field in type(options).__dataclass_fields__.items()
        if getattr(options, name) != field.default
    }
    if recipe.heads == "single":
        if options.align_gradients:
            raise ValueError("--align-gradients is for two heads; add --heads dual, or leave it out")
        if useless := sorted(said.intersection(SECOND_HEAD)):
            raise ValueError(f"{flag(useless[0])} is for --heads dual")
    elif options.train_only == "routers":
        raise ValueError("--train-only routers trains no second head; leave out --heads dual")
    elif options.auxiliary_head != "bottleneck" and (useless := sorted(said.intersection(BOTTLENECK))):
        raise ValueError(f"{flag(useless[0])} is for --auxiliary-head bottleneck")
    if not options.align_gradients and (useless := sorted(said.intersection(ALIGNMENT))):
        raise ValueError(f"{flag(useless[0])} is for --align-gradients")
    if options.stop_epoch is not None and options.label_weight == 0:
        raise ValueError(
            f"--label-weight 0 leaves nothing to learn from epoch {options.stop_epoch:g} on; leave out "
            "--stop-epoch"
        )
    if options.cache is None and (useless := sorted(said & {"cache_kind", "cache_dtype"})):
        raise ValueError(f"{flag(useless[0])} is for --cache")
    if options.cache_kind == "top-k" and options.loss != "top-k-kl":
        raise ValueError(
            f"a top-k cache is for --loss top-k-kl; --loss {options.loss} needs --cache-kind hidden"
        )
    make_alignment(options)
    head_spec(options)
    width = 2 * DEFAULT_TOP_K if options.top_k is None else 2 * options.top_k
    try_loss(options, recipe, width)


def try_loss(options: DistillOptions, recipe: DistillationRecipe, num_classes: int) -> None:
    """Compute the loss of no rows where nothing is computed, to hear early what its arguments may not be.

    Raises:
        ValueError: Says what.
    """
    logits = torch.empty(0, num_classes, device="meta")
    labelled = {"labels_N": torch.empty(0, dtype=torch.long)} if recipe.method.needs_labels else {}
    try:
        recipe.rows_loss()(logits, logits, **labelled)
        recipe.objective()
    except ValueError as error:
        raise ValueError(f"--loss {options.loss} cannot be: {error}") from error


def make_alignment(options: DistillOptions) -> GradientAlignment | None:
    """A new alignment, if one was asked for."""
    if not options.align_gradients:
        return None
    return GradientAlignment(options.align_every, options.align_smoothing, options.align_at)


def head_spec(options: DistillOptions) -> AuxiliaryHeadSpec:
    """What the second head looks like.

    Raises:
        ValueError: A value that cannot be.
    """
    return AuxiliaryHeadSpec(
        kind=options.auxiliary_head,
        width=options.auxiliary_width,
        dropout=options.auxiliary_dropout,
        norm=options.auxiliary_norm,
    )
