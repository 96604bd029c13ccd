"""Two processes release what one would: the same sum, and its noise once.

Statistical tests run on a fixed seed; each states the false-alarm probability it would have on a
fresh one. The processes run ``distributed_worker.py``.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_worker import (
    BATCHES,
    BOUND,
    EXPECTED_BATCH_SIZE,
    NOISE_MULTIPLIER,
    STEPS,
    Tied,
    examples,
    loss,
    plan,
)
from safetensors.torch import load_file
from scipy import stats

from privlm.dp.clipping import ClippedSum, FlatClipping, PerExampleClipping, PerLayerClipping
from privlm.dp.distributed import Replicas
from privlm.dp.factorization import Banded, CorrelatedNoise
from privlm.dp.ledger import Ledger, read_ledger
from privlm.dp.releases import Releases
from privlm.dp.sampling import CyclicPoissonSampler
from privlm.dp.training import private_gradients
from protocols.randomness import Stream

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = WORKER.parents[2]
RANKS = (0, 1)
NOISE_STD = NOISE_MULTIPLIER * BOUND
FALSE_ALARM = 1e-6


def environment(**more: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}}
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return plain | quiet | more


def run_ranks(scenario: str, folder: Path, seconds: float, **more: str) -> list[int]:
    """Exit codes of both processes, which are gone afterwards, come what may."""
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, scenario, folder, str(rank), "2"],
            env=environment(**more),
            start_new_session=True,
        )
        for rank in RANKS
    ]
    try:
        return [process.wait(seconds) for process in started[: 1 if more else 2]]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert run_ranks("sums,training,failures", folder, 120) == [0, 0]
    return folder


def outcome(folder: Path) -> tuple[list[dict], list[dict], Path]:
    tensors = [load_file(folder / f"{rank}.safetensors") for rank in RANKS]
    words = [json.loads((folder / f"{rank}.json").read_text()) for rank in RANKS]
    return tensors, words, folder


@pytest.fixture(scope="module")
def sums(ran):
    return outcome(ran / "sums")


@pytest.fixture(scope="module")
def training(ran):
    return outcome(ran / "training")


@pytest.fixture(scope="module")
def failures(ran):
    return outcome(ran / "failures")


def whole(tensors: list[dict], where: str, shapes: list[torch.Size], kind: str) -> torch.Tensor:
    """What the processes' shards make up, flat and without padding."""
    if kind == "replicas":
        shards = [t[f"{where}/0"] for t in tensors]
        assert len({len(shard) for shard in shards}) == 1
        return torch.cat(shards)[: sum(shape.numel() for shape in shapes)]
    parts = [torch.cat([t[f"{where}/{i}"] for t in tensors]) for i in range(len(shapes))]
    assert [part.shape for part in parts] == shapes
    return torch.cat([part.flatten() for part in parts])


def shapes_of(model: torch.nn.Module) -> list[torch.Size]:
    return [p.shape for p in model.parameters()]


@pytest.mark.parametrize("rule", ["flat", "layers"])
@pytest.mark.parametrize("name", ["plain", "odd", "checkpointed"])
@pytest.mark.parametrize("kind", ["replicas", "shards"])
@pytest.mark.filterwarnings("ignore:Sine uses its parameters")
def test_two_processes_sum_what_one_does(sums, kind, name, rule):
    """Catches examples lost or taken twice, fillers that count, shards put together wrongly."""
    tensors, words, _ = sums
    model = Tied(odd=name == "odd").double()
    clipping = {"flat": FlatClipping(BOUND), "layers": PerLayerClipping(BOUND)}[rule]
    with PerExampleClipping(model, loss, clipping, None) as alone:
        for batch, which in BATCHES.items():
            truth = alone.clipped_sum(examples()[list(which)])
            expected = torch.cat([value.flatten() for value in truth.values])
            where = f"{kind}/{name}/{rule}/{batch}"
            total = whole(tensors, where, shapes_of(model), kind)
            assert (total - expected).norm() <= 1e-9 * expected.norm()
            for rank in RANKS:
                assert words[rank][where] == pytest.approx(
                    [truth.examples, truth.unclipped, truth.loss], rel=1e-12
                )


