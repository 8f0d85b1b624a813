"""Everything that `moekit train` checks before it builds or loads a model."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from ..moe import KSchedule, dense_ffns
from ..moe.dropout.build import DropoutSpec
from ..moe.dropout.dense_ffn import ffns_at
from .options import TrainOptions, flag
from .train_arguments import read_arguments_file
from .train_model import (
    DEFAULT_EXPERTS,
    Source,
    convert,
    open_training_source,
    resolve_combine,
    resolve_start,
    shared_experts,
)
from .training_checks import check_not_negative, check_training_options
from .training_job import TrainingJob, common_fields, open_task, read_examples

NO_ROUTER = (
    "experts",
    "k_start",
    "k_end",
    "schedule",
    "combine",
    "start",
    "drop_fraction",
    "partition",
    "layers",
)
NO_ROUTER += ("center_routers", "logit_std", "load_balance", "consistency", "eval_experts", "shared_experts")
"""Options that --router none has no use for."""
ROUTER_OF = {
    "load_balance": "learned",
    "consistency": "thor",
    "center_routers": "random",
    "shared_experts": "analytic",
}
"""Options that one router alone has a use for."""


@dataclass(frozen=True, kw_only=True)
class TrainJob(TrainingJob):
    """A training with experts, or of the dense model that it is compared with."""

    options: TrainOptions
    router: str
    """A key of `ROUTERS`, of the model that is trained on where it has one; or none."""
    expert_share: float
    """Width of an expert in that of the dense FFN: 1 / E for slices, 1 for copies and the dense model."""
    schedule: KSchedule | None
    """None for the dense model."""

    @property
    def form(self) -> str:
        """Of the result."""
        if self.options.form != "auto":
            return self.options.form
        return "dense" if self.schedule is None else "moekit"

    @property
    def eval_experts(self) -> tuple[int, ...]:
        """Numbers of active experts to evaluate at."""
        if self.schedule is None:
            return ()
        return self.options.eval_experts or default_eval_experts(self.schedule)


def default_eval_experts(schedule: KSchedule) -> tuple[int, ...]:
    """Powers of two, three quarters of all, all, and the ends of the schedule."""
    experts = schedule.num_experts
    powers = {2**n for n in range(experts.bit_length())}
    return tuple(sorted(powers | {max(1, 3 * experts // 4), experts, schedule.k_start, schedule.k_end}))


def prepare_training(options: TrainOptions) -> TrainJob:
    """Check everything that can be checked before a model is built, and read the data.

    Raises:
        ValueError: The first thing that cannot be, with what to do.
    """
    _check_options(options)
    file = read_arguments_file(options.training_arguments)
    source = open_training_source(options.model)
    start = resolve_start(options, source)
    router = options.router if source.spec is None else source.spec.router
    _check_use(options, router)
    schedule = _schedule(options, source)
    task = open_task(options, source, label_order=partial(_own_order, source))
    if start != "continue":
        _try_conversion(options, task.skeleton, start)
    share = expert_share(task.skeleton, source.spec, start, 1 if schedule is None else schedule.num_experts)
    _check_dense_form(options, share, schedule)
    common = common_fields(options, source, task, read_examples(options, task), start=start, file=file)
    return TrainJob(**common, router=router, expert_share=share, schedule=schedule)


def _own_order(source: Source, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels of the data as the model numbers them, where its config has the same."""
    return source.labels if sorted(source.labels) == sorted(labels) else labels


def _check_options(options: TrainOptions) -> None:
    """Refuse what the options alone show cannot be.

    Raises:
        ValueError: Names the option.
    """
    check_training_options(options)
    check_not_negative(options, ("load_balance", "consistency", "logit_std"))
    _check_router(options)


def _check_router(options: TrainOptions) -> None:
    """Refuse options that the chosen router or start has no use for."""
    said = {field.name for field in fields(options) if getattr(options, field.name) != field.default}
    if options.router == "none":
        if useless := [name for name in NO_ROUTER if name in said]:
            raise ValueError(f"--router none trains the dense model and has no use for {flag(useless[0])}")
        if options.form not in ("auto", "dense"):
            raise ValueError(f"--router none trains the dense model, which --form {options.form} cannot hold")
    elif options.ffn_dropout:
        raise ValueError("--ffn-dropout is for the dense model, --router none")
    if not 0 <= options.ffn_dropout < 1:
        raise ValueError(f"--ffn-dropout {options.ffn_dropout} is not at least 0 and less than 1")
    if options.router == "analytic":
        _check_analytic(options)
    if options.drop_fraction and options.start != "copy":
        raise ValueError(
            f"--drop-fraction {options.drop_fraction} is for --start copy, got --start {options.start}"
        )
    if options.partition == "coactivation" and options.start in ("scratch", "copy"):
        raise ValueError(f"--partition coactivation is for --start carve, got --start {options.start}")
    if options.form == "stock":
        _check_stock(options)


