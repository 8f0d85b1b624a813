"""Made-up report contents for the tests of the report and its pictures."""

import math

import numpy as np
from moekit.compress.report_content import Comparison, DomainRow, LayerReport, ReportContent


def make_layer(name: str, num_experts: int, num_kept: int, seed: int = 0) -> LayerReport:
    """A made-up layer whose experts form clusters, with skewed loads and one dead expert."""
    rng = np.random.default_rng(seed)
    cores = rng.normal(size=(num_kept, 12))
    group_of = [*range(num_kept), *rng.integers(0, num_kept, num_experts - num_kept).tolist()]
    vectors = cores[group_of] + 0.6 * rng.normal(size=(num_experts, 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    usage = rng.gamma(1.2, size=num_experts)
    dead = [int(np.argmin(usage))] if num_experts > 2 else []
    usage[dead] = 0
    usage /= usage.sum()
    too_few = [expert for expert in range(num_experts) if 0 < usage[expert] < 0.15 / num_experts]
    return LayerReport(
        name=name,
        num_experts=num_experts,
        num_kept=num_kept,
        usage=usage.tolist(),
        group_of=group_of,
        similarity=(vectors @ vectors.T + 1) / 2,
        too_few=too_few,
        dead=dead,
        entropy=0.8 * math.log(num_experts),
    )


DOMAINS = (
    ("arithmetic", 4096, 3.21, 3.62, 0.141, 0.871),
    ("code", 8192, 5.47, 6.91, 0.262, 0.803),
    ("stories", 12288, 9.88, 10.31, 0.071, 0.905),
    ("wiki", 8192, 21.4, 23.02, 0.093, 0.882),
)


def make_domain(domain: str, tokens: int, before: float, after: float, kl: float, top1: float) -> DomainRow:
    return DomainRow(
        domain=domain,
        num_tokens=tokens,
        perplexity_original=before,
        perplexity_compressed=after,
        perplexity_ratio_interval=(0.98 * after / before, 1.03 * after / before),
        kl=kl,
        kl_interval=(kl * 0.9, kl * 1.12),
        top1_agreement=top1,
        top1_agreement_interval=(top1 - 0.011, top1 + 0.009),
    )


def make_content(num_layers: int = 2, num_experts: int = 8) -> ReportContent:
    """Made-up numbers of a plausible run."""
    kept = max(num_experts // 2, 1)
    mine = [
        make_layer(f"model.layers.{index}.mlp", num_experts, max(1, kept + (index % 3) - 1), seed=index)
        for index in range(num_layers)
    ]
    return ReportContent(
        title="moe-8m with half its experts",
        model="models/moe-8m",
        method="m-smoe",
        grouping="adaptive",
        router="redirect",
        form="moekit",
        command="moekit compress models/moe-8m --out half --experts 8 --data calibration.jsonl",
        versions={"moekit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        seed=7,
        plan_hash="3f9a6f1c0d",
        layers=mine,
        num_parameters=(8_300_000, 4_910_000),
        num_bytes=(16_610_304, 9_830_112),
        parameters_by_part={"experts": (6_800_000, 3_410_000), "embeddings": (1_000_000, 1_000_000)},
        bytes_by_part={
            "experts": (13_600_000, 6_820_000),
            "embeddings": (2_000_000, 2_000_000),
            "attention": (820_000, 820_000),
            "routers": (120_000, 120_000),
            "shared experts": (60_000, 60_000),
            "norms and other": (10_304, 10_112),
        },
        overall=make_domain("all", 32768, 9.12, 10.04, 0.129, 0.872),
        domains=[make_domain(*row) for row in DOMAINS],
        generation=[
            Comparison(
                name="Completions that end in a loop",
                before=0.04,
                after=0.11,
                before_interval=(0.02, 0.07),
                after_interval=(0.08, 0.15),
                count=200,
                higher_is_better=False,
            ),
            Comparison(
                name="Answers right",
                before=0.71,
                after=0.66,
                before_interval=(0.66, 0.76),
                after_interval=(0.61, 0.71),
                count=400,
            ),
        ],
        throughput=[
            Comparison(name="Prefill", before=10432.0, after=11873.0, unit="tokens/s", count=5),
            Comparison(name="Decoding", before=212.4, after=230.9, unit="tokens/s", count=5),
        ],
        warnings=["3 experts saw fewer than 64 tokens: more calibration data would judge them better."],
        settings={"Calibration": "calibration.jsonl, 65,536 tokens"},
    )
