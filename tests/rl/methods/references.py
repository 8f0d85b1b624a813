"""Every method once more, written in loops over numbers."""

import math
import statistics
from typing import Any

import torch


def known(batch: Any, group: int) -> list[int]:
    rows = [i for i, g in enumerate(batch.group_ids.tolist()) if g == group]
    return [i for i in rows if not math.isnan(batch.rewards[i]) and not batch.is_rehearsal[i]]


def mean_only(batch: Any, **_: Any) -> list[float]:
    found = [0.0] * len(batch)
    for group in set(batch.group_ids.tolist()):
        rows = known(batch, group)
        for i in rows:
            found[i] = float(batch.rewards[i]) - statistics.mean(float(batch.rewards[j]) for j in rows)
    return found


def z_score(batch: Any, **_: Any) -> list[float]:
    found = mean_only(batch)
    for group in set(batch.group_ids.tolist()):
        rows = known(batch, group)
        if len(rows) > 1:
            deviation = statistics.stdev(float(batch.rewards[j]) for j in rows)
            for i in rows:
                found[i] /= deviation + 1e-4
    return found


def others(batch: Any, **_: Any) -> list[float]:
    found = [0.0] * len(batch)
    for group in set(batch.group_ids.tolist()):
        rows = known(batch, group)
        for i in rows:
            rest = [float(batch.rewards[j]) for j in rows if j != i]
            found[i] = float(batch.rewards[i]) - statistics.mean(rest) if rest else 0.0
    return found


def gtpo(
    batch: Any,
    *,
    gamma: float,
    w: float,
    tau: float,
    initial_entropy: float,
    overlap: str,
    normalisation: str,
) -> list[list[float]]:
    """``lambda_it`` times the shaped advantage."""
    centred, found = mean_only(batch), []
    words = [row[:n].tolist() for row, n in zip(batch.completion_ids, batch.lengths.tolist(), strict=True)]

    def run(i: int, step: int) -> int:
        group = [j for j in range(len(batch)) if batch.group_ids[j] == batch.group_ids[i]]
        for place in range(len(words[i])):
            word = words[i][::step][place]
            signs = {
                math.copysign(1, centred[j])
                for j in group
                if centred[j] != 0 and len(words[j]) > place and words[j][::step][place] == word
            }
            if len(signs) < 2 or centred[i] == 0:
                return place
        return len(words[i])

    for i, length in enumerate(batch.lengths.tolist()):
        counted = [t for t in range(length) if batch.loss_mask[i, t] and not batch.is_rehearsal[i]]
        entropy = statistics.mean(float(batch.old_entropies[i, t]) for t in counted) if counted else 0.0
        shaped = centred[i] - gamma * entropy
        is_judged = i in known(batch, int(batch.group_ids[i]))
        if not is_judged or (initial_entropy <= tau and entropy > tau):
            shaped = 0.0
        begin, end = run(i, 1), run(i, -1)
        if normalisation == "official":
            shaped *= int((batch.group_ids == batch.group_ids[i]).sum()) / max(1, begin, end)
        row = []
        for t in range(length):
            times = (t < begin) + (t >= length - end)
            times = min(times, 1) if overlap == "max" else times
            row.append(shaped * (1 if not times else 0 if centred[i] < 0 else w**times))
        found.append(row)
    return found


def hbpo(batch: Any, *, intra_weight: float, length: int, beta: float = 4.0) -> list[float]:
    lengths, budgets = batch.lengths.tolist(), batch.budgets.tolist()

    def top(b: int) -> float:
        return beta * math.cos(math.pi * b / (2 * length))

    rewards = [
        0.0
        if not batch.rewards[i] > 0
        else top(b)
        if n <= b
        else beta * math.cos(math.pi * n / (2 * length)) - abs(n - b) / length
        for i, (n, b) in enumerate(zip(lengths, budgets, strict=True))
    ]
    found = [0.0] * len(batch)
    for group in set(batch.group_ids.tolist()):
        rows = known(batch, group)
        for i in rows:
            mean = statistics.mean(rewards[j] for j in rows)
            deviation = statistics.stdev(rewards[j] for j in rows)
            same = statistics.mean(rewards[j] for j in rows if budgets[j] == budgets[i])
            found[i] = (rewards[i] - mean) / (deviation + 1e-6) + intra_weight * (same - top(budgets[i]))
    return found