def _check_use(options: TrainOptions, found: str) -> None:
    """Refuse options that only another router has a use for; one that a checkpoint has may be named again."""
    said = {field.name for field in fields(options) if getattr(options, field.name) != field.default}
    for name, router in ROUTER_OF.items():
        if name in said and found != router:
            raise ValueError(f"{flag(name)} is for --router {router}, got --router {found}")


def _check_analytic(options: TrainOptions) -> None:
    """Refuse what neurons of a pretrained FFN cannot speak for."""
    if options.start in ("scratch", "copy"):
        raise ValueError(f"--router analytic is for --start carve, got --start {options.start}")
    if options.partition != "contiguous":
        raise ValueError(
            f"--router analytic deals the neurons itself; leave out --partition {options.partition}"
        )
    experts = options.experts or DEFAULT_EXPERTS
    if options.shared_experts is not None and not 0 <= options.shared_experts < experts:
        raise ValueError(
            f"--shared-experts {options.shared_experts} is not between 0 and {experts - 1} of {experts}"
        )
    shared = shared_experts(options)
    given = {
        "k_start": options.k_start,
        "k_end": options.k_end,
        "eval_experts": min(options.eval_experts, default=None),
    }
    for name, k in given.items():
        if k is not None and k < shared:
            raise ValueError(
                f"{flag(name)} {k} is less than the {shared} shared experts, which are always active"
            )


def _check_stock(options: TrainOptions) -> None:
    """Refuse what a stock class cannot hold exactly; whether there is one for the family is seen later."""
    if options.router not in ("random", "learned") or options.center_routers:
        what = "--center-routers" if options.center_routers else f"--router {options.router}"
        raise ValueError(f"--form stock has no place for {what}; take --form moekit")
    if options.combine not in ("auto", "softmax"):
        raise ValueError(
            f"--form stock weighs experts by softmax, not by --combine {options.combine}; take --form moekit"
        )


def _schedule(options: TrainOptions, source: Source) -> KSchedule | None:
    if options.router == "none":
        return None
    experts = options.experts or (DEFAULT_EXPERTS if source.spec is None else source.spec.num_experts)
    if experts < 2:
        raise ValueError(f"--experts {experts} is not at least 2")
    is_constant = options.schedule == "constant"
    k_end = options.k_end
    if k_end is None:
        k_end = options.k_start if is_constant and options.k_start is not None else experts
    k_start = options.k_start
    if k_start is None:
        k_start = k_end if is_constant else min(max(1, experts // 2, shared_experts(options)), k_end)
    schedule = KSchedule(options.schedule, k_start, k_end, experts, seed=options.seed)
    if wrong := [k for k in options.eval_experts if not 1 <= k <= experts]:
        raise ValueError(f"--eval-experts {wrong[0]} is not between 1 and {experts} experts")
    return schedule


def expert_share(skeleton: PreTrainedModel, spec: DropoutSpec | None, start: str, num_experts: int) -> float:
    """Width of an expert in that of the dense FFN.

    Args:
        skeleton: The dense model.
        spec: Of the layers that a checkpoint has.
        start: How layers are made that it does not have.
        num_experts: E; 1 for the dense model.
    """
    if spec is None:
        return 1.0 if start == "copy" else 1 / num_experts
    name, ffn = next(iter(ffns_at(skeleton, spec.widths).items()))
    return spec.widths[name] / ffn.width


def _check_dense_form(options: TrainOptions, share: float, schedule: KSchedule | None) -> None:
    """Refuse to make one FFN of copies, which only slices are parts of."""
    has_copies = schedule is not None and share * schedule.num_experts > 1
    if options.form == "dense" and has_copies:
        raise ValueError(
            "--form dense is for experts that are slices of one FFN, not copies; take --form moekit"
        )


def _try_conversion(options: TrainOptions, skeleton: Any, start: str) -> None:
    """Convert the model without weights, to hear early what cannot be."""
    if options.router == "none":
        if start == "copy":
            raise ValueError("--router none has no experts to copy to")
        dense_ffns(skeleton)
        return
    resolve_combine(options, start)
    convert(skeleton, options, start=start, partition="contiguous")
