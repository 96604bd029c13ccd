"""The command line: results on standard output, one sentence and an exit code for the rest."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from statistics import NormalDist

import click
import pytest

import privlm.cli
import privlm.runs
from privlm.cli import app, main
from privlm.dp.ledger import Ledger

COMMAND = [sys.executable, "-c", "from privlm.cli import main; main()"]


@pytest.fixture
def privlm_(monkeypatch, capsys):
    """Call the command line in this process: arguments -> (exit code, stdout, stderr)."""
    old = signal.getsignal(signal.SIGINT)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["privlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return stopped.value.code, said.out, said.err

    yield call
    signal.signal(signal.SIGINT, old)


@pytest.fixture
def project(tmp_path):
    rng = random.Random(0)
    pangram = "the quick brown fox jumps over a lazy dog while seven wizards mix potions"
    words = pangram.split()
    for part, count in (("docs", 5), ("public", 2), ("test", 2)):
        (tmp_path / part).mkdir()
        for number in range(count):
            text = " ".join(rng.choice(words) for _ in range(40))
            (tmp_path / part / f"{part}{number}.txt").write_text(text)
    (tmp_path / "run.yaml").write_text(
        "privacy: {noise_multiplier: 2.0}\n"
        f"corpus: {{source: {tmp_path}/docs, public_source: {tmp_path}/public, "
        f"test_source: {tmp_path}/test, context: 16}}\n"
        "tokenizer: {kind: byte}\n"
        "model: {width: 8, layers: 1, heads: 1}\n"
        "public: {epochs: 1}\n"
        "epochs: 1\n"
        "batch_size: 16\n"
    )
    return tmp_path


class TestShape:
    def test_version_and_help(self, privlm_):
        code, out, _ = privlm_("--version")
        assert (code, out.strip()) == (0, privlm.cli.importlib.metadata.version("privlm"))
        code, out, _ = privlm_("--help")
        assert code == 0
        assert all(command in out for command in ("account", "train", "export", "audit"))
        for command in ("account", "train"):
            code, out, _ = privlm_(command, "--help")
            assert code == 0
            assert "--json" in out
            assert "privacy: {target_epsilon: 8, delta: 1e-5}\n" in out or command != "train"

    def test_every_option_is_explained(self):
        for command in ("account", "train", "export"):
            for parameter in typer_command(command).params:
                assert isinstance(parameter, click.Argument) or parameter.help

    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys, privlm.cli; privlm.cli._add_commands(); "
            "print(sorted({'torch', 'numpy', 'scipy', 'opacus', 'dp_accounting'} & {*sys.modules}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, timeout=60, check=True
        )
        assert done.stdout.strip() == b"[]"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["fly"],
            ["train"],
            ["train", "run.yaml"],
            ["account", "--steps", "x", "--sample-rate", "0.1", "--delta", "0.1"],
            ["account", "--steps", "0", "--sample-rate", "0.1", "--delta", "0.1"],
            ["account", "--steps", "10000000000", "--sample-rate", "0.1", "--delta", "0.1"],
            ["account", "--steps", "1", "--sample-rate", "1.1", "--delta", "0.1"],
            ["account", "--steps", "1", "--sample-rate", "0.1"],
            ["account", "--fast"],
        ],
    )
    def test_usage_errors(self, privlm_, arguments):
        code, out, err = privlm_(*arguments)
        assert (code, out) == (2, "")
        assert "Usage: privlm" in err

    def test_a_broken_plugin_breaks_nothing_else(self, privlm_, monkeypatch):
        class Broken:
            name = "audit2"

            def load(self):
                raise ImportError("no module named ails")

        monkeypatch.setattr(privlm.cli.importlib.metadata, "entry_points", lambda group: [Broken()])
        code, _, err = privlm_("--version")
        assert code == 0
        assert "warning: no command 'audit2': no module named ails" in err


def typer_command(name: str) -> click.Command:
    import typer.main

    return typer.main.get_command(app).commands[name]


class TestLedger:
    @pytest.fixture
    def folder(self, tmp_path):
        from privlm.dp.plan import Plan
        from privlm.dp.sampling import PoissonSampler

        plan = Plan(
            sampler=PoissonSampler(0.01),
            steps=120,
            noise_multiplier=0.7,
            expected_batch_size=1.0,
            delta=1e-5,
        )
        with Ledger(tmp_path / "l.jsonl", dataset="d" * 64) as ledger:
            ledger.record("first", plan, count=120)
            ledger.record("second", plan, count=3)
            yield tmp_path  # a run is writing while the ledger is listed

    def test_every_run_and_their_sum(self, privlm_, folder):
        code, out, _ = privlm_("ledger", folder, "--json")
        (data_set,) = json.loads(out)["data_sets"]
        assert code == 0
        assert [run["steps"] for run in data_set["runs"]] == [120, 3]
        assert data_set["runs"][0]["epsilon"] == pytest.approx(2.4612381, abs=1e-4)
        assert data_set["epsilon"] > data_set["runs"][0]["epsilon"]
        code, out, _ = privlm_("ledger", folder / "l.jsonl", "--delta", 1e-5)
        assert code == 0
        assert "first: 120 steps, ε = 2.462 (poisson at noise multiplier 0.7)" in out

    def test_what_cannot_be_read(self, privlm_, folder):
        (folder / "other.jsonl").write_text("{}\n")
        code, out, err = privlm_("ledger", folder)
        assert code == 2
        assert "first: 120 steps" in out
        assert "other.jsonl, line 1: not a ledger entry" in err.splitlines()[-1]
        assert privlm_("ledger", folder / "none")[0] == 2
        code, _, err = privlm_("ledger", folder, "--delta", 2)
        assert (code, "delta must lie in (0, 1)" in err) == (2, True)


class TestAccount:
    @pytest.mark.parametrize(
        ("options", "sampler", "epsilon"),
        [
            (
                "truncated-poisson --sample-rate 0.01 --max-batch-size 128 --population 10000 "
                "--steps 1000 --delta 1e-6 --noise-multiplier 1",
                "truncated-poisson",
                5.2208,
            ),
            (
                "cyclic-poisson --sample-rate 0.01 --cycle 4 --bands 4 --steps 480 --delta 1e-5 "
                "--noise-multiplier 0.7",
                "cyclic-poisson",
                2.4612381,
            ),
        ],
    )
    def test_other_samplers(self, privlm_, options, sampler, epsilon):
        code, out, _ = privlm_("account", "--sampler", *options.split(), "--json")
        answer = json.loads(out)
        assert code == 0
        assert answer["sampler"]["type"] == sampler
        assert answer["epsilon"] == pytest.approx(epsilon, abs=1e-3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--sampler fixed-size --population 10", "fixed-size needs --batch-size"),
            ("--sampler balls-in-bins --cycle 3 --sample-rate 0.1", "does not take --sample-rate"),
            ("", "--sampler poisson needs --sample-rate"),
            ("--sample-rate 0.1 --bands 3", "no amplification is proven"),
            ("--sample-rate 0.1 --users els", "--users and --examples-per-user together"),
        ],
    )
    def test_options_that_do_not_go_together(self, privlm_, options, message):
        base = ("account", "--steps", 10, "--delta", 1e-5, "--noise-multiplier", 1)
        code, out, err = privlm_(*base, *options.split())
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]

    def test_users_and_searches_cost_more(self, privlm_):
        def epsilon(*more):
            code, out, _ = self.account(privlm_, "--noise-multiplier", 2, *more, "--json")
            assert code == 0
            return json.loads(out)["epsilon"]

        alone = epsilon()
        assert epsilon("--users", "uls", "--examples-per-user", 5) == alone
        assert epsilon("--users", "els", "--examples-per-user", 2) > 1.5 * alone
        assert epsilon("--replace-one") > 1.5 * alone
        assert epsilon("--trials", 5) > 1.5 * alone

    def test_how_many_steps_a_budget_allows(self, privlm_):
        _, out, _ = self.account(privlm_, "--noise-multiplier", 0.7, "--target-epsilon", 2.462)
        assert "ε = 2.462 allows 12" in out

    def account(self, privlm_, *more):
        return privlm_("account", "--sample-rate", 0.01, "--steps", 120, "--delta", 1e-5, *more)

    def test_what_a_noise_multiplier_costs(self, privlm_):
        """The vector of dp_accounting's PLD; see test_dp_accounting.py."""
        code, out, err = self.account(privlm_, "--noise-multiplier", 0.7, "--json")
        answer = json.loads(out)
        assert code == 0
        assert answer["epsilon"] == pytest.approx(2.4612381, abs=1e-4)
        assert (answer["accountant"], answer["delta"], answer["steps"]) == ("PLD", 1e-5, 120)
        assert "accounting" in err
        code, out, _ = self.account(privlm_, "--noise-multiplier", 0.7)
        assert code == 0
        assert out.startswith("ε = 2.4613 at δ = 1e-05 by PLD")

    def test_what_a_budget_takes(self, privlm_):
        """One Gaussian release: δ(ε) = Φ(1/2σ - εσ) - exp(ε) Φ(-1/2σ - εσ) (Balle & Wang 2018)."""
        release = ["account", "--sample-rate", 1, "--steps", 1, "--delta", 1e-5]
        release += ["--target-epsilon", 1.0]
        _, out, _ = privlm_(*release, "--noise-multiplier", 5, "--json")
        answer = json.loads(out)
        sigma = answer["noise_multiplier_for_target"]
        phi = NormalDist().cdf
        delta = phi(0.5 / sigma - sigma) - math.e * phi(-0.5 / sigma - sigma)
        assert delta == pytest.approx(1e-5, rel=0.01)
        assert answer["noise_multiplier"] == 5
        assert answer["epsilon"] < 1.0
        _, out, _ = privlm_(*release)
        assert f"ε = 1 takes a noise multiplier of {sigma:.4f}" in out

    @pytest.mark.parametrize("sigma", ["0", "1e-300"])
    def test_no_noise_is_null_in_json(self, privlm_, sigma):
        code, out, _ = self.account(privlm_, "--noise-multiplier", sigma, "--json")
        assert code == 0
        assert json.loads(out, parse_constant=pytest.fail)["epsilon"] is None
        assert self.account(privlm_, "--noise-multiplier", sigma)[1].startswith("ε = ∞")

    def test_who_answered_when_pld_does_not_fit(self, privlm_):
        code, out, _ = self.account(privlm_, "--noise-multiplier", 0.01)
        assert code == 0
        assert "by RDP" in out
        assert "Rényi DP answered, because PLD did not fit" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give --noise-multiplier, --target-epsilon, or both"),
            (["--noise-multiplier", "-1"], "noise_multiplier must be at least 0"),
            (["--noise-multiplier", "nan"], "noise_multiplier must be at least 0"),
            (["--noise-multiplier", "inf"], "noise_multiplier must be at least 0"),
            (["--target-epsilon", "0"], "target_epsilon must be positive"),
            (["--target-epsilon", "inf"], "target_epsilon must be positive and finite"),
            (["--noise-multiplier", "1", "--delta", "0"], "delta must lie in (0, 1)"),
            (["--noise-multiplier", "1", "--delta", "nan"], "delta must lie in (0, 1)"),
            (["--noise-multiplier", "1", "--sample-rate", "0"], "must lie in (0, 1]"),
            (["--noise-multiplier", "1", "--sample-rate", "nan"], "must lie in (0, 1]"),
            (
                ["--target-epsilon", "1e-9", "--delta", "1e-300"],
                "cannot be reached: even a noise multiplier of",
            ),
        ],
    )
    def test_bad_numbers(self, privlm_, arguments, message):
        code, out, err = self.account(privlm_, *arguments, "--json")
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("error: ")