def test_the_sums_are_not_trivial(sums):
    """Some examples are clipped and some are not, and every process adds something."""
    tensors, words, _ = sums
    examples_of_all, _, _ = words[0]["shards/plain/flat/all"]
    assert examples_of_all == len(BATCHES["all"])
    total = whole(tensors, "shards/plain/flat/all", shapes_of(Tied()), "shards")
    assert 1.0 < float(total.norm()) <= examples_of_all * BOUND


def test_bf16_shards_err_as_bf16_does(sums):
    """Mixed precision: FSDP gathers bf16 weights; sums lie near those of float32."""
    tensors, _, _ = sums
    model = Tied()
    total = whole(tensors, "bf16", shapes_of(model), "shards")
    with PerExampleClipping(model, loss, BOUND, None) as alone:
        truth = alone.clipped_sum(examples()[:11])
    expected = torch.cat([value.flatten() for value in truth.values])
    assert 0 < (total - expected).norm() / expected.norm() < 0.05


def noise_of(training, kind: str, variant: str, step: int) -> list[np.ndarray]:
    """What each process added to its shard of the sum."""
    tensors, _, _ = training
    where = f"{kind}/{variant}"
    return [
        # the sum was normalised after it was noised
        (t[f"{where}/noised {step}"] * EXPECTED_BATCH_SIZE - t[f"{where}/sum {step}"]).numpy()
        for t in tensors
    ]


def accepts(noise: np.ndarray, std: float) -> bool:
    """Two-sided chi-square test of the variance at level ``FALSE_ALARM``."""
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], noise.size)
    return bool(low <= np.square(noise / std).sum() <= high)


@pytest.mark.parametrize("variant", ["plain", "empty"])
@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_the_noise_has_the_variance_of_one_process(training, kind, variant):
    """False alarms below 1e-6 each. Noise at full shape in both processes would show as σ·√2."""
    noise = np.concatenate(
        [part for step in range(STEPS) for part in noise_of(training, kind, variant, step)]
    )
    assert noise.size >= 3 * 3000
    assert accepts(noise, NOISE_STD)
    assert not accepts(noise, NOISE_STD / 2**0.5)
    assert not accepts(noise, NOISE_STD * 2**0.5)


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_shards_and_steps_share_no_noise(training, kind):
    """Correlations of 1500 normals and more stay below 0.15; false alarms below 1e-8 each.

    Sharded sums differ in their tensors' sizes, and so would their noise from one keystream: for
    them see ``test_shards_draw_other_noise``.
    """
    parts = [part for step in range(STEPS) for part in noise_of(training, kind, "plain", step)]
    for i, one in enumerate(parts):
        for other in parts[:i]:
            length = min(len(one), len(other))
            assert length >= 1500
            assert abs(np.corrcoef(one[:length], other[:length])[0, 1]) < 0.15


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_correlated_noise_is_correlated_within_a_shard(training, kind):
    """Step by step as one process's mechanism: deviation and correlation of steps 0 and 1.

    Deviations within 10%, correlation within 0.1 of a simulation's 20000 entries; false alarms
    below 1e-6.
    """
    mechanism = CorrelatedNoise(Banded(bands=2), NOISE_MULTIPLIER, STEPS)
    zeros = ClippedSum((torch.zeros(20000, dtype=torch.float64),), BOUND)
    simulated = [
        mechanism.release(zeros, step, Stream(bytes(32), "simulation"))[0].numpy()
        for step in range(STEPS)
    ]
    seen = [np.concatenate(noise_of(training, kind, "correlated", step)) for step in range(STEPS)]
    for step in range(STEPS):
        assert seen[step].std() == pytest.approx(simulated[step].std(), rel=0.1)
    expected = np.corrcoef(simulated[0], simulated[1])[0, 1]
    assert expected < -0.3
    assert np.corrcoef(seen[0], seen[1])[0, 1] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("variant", ["plain", "empty", "correlated"])
