"""What `moekit compress --until-collapse-risk` refuses before any work."""

from collections.abc import Sequence

from ..compress.plan import LowRankRule, check_fits
from ..compress.scores import SCORES
from ..moe.layer import ExpertLayer
from ..moe.low_rank import is_low_rank
from .collapse_store import check_store
from .compress_presets import with_preset
from .low_rank_sizes import first_saving_rank, rank_sizes
from .options import METHOD_OPTIONS, CompressOptions, flag


def check_descent(options: CompressOptions) -> None:
    """Refuse what cannot be cut step by step.

    Raises:
        ValueError: A risk or a floor out of range, a method that does not prune, or options that say
            otherwise how many experts stay.
    """
    defaults = CompressOptions(model=options.model)
    if options.until_collapse_risk is None:
        for name in ("quality_floor", "collapse_store", "take"):
            if getattr(options, name) != getattr(defaults, name):
                raise ValueError(f"{flag(name)} is of --until-collapse-risk; add that, or leave it out")
        return
    if not 0 <= options.until_collapse_risk <= 1:
        raise ValueError(
            f"--until-collapse-risk {options.until_collapse_risk} is not a probability from 0 to 1"
        )
    if not 0 <= options.quality_floor < float("inf"):
        raise ValueError(
            f"--quality-floor {options.quality_floor} is no quality: give a number from 0 (nothing of the "
            "context is left) to 1"
        )
    if options.quality_floor > 1:
        raise ValueError(
            f"--quality-floor {options.quality_floor} is above the present quality, which is 1: the original "
            "keeps all of itself"
        )
    if options.take == "rank":
        _check_rank(options)
    elif options.method not in SCORES:
        raise ValueError(
            f"--until-collapse-risk cuts a model again and again, which --method {options.method} cannot: "
            f"take one that prunes ({', '.join(SCORES)}), or say --take rank"
        )
    taken = {
        "--stream": options.stream,
        "--plan-only": options.plan_only,
        "--router constant": options.router == "constant",
        "--rank": options.rank is not None,
        "--prune-rows": options.prune_rows,
        "--exclude-layers": bool(options.exclude_layers),
        f"--grouping {options.grouping}": options.grouping not in ("auto", "uniform"),
        "--sequential on": options.sequential == "on",
    }
    if said := [flag for flag, is_said in taken.items() if is_said]:
        raise ValueError(f"--until-collapse-risk and {said[0]} exclude each other; leave one of them out")

    check_store(options.collapse_store)


def _check_rank(options: CompressOptions) -> None:
    defaults = with_preset(CompressOptions(model=options.model))
    for name in ("method", *METHOD_OPTIONS, "protect"):
        if getattr(options, name) != getattr(defaults, name):
            raise ValueError(
                f"--take rank keeps all experts, so there is nothing for {flag(name)} to decide; leave it out"
            )
    if options.form == "stock":
        raise ValueError("--take rank needs --form moekit; the stock form has no low-rank experts")
    if not 0 <= options.sparse_rows < 1:
        raise ValueError(
            f"--sparse-rows {options.sparse_rows:g} is not a share from 0 to below 1: at 1 nothing is saved"
        )


def check_descent_layers(layers: Sequence[ExpertLayer], options: CompressOptions) -> None:
    """Refuse layers of different sizes, which one number cannot describe, and such as cannot be factorised.

    Raises:
        ValueError: Names the sizes, or the layer.
    """
    if options.take == "rank":
        for layer in layers:
            check_fits(LowRankRule(rank=1), layer)
            if is_low_rank(layer.experts_module):
                raise ValueError(
                    f"the experts of layer {layer.name!r} are low-rank already; start from the original model"
                )
        if not rank_sizes(*first_saving_rank(layers, options.sparse_rows)):
            raise ValueError(
                f"no rank saves bytes beside --sparse-rows {options.sparse_rows:g}; store fewer rows"
            )
        return
    if len(sizes := sorted({layer.num_experts for layer in layers})) > 1:
        raise ValueError(
            f"the layers have {', '.join(map(str, sizes))} experts; --until-collapse-risk needs the same "
            "number in each"
        )
