"""How a mini-batch is cut into micro-batches changes neither weights nor metrics."""

import pytest
import torch
from moekit.rl import ALGORITHMS
from peft import LoraConfig, get_peft_model

from .tiny_rl import assert_same, double_policy, tiny_trainer, untimed, weights

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def one_step(folder, name, size, *, model=None, **settings):
    trainer = tiny_trainer(
        folder / str(size),
        name,
        model=double_policy() if model is None else model,
        micro_batch_size=size,
        **{"steps": 1, **settings},
    )
    before = weights(trainer)
    trainer.train()
    assert trainer.state.skipped == 0
    assert any((before[n] != value).any() for n, value in weights(trainer).items())
    return trainer


def assert_invariant(folder, name, *sizes, **settings):
    whole = one_step(folder, name, 64, **settings)
    for size in sizes:
        cut = one_step(folder, name, size, **settings)
        assert_same(weights(cut), weights(whole), tolerance=1e-6)
        for row, expected in zip(untimed(cut.history.read()), untimed(whole.history.read()), strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)


@every_algorithm
def test_the_update_of_every_algorithm(tmp_path, name):
    assert_invariant(tmp_path, name, 1)


@every_algorithm
def test_the_update_with_reference_and_entropy_bonus(tmp_path, name):
    # The second step is away from the reference, where its divergence has a gradient.
    settings = {"beta": 0.1, "entropy_coef": 0.05, "mask_truncated_completions": True, "steps": 2}
    assert_invariant(tmp_path, name, 5, **settings)


@pytest.mark.parametrize("name", ["grpo", "kl-cov", "rover", "dph-rl"])
def test_the_update_with_router_replay(tmp_path, name):
    assert_invariant(tmp_path, name, 3, router_replay=True, num_iterations=2)


@pytest.mark.parametrize("name", ["grpo", "rl-plus", "hbpo"])
def test_the_update_of_adapters(tmp_path, name):
    whole = one_step(tmp_path, name, 64, model=with_adapters())
    cut = one_step(tmp_path, name, 3, model=with_adapters())
    assert_same(weights(cut), weights(whole), tolerance=1e-6)
    plain = dict(double_policy().named_parameters())
    kept = {n.split("base_model.model.")[1].replace(".base_layer", ""): v for n, v in weights(cut).items()}
    assert_same({n: kept[n] for n in plain}, {n: v.detach() for n, v in plain.items()})


def with_adapters():
    torch.manual_seed(1)
    return get_peft_model(double_policy(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))


def test_selection_among_micro_batches_is_another(tmp_path):
    def share(size, scope):
        method = {"share": 0.01}
        trainer = one_step(tmp_path, "kl-cov", size, selection_scope=scope, method=method)
        row = trainer.history.read()[-1]
        (tmp_path / str(size)).rename(tmp_path / f"{size}-{scope}")
        return row["selected"]

    whole = share(64, "minibatch")
    assert share(2, "minibatch") == pytest.approx(whole)
    assert share(2, "microbatch") > 2 * whole  # one token of each at least