@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_all_processes_have_one_model_afterwards(training, kind, variant):
    """Bitwise; replicas began with other parameters in each. And the model moved."""
    tensors, words, _ = training
    start = [p.detach() for p in Tied().double().parameters()]
    for i, before in enumerate(start):
        ours, theirs = (t[f"{kind}/{variant}/after/{i}"] for t in tensors)
        assert torch.equal(ours, theirs)
        assert ours.shape == before.shape
        assert not torch.equal(ours, before)
    assert [w[f"{kind}/{variant}"] for w in words] == [STEPS - 1] * 2


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_the_optimiser_gets_the_release_and_nothing_else(training, kind):
    """Plain SGD: start − 0.1 Σ release is the end, so shards went to where they belong."""
    tensors, _, _ = training
    where = f"{kind}/plain"
    before = torch.cat([p.detach().flatten() for p in Tied().double().parameters()])
    shapes = shapes_of(Tied())
    for step in range(STEPS):
        for t in tensors:
            split = t[f"{where}/noised {step}"]
            if kind == "shards":
                rows = [local_shape(shape, tensors.index(t)) for shape in shapes]
                for i, piece in enumerate(split.split([s.numel() for s in rows])):
                    t[f"step {step}/{i}"] = piece.view(rows[i])
            else:
                t[f"step {step}/0"] = split
        before -= 0.1 * whole(tensors, f"step {step}", shapes, kind)
    after = torch.cat([tensors[0][f"{where}/after/{i}"].flatten() for i in range(len(shapes))])
    assert torch.allclose(after, before, rtol=0, atol=1e-12)


def local_shape(shape: torch.Size, rank: int) -> torch.Size:
    rows = -(-shape[0] // 2)
    return torch.Size([min(rows, max(0, shape[0] - rank * rows)), *shape[1:]])


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_the_ledger_counts_each_step_once(training, kind):
    history = read_ledger(training[2] / f"{kind}.jsonl")
    assert [history.steps(run) for run in ("plain", "empty", "correlated")] == [STEPS] * 3


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_an_error_in_one_process_stops_both_and_releases_nothing(failures, kind):
    """A NaN in process 1, a spent budget in process 0; afterwards the group works on."""
    _, words, folder = failures
    assert [w[f"{kind}/nan"][0] for w in words] == ["IncompleteSum", "NonFiniteGradient"]
    assert [w[f"{kind}/budget"][0] for w in words] == ["BudgetExceeded", "IncompleteSum"]
    assert [w[f"{kind}/after"] for w in words] == [["", ""]] * 2
    assert [w[f"{kind}/run"] for w in words] == [["", ""]] * 2
    taken = read_ledger(folder / f"{kind} budget.jsonl").steps(f"{kind} budget")
    assert 0 < taken < STEPS
    assert [w[f"{kind} budget steps"] for w in words] == [taken] * 2


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_processes_that_disagree_are_stopped(failures, kind):
    """Other records in each, and other randomness in each: both would break the sampling."""
    _, words, _ = failures
    for w in words:
        assert w[f"{kind}/records"][0] == "ProcessesDiffer"
        assert w[f"{kind}/stream"][0] == "ProcessesDiffer"


def test_replicas_that_drifted_are_noticed(failures):
    """By less than anything but a digest sees."""
    for w in failures[1]:
        kind, message = w["drift"]
        assert kind == "ProcessesDiffer"
        assert "blocks.1.scale" in message


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_a_counted_step_is_not_noised_anew(failures, kind):
    for w in failures[1]:
        assert w[f"{kind}/again"][0] == "ValueError"
        assert "go on at step 3" in w[f"{kind}/again"][1]


def test_models_of_the_other_kind_are_refused(failures):
    for w in failures[1]:
        assert "use Shards" in w["wrong group"][1]
        assert "embedding.weight is not sharded" in w["not sharded"][1]
        assert "made of another model" in w["other model"][1]


@pytest.mark.parametrize(
    ("kind", "how"),
    [("replicas", "dies"), pytest.param("shards", "sleeps", marks=pytest.mark.slow)],
)
def test_a_lost_process_stops_the_other_in_time(tmp_path, kind, how):
    """Which waits for 4 s at most, and has not released the step that it could not finish."""
    assert run_ranks("death", tmp_path, 60, KIND=kind, HOW=how) == [5]
    words = json.loads((tmp_path / "death" / "0.json").read_text())
    assert words["error"]
    assert words["seconds"] < 15
    assert read_ledger(tmp_path / "death" / "ledger.jsonl").steps("r") == 1


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, WORKER, "training", tmp_path],
        env=environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert read_ledger(tmp_path / "training" / "shards.jsonl").steps("plain") == STEPS


