"""Runs protected systems and hands over the adversary's view: the only room that reaches down.

Everything here drives the production path of the floors below; nothing is simulated. What the
adversary sees goes into a view of :mod:`attacks.threat`; what only the experimenter knows goes
into a truth, which is for :mod:`attacks.scoring` alone.
"""

from attacks.targets.aggregation import AggregationSetup, ClearSum, ClearUpdate, SecretShared
from attacks.targets.canaries import CanaryConfig
from attacks.targets.frame import (
    Choices,
    Coins,
    Draft,
    EngineTrace,
    Protection,
    Scene,
    Target,
    Task,
    Texts,
    Truth,
)
from attacks.targets.inference import (
    InferenceSetup,
    NoisedSplit,
    PlainSplit,
    check_inference,
    split_target,
)
from attacks.targets.setup import Setup, prepare
from attacks.targets.training import DpSgd, NoProtection, TrainingSetup
from privlm.config import ConfigError, decode_config, load_config
from privlm.data import DataError
from privlm.progress import Watch, watching
from protocols.randomness import Stream

__all__ = [
    "AggregationSetup",
    "CanaryConfig",
    "Choices",
    "ClearSum",
    "ClearUpdate",
    "Coins",
    "ConfigError",
    "DataError",
    "DpSgd",
    "Draft",
    "EngineTrace",
    "InferenceSetup",
    "NoProtection",
    "NoisedSplit",
    "PlainSplit",
    "Protection",
    "Scene",
    "SecretShared",
    "Setup",
    "Target",
    "Task",
    "Texts",
    "TrainingSetup",
    "Truth",
    "Watch",
    "check_inference",
    "decode_config",
    "fresh_stream",
    "load_config",
    "prepare",
    "secret_key",
    "split_target",
    "watching",
]


def fresh_stream(label: str) -> Stream:
    """Fresh secret randomness."""
    return Stream.fresh(label)


def secret_key(label: str) -> bytes:
    """A fresh 256-bit key."""
    return Stream.fresh(label).bytes(32)
