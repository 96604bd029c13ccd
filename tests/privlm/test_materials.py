"""What runs are made from: who is in which part, and what a batch is drawn from."""

import json

import pytest
import torch

from privlm.config import TrainConfig, decode_config
from privlm.dp import ExampleLevelSampling, Plan, PoissonSampler, UserLevelSampling
from privlm.materials import candidates, prepare, records_of
from privlm.models import loss_for
from privlm.privacy import PrivacyConfig
from protocols.randomness import Stream


@pytest.fixture
def stream():
    return Stream(b"m" * 32, "materials")


@pytest.fixture
def prepared(tmp_path):
    """Forty letters by ten users, four each."""
    lines = [
        {"id": f"letter {n}", "user": f"user {n % 10}", "text": f"{n} of user {n % 10}"}
        for n in range(40)
    ]
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def prepare_with(**privacy):
        settings = {
            "privacy": {"noise_multiplier": 1.0} | privacy,
            "corpus": {"source": str(path), "public_share": 0.3, "context": 16},
            "tokenizer": {"kind": "byte"},
            "model": {"width": 8, "layers": 1, "heads": 1},
        }
        return prepare(decode_config(json.dumps(settings), TrainConfig, where="test"))

    return prepare_with


def test_all_of_a_user_is_in_one_part_where_users_are_protected(prepared):
    """Else his public letters would train the base model, and his private ones be "protected"."""

    def parts(materials):
        examples = (materials.public, materials.private, materials.held_out.examples)
        return [set(part.users) for part in examples]

    public, private, test = parts(prepared(unit="user", examples_per_user=2))
    assert public.isdisjoint(private | test)
    assert private.isdisjoint(test)
    public, private, test = parts(prepared())
    assert public & private


def test_a_batch_is_drawn_from_examples_or_users(prepared):
    private = prepared().private

    def drawn(**keys):
        return candidates(private, PrivacyConfig(noise_multiplier=1.0, **keys))

    users = len(set(private.users))
    assert candidates(private, None) == drawn() == len(private)
    assert drawn(unit="user", examples_per_user=2) == users < len(private)
    most = max(private.users.count(user) for user in set(private.users))
    els = {"unit": "user", "user_sampling": "els"}
    assert users == drawn(**els, examples_per_user=1)
    assert drawn(**els, examples_per_user=most) == len(private)


@pytest.mark.parametrize("kind", [ExampleLevelSampling, UserLevelSampling])
def test_no_user_contributes_more_than_his_share(prepared, stream, kind):
    materials = prepared()
    plan = Plan(
        sampler=PoissonSampler(0.5),
        steps=1,
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        delta=1e-5,
        users=kind(1),
    )
    loss = loss_for(materials.model)
    records, unit_loss = records_of(materials.private, plan, loss, stream)
    everything = records.take(torch.arange(len(records)))
    users = len(set(materials.private.users))
    if kind is UserLevelSampling:
        assert len(records) == users
        assert everything["user_mask"].shape == (users, 1)
        assert unit_loss(materials.model, everything).shape == (users,)
    else:
        assert len(records) == users < len(materials.private)
        assert unit_loss is loss
