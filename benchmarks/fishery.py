"""The paper's fishery: who crashes, and what is earned, by the model that the manager believes in.

    python benchmarks/fishery.py

The authors' data and fresh data sets: the stock climbs from 5.5 to its balance at 8 and never shows the
tipping point at 5. From each, policies are computed by a Gaussian process, by Allen's, Ricker's and Myers'
models (most likely parameters, and for the authors' data also their posterior), by what the authors' released
code does, and by the truth; each is tried on the same noise. Writes `benchmarks/results/fishery.json`, the
figures and the tables of `docs/fishery.md`. Some minutes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from dropout_report import insert_table, markdown
from matplotlib.figure import Figure
from moekit.compress.tipping_point import (
    Allen,
    GaussianProcess,
    LogPosterior,
    Policy,
    Replicates,
    fit,
    gp_transitions,
    model_transitions,
    sample,
    sample_hyperparameters,
    simulate,
    simulate_unharvested,
    solve,
)
from moekit.compress.tipping_point.figures import (
    harvest_figure,
    policy_figure,
    posterior_figure,
    replicate_figure,
    sensitivity_figure,
)
from moekit.compress.tipping_point.fishery_data import SERIES
from moekit.compress.tipping_point.parametric import FAMILIES
from moekit.compress.tipping_point.published import (
    published_processes,
    published_solution,
    published_transitions,
    released_escapement,
)
from moekit.moe.figure_style import figure_png
from tqdm import tqdm

GRID = np.linspace(0, 15, 50)
NOISE, TRUTH = 0.05, Allen()
EXTINCT_BELOW = 1.0
"""Last stock of a replicate that has crashed; those that live are above 5."""


@dataclass(frozen=True, kw_only=True)
class FisheryConfig:
    """Reproduce the paper."""

    data_sets: int = 20
    """Fresh ones, beside the authors'."""
    iterations: int = 20_000
    """Of the walk over hyper-parameters on each of them; 100,000 on the authors' data."""
    chains: int = 3
    """Of the released code's walk."""
    results: Path = Path("benchmarks/results/fishery.json")
    document: Path = Path("docs/fishery.md")