class TestInOneProcess:
    def test_only_the_first_examples_count(self):
        """The fillers that keep processes in step."""
        model = Tied().double()
        with PerExampleClipping(model, loss, BOUND, 2) as clipping:
            some = clipping.clipped_sum(examples()[:5])
            filled = clipping.clipped_sum(examples()[:8], counted=5)
            none = clipping.clipped_sum(examples()[:3], counted=0)
        for a, b in zip(some.values, filled.values, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert (filled.examples, filled.unclipped) == (some.examples, some.unclipped)
        assert filled.loss == pytest.approx(some.loss)
        assert all(not value.any() for value in none.values)

    def test_without_torchrun_there_is_no_group(self):
        with pytest.raises(ValueError, match="start with torchrun"):
            Replicas(Tied())

    def test_shards_draw_other_noise(self, tmp_path):
        """Two processes with one stream, and nothing but the number of the shard between them."""
        released = []
        for shard in (0, 1, None):
            with Ledger(tmp_path / f"{shard}.jsonl", dataset="d") as ledger:
                releases = Releases(plan(), ledger, "r", Stream(bytes(32), "run"), shard=shard)
                zeros = (torch.zeros(8, dtype=torch.float64),)
                released.append(releases.release(ClippedSum(zeros, BOUND))[0])
        assert not any(torch.equal(released[i], released[j]) for i, j in [(0, 1), (0, 2), (1, 2)])

    def test_correlated_noise_does_not_go_on_in_another_group(self, tmp_path):
        """The steps before may have been noised by another number of processes."""
        correlated = plan(correlation=Banded(bands=2), sampler=CyclicPoissonSampler(0.9, cycle=2))
        with Ledger(tmp_path / "l.jsonl", dataset="d") as ledger:
            ledger.record("r", correlated)
            with pytest.raises(ValueError, match="begin a new run"):
                Releases(correlated, ledger, "r", Stream(bytes(32), "run"), shard=0)

    def test_canaries_are_refused(self, tmp_path):
        """They watch whole sums, and would be hidden once for every process."""
        with (
            Ledger(tmp_path / "l.jsonl", dataset="d") as ledger,
            pytest.raises(ValueError, match="audit in one process"),
        ):
            Releases(plan(), ledger, "r", Stream(bytes(32), "run"), shard=0, canaries=object())

    def test_a_ledger_for_each_process_is_refused(self, tmp_path):
        model = Tied()
        with (
            Ledger(tmp_path / "l.jsonl", dataset="d") as ledger,
            pytest.raises(ValueError, match=r"group\.ledger"),
            private_gradients(
                model,
                loss,
                examples(),
                plan(),
                ledger,
                run="r",
                stream=Stream(bytes(32), "run"),
                group=object(),
            ),
        ):
            pass
