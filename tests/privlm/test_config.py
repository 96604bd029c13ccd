"""Every unusable configuration is refused with the file, the key and the reason."""

import msgspec
import pytest

from privlm.config import (
    MAX_CONFIG_BYTES,
    ConfigError,
    CorpusConfig,
    PrivacyConfig,
    TrainConfig,
    decode_config,
    load_config,
)


def decode(text: str | bytes) -> TrainConfig:
    return decode_config(text, TrainConfig, where="run.yaml")


def test_the_shortest_configuration_is_a_budget():
    config = decode("privacy: {target_epsilon: 8}")
    assert config == TrainConfig(privacy=PrivacyConfig(target_epsilon=8))
    assert decode("privacy: null").privacy is None


def test_every_value_survives_writing_and_reading():
    config = decode("privacy: {noise_multiplier: 1.5, delta: 1e-6}\nepochs: 0.5\nledger: /x/l")
    assert msgspec.json.decode(msgspec.json.encode(config), type=TrainConfig) == config


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "+1e-05", "0.00001", "1.e-5", ".1e-4"])
def test_numbers_that_yaml_takes_for_text(number):
    config = decode(f"privacy: {{target_epsilon: 1, delta: {number}}}")
    assert config.privacy == PrivacyConfig(target_epsilon=1, delta=1e-5)


def test_anchors_and_merges():
    config = decode(
        "privacy: null\n"
        "optimizer: &o {kind: adamw, learning_rate: 0.1}\n"
        "public: {epochs: 1, optimizer: {<<: *o, learning_rate: 0.2}}\n"
    )
    assert (config.optimizer.learning_rate, config.public.optimizer.learning_rate) == (0.1, 0.2)
    assert config.public.optimizer.kind == "adamw"


P = "privacy: null\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"privacy: missing.*target_epsilon.*privacy: null"),
        ("# nothing\n", "privacy: missing"),
        ("privacy: {}", "privacy: give either target_epsilon or noise_multiplier"),
        ("privacy: {target_epsilon: 1, noise_multiplier: 1}", "privacy: .*not both"),
        ("privacy: {epsilon: 1}", r"privacy\.epsilon: unknown key"),
        ("privacy: {target_epsilon: -1}", r"privacy\.target_epsilon: .*> 0"),
        ("privacy: {target_epsilon: .inf}", r"privacy\.target_epsilon: "),
        ("privacy: {target_epsilon: .nan}", r"privacy\.target_epsilon: "),
        ("privacy: {target_epsilon: '3'}", r"privacy\.target_epsilon: .*got `str`"),
        ("privacy: {target_epsilon: yes}", r"privacy\.target_epsilon: .*got `bool`"),
        ("privacy: {noise_multiplier: 0}", r"privacy\.noise_multiplier: "),
        ("privacy: {noise_multiplier: 1, delta: 1}", r"privacy\.delta: .*< 1"),
        ("privacy: {noise_multiplier: 1, max_grad_norm: .inf}", r"privacy\.max_grad_norm: "),
        ("privacy: 8", "privacy: Expected"),
        (P + "epoch: 3", "epoch: unknown key; check its spelling"),
        (P + "epochs: .inf", "epochs: "),
        (P + "epochs: 1e300", "epochs: "),
        (P + "epochs: 0", "epochs: "),
        (P + "batch_size: 1.5", "batch_size: .*got `float`"),
        (P + "batch_size: 0", "batch_size: .*>= 1"),
        (P + "microbatch_size: 5000", "microbatch_size: .*<= 1024"),
        ("privacy: {noise_multiplier: 1, max_grad_norm: 1e-9}", r"privacy\.max_grad_norm: "),
        (P + "seed: 99999999999999999999999", "seed: "),
        (P + "ledger: ''", "ledger: "),
        (P + "corpus: {source: ''}", r"corpus\.source: "),
        (P + "corpus: {source: 3}", r"corpus\.source: .*got `int`"),
        (P + "corpus: {unit: user}", r"corpus\.unit: .*'user'"),
        (P + "corpus: {context: 1}", r"corpus\.context: .*>= 2"),
        (P + "corpus: {context: 1000000000000}", r"corpus\.context: "),
        (P + "corpus: {public_share: 0}", r"corpus\.public_share: "),
        (P + "corpus: [a]", "corpus: .*got `array`"),
        (P + "model: {width: 10, heads: 3}", "model: width must be a multiple of 2 . heads"),
        (P + "model: {layers: 1000000}", r"model\.layers: "),
        (P + "tokenizer: {vocab_size: 256}", r"tokenizer\.vocab_size: .*>= 257"),
        (P + "optimizer: {}", r"optimizer\.learning_rate: missing"),
        (P + "optimizer: {learning_rate: .nan}", "optimizer: learning_rate must be positive"),
        (P + "optimizer: {learning_rate: .inf}", "optimizer: learning_rate must be positive"),
        (P + "optimizer: {learning_rate: 1, momentum: 1}", "optimizer: momentum must lie"),
        (P + "optimizer: {learning_rate: 1, weight_decay: .nan}", "optimizer: weight_decay must"),
        (
            P + "optimizer: {kind: adamw, learning_rate: 1, momentum: 0.9}",
            "optimizer: momentum belongs to sgd",
        ),
        (P + "public: {optimizer: {learning_rate: 0}}", r"public\.optimizer: learning_rate"),
        (P + P, "not valid YAML: .*key 'privacy' stands twice"),
        ("1: 2", "not valid YAML: .*key 1 is not text"),
        ("privacy: [", "not valid YAML"),
        ("privacy: {a: !!python/object:os.system {}}", "not valid YAML"),
        ("privacy: !!map x", "not valid YAML"),
        ("at: 2024-13-01", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("- privacy", "not a list of keys"),
        ("just text", "not a list of keys"),
        ("[" * 5000, "nested too deeply|not valid YAML"),
        ("x: &a [*a]", "x: unknown key"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"a: \xc3\x28", "not valid YAML"),
    ],
)
def test_a_refused_configuration_names_file_key_and_reason(text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        decode(text)
    assert str(refused.value).startswith("run.yaml: ")
    assert "\n" not in str(refused.value)


def test_files(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read: No such file"):
        load_config(path, TrainConfig)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path, TrainConfig)
    path.write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="is it a config file"):
        load_config(path, TrainConfig)
    path.write_text("source: letters.txt\npublic_source: pydoc-topics")
    assert load_config(path, CorpusConfig).source == "letters.txt"