def processes_of(series: Any, seed: int, *, iterations: int) -> list[GaussianProcess]:
    """Draws of the Gaussian process that a series teaches."""
    x, y = series[:-1], series[1:]
    rng, burn_in = np.random.default_rng(seed), iterations // 10
    thin = max(1, (iterations - burn_in) // 300)
    drawn = sample_hyperparameters(LogPosterior(x, y), rng, iterations=iterations, burn_in=burn_in, thin=thin)
    return [GaussianProcess(x=x, y=y, length=length, noise=noise) for length, noise in drawn]


def optimum(truth: Allen, noise: float) -> Policy:
    """Of one who knows."""
    return solve(model_transitions([(truth, noise)], GRID), GRID)


def judge(policy: Policy, best: Replicates, *, truth: Allen = TRUTH, noise: float = NOISE) -> tuple[Any, Any]:
    """Replicates, and what each earned relative to the optimum."""
    found = simulate(truth, policy, noise=noise)
    return found, found.total_harvest / best.total_harvest


def authors_data(config: FisheryConfig, figures: Path) -> dict[str, Any]:
    """All models on the paper's series."""
    series = np.array(SERIES)
    truth = optimum(TRUTH, NOISE)
    best = simulate(TRUTH, truth, noise=NOISE)
    processes = processes_of(series, 0, iterations=100_000)
    policies = {"truth": truth, "Gaussian process": solve(gp_transitions(processes, GRID), GRID)}
    criteria, models = {}, {"truth": TRUTH}
    for name in FAMILIES:
        fitted, posterior = fit(name, series), sample(name, series, np.random.default_rng(0))
        models[f"{name}, most likely"] = fitted.growth
        one = [(fitted.growth, fitted.noise)]
        policies[f"{name}, most likely"] = solve(model_transitions(one, GRID), GRID)
        policies[f"{name}, posterior"] = solve(model_transitions(posterior.models(100), GRID), GRID)
        criteria[name] = {"AIC": fitted.aic, "BIC": fitted.bic, "DIC": posterior.dic}
        criteria[name] |= {"parameters": fitted.parameters, "noise": fitted.noise}
    released, equal = None, []
    for chain in range(config.chains):
        drawn = published_processes(series[:-1], series[1:], np.random.default_rng(chain))
        released = published_solution(published_transitions(drawn, GRID), GRID)
        equal.append(int(np.isclose(released.escapement, released_escapement(GRID)).sum()))
    assert released is not None
    policies["released code"] = released
    found = {name: judge(policy, best) for name, policy in policies.items()}
    save(posterior_figure(processes, models, np.linspace(0, 12, 121)), figures / "fishery_posterior.png")
    save(
        policy_figure({k: v for k, v in policies.items() if "posterior" not in k}),
        figures / "fishery_policies.png",
    )
    save(
        replicate_figure({k: v[0] for k, v in found.items()}, TRUTH.C), figures / "fishery_replicates.png", 72
    )
    save(harvest_figure({k: v[1] for k, v in found.items()}), figures / "fishery_harvests.png")
    return {
        "policies": {
            name: {
                "crash": replicates.crash_share(EXTINCT_BELOW),
                "value": float(shares.mean()),
                "median": float(np.median(shares)),
                "escapement at 10": float(policies[name].escapement[np.abs(GRID - 10).argmin()]),
            }
            for name, (replicates, shares) in found.items()
        },
        "criteria": criteria,
        "cells equal to the released policy": equal,
    }


def fresh_data(config: FisheryConfig) -> list[dict[str, Any]]:
    """Process and most likely models on new series."""
    best = simulate(TRUTH, optimum(TRUTH, NOISE), noise=NOISE)
    rows = []
    for seed in tqdm(range(100, 100 + config.data_sets), "data sets"):
        rng = np.random.default_rng(seed)
        series = simulate_unharvested(TRUTH, start=5.5, years=40, noise=NOISE, rng=rng)
        processes = processes_of(series, seed, iterations=config.iterations)
        policies = {"Gaussian process": solve(gp_transitions(processes, GRID), GRID)}
        fits = {name: fit(name, series) for name in FAMILIES}
        for name, fitted in fits.items():
            policies[name] = solve(model_transitions([(fitted.growth, fitted.noise)], GRID), GRID)
        chosen = {key: min(fits, key=lambda n, k=key: getattr(fits[n], k)) for key in ("aic", "bic")}
        row: dict[str, Any] = {"seed": seed, "lowest": float(series.min()), **chosen}
        for name, policy in policies.items():
            replicates, shares = judge(policy, best)
            row[name] = {"crash": replicates.crash_share(EXTINCT_BELOW), "value": float(shares.mean())}
        for key, name in chosen.items():
            row[f"chosen by {key.upper()}"] = row[name]
        rows.append(row)
    return rows


def sensitivity(config: FisheryConfig, figures: Path) -> dict[str, dict[str, Any]]:
    """The process under other noises and tipping points; five series each."""
    by_noise, by_point = {}, {}
    cases = [(by_noise, noise, TRUTH, noise) for noise in (0.01, 0.05, 0.1)]
    cases += [(by_point, point, Allen(C=point), NOISE) for point in (1.0, 2.0, 3.0, 4.0, 5.0)]
    for table, key, truth, noise in tqdm(cases, "sensitivity"):
        best = simulate(truth, optimum(truth, noise), noise=noise)
        values = []
        for seed in range(5):
            rng = np.random.default_rng(seed)
            series = simulate_unharvested(truth, start=truth.C + 0.5, years=40, noise=noise, rng=rng)
            processes = processes_of(series, seed, iterations=config.iterations // 4)
            policy = solve(gp_transitions(processes, GRID), GRID)
            values.append(judge(policy, best, truth=truth, noise=noise)[1])
        table[key] = np.concatenate(values)
    save(sensitivity_figure(by_noise, by_point), figures / "fishery_sensitivity.png")
    return {
        name: {
            f"{key:g}": [float(v.mean()), *map(float, np.quantile(v, (0.05, 0.95)))]
            for key, v in table.items()
        }
        for name, table in (("noise", by_noise), ("tipping point", by_point))
    }


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """As PNG."""
    path.write_bytes(figure_png(figure, dpi))


def interval(values: list[float]) -> str:
    """Mean, and the 95 % interval of it over data sets (bootstrap)."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})"


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Markdown."""
    authors = [
        [
            name,
            f"{row['escapement at 10']:.2f}",
            f"{row['crash']:.2f}",
            f"{row['value']:.3f}",
            f"{row['median']:.3f}",
        ]
        for name, row in found["authors"]["policies"].items()
    ]
    names = ("Gaussian process", *FAMILIES, "chosen by AIC", "chosen by BIC")
    fresh = [
        [name, *(interval([row[name][key] for row in found["fresh"]]) for key in ("crash", "value"))]
        for name in names
    ]
    criteria = [
        [name, *(f"{row[key]:.1f}" for key in ("AIC", "BIC", "DIC"))]
        for name, row in found["authors"]["criteria"].items()
    ]
    head = ["believed", "left of a stock of 10", "crashed", "value, mean", "median"]
    return {
        "fishery_authors": markdown(head, authors),
        "fishery_fresh": markdown(["believed", "crashed", "value"], fresh),
        "fishery_criteria": markdown(["model", "AIC", "BIC", "DIC"], criteria),
    }


def main(config: FisheryConfig) -> None:
    """Compute, write, draw."""
    figures = config.document.parent / "figures"
    found: dict[str, Any] = {"authors": authors_data(config, figures)}
    found["fresh"] = fresh_data(config)
    found["sensitivity"] = sensitivity(config, figures)
    config.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = config.document.read_text(encoding="utf-8")
    for name, table in tables(found).items():
        text = insert_table(text, name, table)
    config.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(FisheryConfig))
