"""Every choice of ``privacy`` becomes the plan that it names, or is refused with its key."""

import json

import pytest

from privlm.config import ConfigError, TrainConfig, decode_config
from privlm.dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BallsInBinsSampler,
    Banded,
    Blt,
    CyclicPoissonSampler,
    ExampleLevelSampling,
    FixedSizeSampler,
    PerLayerClipping,
    PoissonSampler,
    TruncatedPoissonSampler,
    UnearnedAmplification,
    UserLevelSampling,
)
from privlm.privacy import PrivacyConfig, make_plan, needs_one_seed


def privacy(**keys) -> PrivacyConfig:
    text = json.dumps({"privacy": {"noise_multiplier": 1.0} | keys})
    return decode_config(text, TrainConfig, where="test").privacy


def plan_of(**keys):
    return make_plan(privacy(**keys), candidates=1000, epochs=4, batch_size=50, users_known=True)


def test_the_short_form_is_dp_sgd():
    plan = plan_of()
    assert plan.sampler == PoissonSampler(0.05)
    assert (plan.steps, plan.expected_batch_size, plan.unit) == (80, 50, "example")
    assert not needs_one_seed(plan)


@pytest.mark.parametrize(
    ("keys", "sampler", "sealed"),
    [
        (
            {"sampler": {"kind": "truncated-poisson", "max_batch_size": 70}},
            TruncatedPoissonSampler(0.05, 70, 1000),
            False,
        ),
        ({"sampler": "fixed-size"}, FixedSizeSampler(50, 1000), False),
        ({"sampler": {"kind": "cyclic-poisson", "cycle": 4}}, CyclicPoissonSampler(0.2, 4), True),
        ({"sampler": "balls-in-bins"}, BallsInBinsSampler(20), True),
        ({"correlation": {"kind": "banded", "bands": 3}}, CyclicPoissonSampler(0.15, 3), True),
        ({"correlation": {"kind": "blt"}}, BallsInBinsSampler(20), True),
    ],
)
def test_samplers_expect_the_batch_that_was_asked_for(keys, sampler, sealed):
    plan = plan_of(**keys)
    assert plan.sampler == sampler
    assert plan.expected_batch_size == 50
    assert needs_one_seed(plan) == sealed


def test_bins_divide_the_data_and_their_true_mean_is_the_normaliser():
    plan = make_plan(privacy(sampler="balls-in-bins"), candidates=1000, epochs=3, batch_size=300)
    assert (plan.sampler.cycle, plan.steps) == (3, 9)
    assert plan.expected_batch_size == pytest.approx(1000 / 3)


def test_correlated_noise_is_made_for_its_sampler():
    assert plan_of(correlation={"kind": "banded", "bands": 3}).correlation == Banded(3)
    assert plan_of(correlation={"kind": "blt", "buffers": 2}).correlation == Blt(2, 20)
    with pytest.raises(UnearnedAmplification, match="no amplification is proven"):
        plan_of(correlation={"kind": "blt"}, sampler="poisson")


@pytest.mark.parametrize(
    ("keys", "clipping"),
    [
        ({"clipping": "per-layer", "max_grad_norm": 2.0}, PerLayerClipping(2.0)),
        ({"clipping": "automatic"}, AutomaticClipping(1.0)),
        ({"clipping": {"kind": "automatic", "stability": 0.1}}, AutomaticClipping(1.0, 0.1)),
        ({"clipping": "adaptive"}, AdaptiveClipping(1.0)),
        (
            {"clipping": {"kind": "adaptive", "target_quantile": 0.7}},
            AdaptiveClipping(1.0, target_quantile=0.7),
        ),
    ],
)
def test_clipping(keys, clipping):
    assert plan_of(**keys).clipping == clipping


def test_users():
    many = {"unit": "user", "examples_per_user": 3}
    assert plan_of(**many).users == UserLevelSampling(3)
    assert plan_of(**many, user_sampling="els").users == ExampleLevelSampling(3)
    assert plan_of(**many).unit == "user"
    with pytest.raises(ValueError, match="a user is protected by `privlm train` alone"):
        make_plan(privacy(**many), candidates=1000, epochs=1, batch_size=10)


def test_a_fixed_size_replaces_one():
    assert plan_of(sampler="fixed-size").neighbours == "replace-one"
    assert plan_of(neighbours="replace-one").neighbours == "replace-one"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampler": "shuffled"}, r"privacy\.sampler: "),
        ({"sampler": {"kind": "truncated-poisson"}}, r"privacy\.sampler\.max_batch_size: missing"),
        ({"sampler": {"kind": "cyclic-poisson", "cycle": 0}}, r"privacy\.sampler\.cycle: "),
        ({"clipping": {"kind": "adaptive", "max_grad_norm": 1}}, "clipping.max_grad_norm: unknown"),
        ({"unit": "user"}, "privacy: unit: user and examples_per_user go together"),
        ({"examples_per_user": 3}, "privacy: unit: user and examples_per_user go together"),
        ({"correlation": {"kind": "banded"}}, r"privacy\.correlation\.bands: missing"),
    ],
)
def test_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        privacy(**keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 4}", "lora: adapters go beside the layers of a transformers model"),
        ("budget: {epsilon: 1}", "budget: a run without protection"),
        ("model: {path: x, width: 8}", "model: path names a model that has its own width"),
        ("model: {kind: bert}", r"model\.kind: "),
        ("corpus: {public_source: none}", r"corpus\.public_source: public text trains"),
        ("model: {path: x}\ntokenizer: {kind: byte}", "tokenizer: a model from a folder has its"),
    ],
)
def test_keys_that_do_not_go_together(text, message):
    with pytest.raises(ConfigError, match=message):
        decode_config("privacy: null\n" + text, TrainConfig, where="test")


def test_a_group_smaller_than_a_batch():
    with pytest.raises(ValueError, match="each of 30 groups has about 33 of 1000"):
        plan_of(correlation={"kind": "banded", "bands": 30})