class TestTrain:
    def test_from_the_shell(self, project):
        """Private and resumed, in processes of their own; standard output holds results alone."""
        arguments = [*COMMAND, "train", "run.yaml", "--out", "new/out"]

        def shell(*options):
            return subprocess.run(
                [*arguments, *options], cwd=project, capture_output=True, timeout=120, check=False
            )

        first = shell("--json")
        assert first.returncode == 0, first.stderr
        result = json.loads(first.stdout)
        assert b"private training: " in first.stderr
        again = shell("--resume")
        assert again.returncode == 0, again.stderr
        assert b"private training" not in again.stderr
        text = again.stdout.decode()
        assert "DP per example; an example is a block of 16 tokens\n" in text
        assert f"{result['bits_per_byte']:.3f} bits per byte" in text
        refused = shell()
        assert (refused.returncode, refused.stdout) == (2, b"")
        assert refused.stderr.count(b"\n") == 1
        record = json.loads((project / "new/out/run.json").read_text())
        with Ledger(project / "new/out/ledger.jsonl", dataset=record["dataset"]) as ledger:
            assert ledger.steps(record["run"]) == result["steps"] >= 2

    def test_an_unprotected_run_says_so(self, project, privlm_):
        path = project / "run.yaml"
        path.write_text(path.read_text().replace("{noise_multiplier: 2.0}", "null"))
        code, out, _ = privlm_("train", path, "--out", project / "out")
        assert code == 0
        assert out.startswith("no guarantee: trained unprotected\n")
        assert "spent" not in out
        code, out, _ = privlm_("train", path, "--out", project / "out", "--resume", "--json")
        assert code == 0
        assert json.loads(out)["guarantee"] is None

    def test_refusals_are_one_line_and_exit_with_2(self, project, privlm_):
        (project / "bad.yaml").write_text("privacy: {epsilon: 8}")
        for arguments, message in (
            (["bad.yaml", "--out", "out"], "bad.yaml: privacy.epsilon: unknown key"),
            (["none.yaml", "--out", "out"], "none.yaml: cannot be read: No such file"),
            (["run.yaml", "--out", "run.yaml"], "run.yaml: cannot be made a folder"),
            (["run.yaml", "--out", "out", "--resume"], "out: there is no run to resume"),
            (["run.yaml", "--out", "docs"], "docs: the folder is not empty"),
        ):
            paths = [a if a.startswith("--") else project / a for a in arguments]
            code, out, err = privlm_("train", *paths, "--json")
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert err.startswith("error: ")
            assert message in err
        assert not (project / "out").exists()

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (OSError(28, "No space left on device", "/x/f"), 2, "/x/f: No space left.*; free some"),
            (PermissionError(13, "Permission denied", "/x/f"), 2, "/x/f: .*; choose another place"),
            (OSError("odd"), 2, "error: odd"),
            (MemoryError(), 2, "not enough memory; lower"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "not enough memory"),
            (privlm.runs.Interrupted("saved; add --resume"), 130, "saved; add --resume"),
            (KeyboardInterrupt(), 130, "interrupted before the run began; nothing was written"),
        ],
    )
    def test_what_goes_wrong_underneath(self, project, privlm_, monkeypatch, error, code, message):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(privlm.runs, "train_run", fail)
        said = privlm_("train", project / "run.yaml", "--out", project / "out", "--json")
        assert said[:2] == (code, "")
        assert said[2].strip().count("\n") == 0
        assert re.search(message, said[2])

    def test_a_defect_of_ours_is_not_dressed_up_as_bad_input(self, project, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("a defect")

        monkeypatch.setattr(privlm.runs, "train_run", fail)
        monkeypatch.setattr(
            sys, "argv", ["privlm", "train", str(project / "run.yaml"), "--out", "x"]
        )
        with pytest.raises(RuntimeError, match="a defect"):
            main()

    def test_sigterm_before_training_stops_like_ctrl_c(self, project):
        """The handler is in place as soon as the program runs, and gone once it returned."""
        process = subprocess.Popen(
            [*COMMAND, "train", "run.yaml", "--out", "out"],
            cwd=project,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        time.sleep(0.8)  # within the imports
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert b"interrupted" in err
        assert b"Traceback" not in err
        assert not (project / "out").exists()


class TestExport:
    @pytest.fixture
    def trained(self, project, privlm_):
        def train(**changes):
            path = project / "run.yaml"
            text = path.read_text()
            for old, new in changes.items():
                text = text.replace(old, new)
            path.write_text(text)
            assert privlm_("train", path, "--out", project / "out")[0] == 0
            return project / "out"

        return train

    def test_weights_and_card_alone(self, trained, project, privlm_):
        out = trained()
        code, said, _ = privlm_("export", out, "--out", project / "released", "--json")
        answer = json.loads(said)
        assert code == 0
        assert answer["format"] == "privlm"
        assert {p.name for p in (project / "released").iterdir()} == set(answer["files"])
        assert set(answer["files"]) == {
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        }
        result = json.loads((out / "result.json").read_text())
        assert answer["guarantee"] == result["guarantee"]
        assert answer["spent"]["epsilon"] == result["spent_on_data_set"]
        card = (project / "released" / "README.md").read_text()
        assert "Hyper-parameters: not stated" in card
        assert "No other run is on the ledger" in card
        weights = (project / "released" / "model.safetensors").read_bytes()
        assert weights == (out / "model.safetensors").read_bytes()
        again = privlm_("export", out, "--out", project / "released")
        assert again[0] == 2
        assert "the folder is not empty" in again[2]

    def test_an_unprotected_run_takes_a_word(self, trained, project, privlm_):
        out = trained(**{"{noise_multiplier: 2.0}": "null"})
        arguments = ("export", out, "--out", project / "released")
        code, said, err = privlm_(*arguments)
        assert (code, said) == (2, "")
        assert "add --insecure-no-guarantee" in err
        assert not (project / "released").exists()
        code, said, _ = privlm_(*arguments, "--insecure-no-guarantee")
        assert code == 0
        assert said.startswith("no guarantee")
        card = (project / "released" / "README.md").read_text()
        assert "without any protection" in card
        assert "ε" not in card

    def test_a_ledger_that_forgot_is_refused(self, trained, project, privlm_):
        out = trained()
        lines = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
        (out / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
        code, _, err = privlm_("export", out, "--out", project / "released")
        assert code == 2
        assert "does not hold the" in err
        assert not (project / "released").exists()

    def test_nothing_to_export(self, project, privlm_):
        code, _, err = privlm_("export", project / "none", "--out", project / "released")
        assert code == 2
        assert "run.json: cannot be read" in err


def test_main_puts_signal_handlers_back(privlm_):
    before = signal.getsignal(signal.SIGTERM)
    privlm_("--version")
    assert signal.getsignal(signal.SIGTERM) == before
