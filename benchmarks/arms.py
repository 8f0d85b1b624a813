"""What the benchmarks of SMoE-Dropout share: arms that are run once, their training, a measure at each K."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moekit.moe import ActiveExpertsCallback, DropoutTrainer, KSchedule, set_active_experts, smoe_layers
from transformers import TrainingArguments

EXPERTS = 16


def run_missing(
    results: Path, key: Sequence[str], wanted: Iterable[tuple[Any, ...]], run: Callable[..., dict[str, Any]]
) -> None:
    """Append one JSON line for each wanted combination that the file does not have yet.

    Args:
        results: A .jsonl file; made if it is missing.
        key: The fields of a line that name its combination.
        wanted: Values of those fields; also the arguments of `run`.
        run: Makes the line.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    done = {tuple(row[field] for field in key) for row in map(json.loads, lines)}
    for combination in wanted:
        if combination in done:
            continue
        line = json.dumps(run(*combination))
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def train(
    model: Any,
    rows: list[dict[str, Any]],
    schedule: tuple[str, int, int] | None,
    *,
    seed: int,
    steps: int,
    collator: Any = None,
    load_balance: float = 0.01,
    **arguments: Any,
) -> None:
    """Train quietly on the CPU, K following (name, k_start, k_end) where the model has experts."""
    callbacks = []
    if smoe_layers(model) and schedule is not None:
        callbacks.append(ActiveExpertsCallback(KSchedule(*schedule, EXPERTS, seed)))
    settings = TrainingArguments(
        output_dir="unused",
        max_steps=steps,
        seed=seed,
        save_strategy="no",
        logging_steps=steps,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    DropoutTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        data_collator=collator,
        callbacks=callbacks,
        load_balance=load_balance,
    ).train()


def measure_at(model: Any, ks: Iterable[int], measure: Callable[[], float]) -> dict[str, float]:
    """Measure at each K; once, as at K = E, for a dense model."""
    if not smoe_layers(model):
        return {str(EXPERTS): measure()}
    found = {}
    for k in ks:
        set_active_experts(model, k)
        found[str(k)] = measure()
    return found