def clipped(ratio: float, advantage: float, low: float, high: float, cap: float = math.inf) -> float:
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high)
    return -advantage * min(max(ratio, 1 - low), cap)


def token_losses(name: str, sample: Any, now: Any) -> dict[tuple[int, int], float]:
    """Of each token that the policy loss counts."""
    batch, settings = sample.batch, sample.algorithm.hyperparameters()
    found = {}
    for i, t in batch.policy_mask.nonzero().tolist():
        logprob, old = float(now.logprobs[i, t]), float(batch.old_logprobs[i, t])
        ratio, a = math.exp(logprob - old), float(batch.advantages[i, t])
        if name in ("reinforce", "rloo", "gtpo"):
            value = -a
        elif name == "gspo":
            counted = batch.policy_mask[i].nonzero().flatten().tolist()
            mean = statistics.mean(float(now.logprobs[i, s] - batch.old_logprobs[i, s]) for s in counted)
            value = clipped(math.exp(mean), a, 3e-4, 4e-4)
        elif name == "clip-cov":
            value = 0.0 if batch.selected[i, t] else clipped(ratio, a, 1.0, 1.0)
        elif name == "kl-cov":
            value = -a * ratio + settings["kl_weight"] * abs(logprob - old) * bool(batch.selected[i, t])
        elif name == "rl-plus":
            p, q = math.exp(logprob), math.exp(old)
            u = settings["behaviour_probability"]
            external = (1 - p) ** settings["gamma"] * 2 * p / (1.5 * q + 0.5 * u)
            value = -a * (external if batch.is_external[i] else ratio)
        elif name == "rover":
            ahead = 0.0
            if t + 1 < int(batch.lengths[i]):
                ahead = float(now.mean_vocab_logprobs[i, t + 1] - batch.old_mean_vocab_logprobs[i, t + 1])
            rho, beta = settings["rho"], settings["beta"]
            value = (rho * (logprob - old) - a - beta * rho * ahead) ** 2
        else:
            high = settings["epsilon_high"] or settings["epsilon"]
            value = clipped(ratio, a, settings["epsilon"], high, settings["delta"] or math.inf)
        found[i, t] = value
    return found


def reduced(losses: dict[tuple[int, int], float], reduction: str, num_rows: int, max_length: int) -> float:
    total = math.fsum(losses.values())
    if reduction == "token-mean":
        return total / len(losses)
    if reduction == "fixed-length":
        return total / (num_rows * max_length)
    if reduction == "token-sum":
        return total / max_length
    rows: dict[int, list[float]] = {}
    for (i, _), value in losses.items():
        rows.setdefault(i, []).append(value)
    return sum(statistics.mean(values) for values in rows.values()) / num_rows


def covariances(now: Any, batch: Any) -> dict[tuple[int, int], float]:
    places = [(i, t) for i, t in batch.policy_mask.nonzero().tolist()]
    logprobs = [float(now.logprobs[place]) for place in places]
    advantages = [float(batch.advantages[place]) for place in places]
    a, b = statistics.mean(logprobs), statistics.mean(advantages)
    return {p: (x - a) * (y - b) for p, x, y in zip(places, logprobs, advantages, strict=True)}


def dph(u: float, divergence: str, alpha: float = 0.2) -> float:
    if divergence == "forward":
        return u - 1 - math.log(u)
    if divergence == "js":
        return u * math.log(u) - (u + 1) * math.log((u + 1) / 2)
    return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def epo(entropy: float, low: float, high: float, weight: float, beta_alpha: float) -> float:
    penalty = max(0.0, low - entropy) + max(0.0, entropy - high)
    return -weight * (entropy - beta_alpha * penalty)


def as_matrix(rows: list[list[float]], width: int) -> torch.Tensor:
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
