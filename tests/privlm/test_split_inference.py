"""A split model computes what the whole one does, and its server receives rows and nothing else.

Streams are fixed; a statistical test states the false-alarm probability it would have on a fresh
one.
"""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from privlm.models import TinyConfig, TinyDecoder, generate, next_token
from privlm.models.decoder import tempered
from privlm.split import (
    Cut,
    GaussianNoise,
    NonFiniteRows,
    Plain,
    RowBudgetSpent,
    Session,
    SplitClient,
    SplitServer,
    client_part,
    received_rows,
    run_in_memory,
    server_part,
)
from privlm.split.messages import ClientRows, End, pack_rows
from protocols.randomness import Stream
from protocols.transport import InMemoryNetwork
from protocols.wire import decode, encode

WIDTH, CONTEXT, VOCABULARY = 32, 24, 50
PROMPT = (7, 3, 3, 41, 0, 12, 49, 5)
CUT = Cut(1, 2)
NAME = Session(bytes(16), CUT, WIDTH, layers=3)
CUTS = [Cut(first, last) for first in range(3) for last in range(first + 1, 4)]


def tiny(**changes):
    config = {"width": WIDTH, "layers": 3} | changes
    generator = torch.Generator().manual_seed(4)
    model = TinyDecoder(TinyConfig(VOCABULARY, CONTEXT, **config), generator)
    return speaking(model, 0.2, generator)


@torch.no_grad()
def speaking(model, std, generator):
    """Small embeddings, large blocks: a tied head would otherwise only repeat the last token."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            own_std = 0.05 if name == "embed.weight" else std
            parameter.normal_(0.0, own_std, generator=generator)
    return model


def gpt2(training=False):
    transformers = pytest.importorskip("transformers")
    from privlm.models.huggingface import Gpt2Decoder

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).train(training)
    return speaking(Gpt2Decoder(model), 0.5, torch.Generator().manual_seed(5))


MODELS = {"tiny": tiny, "tied": lambda: tiny(tied_head=True, mlp="gelu"), "gpt2": gpt2}


@pytest.fixture
def stream():
    return Stream(bytes(range(32)), "test")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def parts(model):
    return client_part(model, CUT), server_part(model, CUT)


def honest_rows(client, tokens):
    return client.head(torch.tensor(tokens), 0, client.model.new_cache())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut.first}-{cut.last}")
def test_split_and_whole_model_agree_at_every_cut(name, cut, stream):
    whole = MODELS[name]()
    client, server = client_part(whole, cut), server_part(whole, cut)
    request = run_in_memory(client, server, PROMPT, Plain(), stream)
    expected_TV = whole(torch.tensor([PROMPT]))[0].detach()
    assert torch.allclose(request.client.logits_TV, expected_TV, atol=1e-5)
    assert request.client.tokens == []
    request = run_in_memory(client, server, PROMPT, Plain(), stream, max_new_tokens=12)
    written = generate(whole, torch.tensor([PROMPT]), 12)[0, len(PROMPT) :].tolist()
    assert request.client.tokens == written
    assert len(set(written)) > 2
    assert request.client.logits_TV is None
    assert request.outcome.unfinished == ()
    # One row a token but for the last, which nobody needs; a request and an answer each, the end.
    assert request.sent_TD.shape == (len(PROMPT) + 11, WIDTH)
    assert request.outcome.rounds == 2 * 12 + 1


@pytest.mark.parametrize("name", MODELS)
def test_each_part_holds_its_own_parameters_alone(name):
    whole, cut = MODELS[name](), Cut(1, 2)
    client, server = client_part(whole, cut).model, server_part(whole, cut).model
    every = {key: value.data_ptr() for key, value in whole.state_dict().items()}
    ours, theirs = (
        {key: value.data_ptr() for key, value in part.state_dict().items()}
        for part in (client, server)
    )
    assert set(theirs) == {key for key in every if key.startswith("blocks.1.")}
    assert ours | theirs == every
    assert not set(ours) & set(theirs)
    ids = torch.tensor([PROMPT])
    with pytest.raises(RuntimeError, match="held by the other party"):
        server.embed_tokens(ids)
    with pytest.raises(RuntimeError, match="held by the other party"):
        server.predict(torch.zeros(1, 1, WIDTH))
    with pytest.raises(RuntimeError, match="held by the other party"):
        client(ids)
    assert whole(ids).shape == (1, len(PROMPT), VOCABULARY)  # the model itself is untouched


def test_sessions_of_one_server_part_do_not_mix(parts, stream):
    client, server = parts
    alone = run_in_memory(client, server, PROMPT, Plain(), stream, max_new_tokens=4)
    asking, answering = [], []
    for number in range(2):
        session = dataclasses.replace(
            NAME, id=bytes([number]) * 16, client=f"client {number}", server=f"server {number}"
        )
        prompt = PROMPT if number == 0 else PROMPT[::-1]
        asking.append(SplitClient(session, client, prompt, Plain(), stream, max_new_tokens=4))
        answering.append(SplitServer(session, server, stream))
    outcome = InMemoryNetwork([*asking, *answering]).run()
    assert not outcome.errors
    assert asking[0].tokens == alone.client.tokens
    rows = received_rows(outcome.views["server 0"])
    assert torch.equal(rows, alone.sent_TD)


def test_the_server_receives_rows_and_the_end_and_nothing_that_depends_on_the_text(parts, stream):
    client, server = parts
    seen = []
    for prompt in (PROMPT, PROMPT[::-1]):
        asking = SplitClient(NAME, client, prompt, Plain(), stream, max_new_tokens=3)
        outcome = InMemoryNetwork([asking, SplitServer(NAME, server, stream)]).run()
        view = outcome.views["server"]
        assert not view.inputs
        messages = [decode(m.data, ClientRows, End, max_bytes=10_000) for m in view.received]
        starts = [(0, len(PROMPT)), (len(PROMPT), 1), (len(PROMPT) + 1, 1)]
        data = bytearray(b"".join(m.data for m in messages[:-1]))
        rows = torch.from_numpy(np.frombuffer(data, "<f4"))
        seen.append(rows)
        for message, (start, count) in zip(messages, starts, strict=False):
            assert (message.start, message.rows, message.width) == (start, count, WIDTH)
        # Put together from what is public and the rows: every byte is accounted for.
        pieces = rows.view(-1, WIDTH).split([count for _, count in starts])
        rebuilt = [
            pack_rows(ClientRows, NAME, start, piece)
            for (start, _), piece in zip(starts, pieces, strict=True)
        ]
        assert [m.data for m in view.received] == [*rebuilt, encode(End(session=NAME.digest))]
        tokens = (*prompt, *asking.tokens[:-1])
        honest = honest_rows(client, tokens)
        assert torch.allclose(rows.view(-1, WIDTH), honest, atol=1e-5)
    assert not torch.equal(*seen)


def test_plain_rows_are_the_views_rows(parts, stream):
    client, server = parts
    request = run_in_memory(client, server, PROMPT, Plain(), stream)
    assert request.sent_TD.dtype == torch.float32
    assert torch.equal(request.sent_TD, honest_rows(client, PROMPT))
    with pytest.raises(ValueError, match="server received no rows"):
        received_rows(SplitServer(NAME, server, stream).view(()))


def test_noise_on_prompt_and_generated_rows_has_the_stated_deviation(parts, stream):
    """χ² of sums of squares: p > 1e-5 at σ in both parts, below 1e-5 for 2σ/3 and 3σ/2."""
    client, server = parts
    for true_std in (1.0, 2 / 3, 3 / 2):
        protection = GaussianNoise(0.4 * true_std, clip=0.3, max_rows=19, delta=1e-3)
        residuals = []
        for _ in range(8):
            request = run_in_memory(client, server, PROMPT, protection, stream, max_new_tokens=12)
            tokens = (*PROMPT, *request.client.tokens[:-1])
            honest_TD = protection.clipped(honest_rows(client, tokens))
            residuals.append(request.sent_TD.double() - honest_TD)
        for rows in (slice(0, len(PROMPT)), slice(len(PROMPT), None)):
            noise = torch.cat([residual[rows].flatten() for residual in residuals]) / 0.4
            tail = stats.chi2(len(noise)).cdf(float(noise.square().sum()))
            p_value = 2 * min(tail, 1 - tail)
            assert (p_value > 1e-5) == (true_std == 1.0), (true_std, rows, p_value)


def test_equal_requests_get_different_noise(parts, stream):
    client, server = parts
    protection = GaussianNoise(1.0, clip=1.0, max_rows=8, delta=1e-3)
    honest_TD = protection.clipped(honest_rows(client, PROMPT)).float()
    first, second = (
        (run_in_memory(client, server, PROMPT, protection, stream).sent_TD - honest_TD).flatten()
        for _ in range(2)
    )
    # 256 numbers: |r| > 0.3 has probability below 1e-5 if they are independent.
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3
    rows = first.view(-1, WIDTH)
    assert abs(np.corrcoef(rows[0], rows[1])[0, 1]) < 0.75  # 32 numbers: the same


@pytest.mark.parametrize(("prompt", "new"), [(8, 0), (7, 2), (1, 8)])
def test_a_row_beyond_the_budget_is_refused_before_anything_leaves(parts, stream, prompt, new):
    client, server = parts

    def run(max_rows):
        protection = GaussianNoise(1.0, clip=1.0, max_rows=max_rows, delta=1e-3)
        asking = SplitClient(NAME, client, PROMPT[:prompt], protection, stream, max_new_tokens=new)
        return InMemoryNetwork([asking, SplitServer(NAME, server, stream)]).run()

    assert len(received_rows(run(8).views["server"])) == 8
    refused = run(7)
    assert isinstance(refused.errors["client"], RowBudgetSpent)
    assert "8 rows, its protection accounts for 7" in str(refused.errors["client"])
    assert refused.traffic["client"].sent_bytes == 0
    assert refused.views["server"].received == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hidden_state_that_is_no_number_never_leaves(stream, bad):
    """In clear nothing is sent; under noise as much as ever, or its absence would tell."""
    model = tiny()
    with torch.no_grad():
        model.embed.weight[41, 3] = bad
    # Before any block: attention would spread it to every row.
    cut = Cut(0, 1)
    client, server = client_part(model, cut), server_part(model, cut)
    session = dataclasses.replace(NAME, cut=cut)

    def run(prompt, protection):
        asking = SplitClient(session, client, prompt, protection, stream, max_new_tokens=3)
        return InMemoryNetwork([asking, SplitServer(session, server, stream)]).run()

    refused = run(PROMPT, Plain())
    assert isinstance(refused.errors["client"], NonFiniteRows)
    assert refused.traffic["client"].sent_messages == 0
    protection = GaussianNoise(1.0, clip=1.0, max_rows=24, delta=1e-3)
    without = tuple(1 if token == 41 else token for token in PROMPT)
    with_it, other = run(PROMPT, protection), run(without, protection)
    assert with_it.errors == other.errors == {}
    for ran in (with_it, other):
        assert ran.traffic["client"].sent_bytes == with_it.traffic["client"].sent_bytes > 0
        assert len(received_rows(ran.views["server"])) == len(PROMPT) + 2


def test_a_stop_token_ends_the_request(parts, stream):
    client, server = parts
    full = run_in_memory(client, server, PROMPT, Plain(), stream, max_new_tokens=12)
    stop = full.client.tokens[4]
    first = full.client.tokens.index(stop)
    request = run_in_memory(
        client, server, PROMPT, Plain(), stream, max_new_tokens=12, stop_token=stop
    )
    assert request.client.tokens == full.client.tokens[: first + 1]
    assert request.outcome.unfinished == ()
    assert len(request.sent_TD) == len(PROMPT) + first


def test_sampling_follows_the_model(stream):
    """χ² over 1,500 first tokens: p > 1e-4, and below it for another temperature."""
    model = TinyDecoder(TinyConfig(6, 4, width=16, layers=1), torch.Generator().manual_seed(6))
    with torch.no_grad():
        model.head.weight.mul_(6.0)
    client, server = client_part(model, Cut(0, 1)), server_part(model, Cut(0, 1))
    counts = np.zeros(6)
    for _ in range(1500):
        request = run_in_memory(
            client, server, (2, 1), Plain(), stream, max_new_tokens=1, temperature=2.0
        )
        counts[request.client.tokens[0]] += 1
    logits_V = model(torch.tensor([[2, 1]]))[0, -1].detach().double()
    right, cold = ((logits_V / heat).softmax(0).numpy() for heat in (2.0, 1.0))
    assert stats.chisquare(counts, 1500 * right).pvalue > 1e-4
    assert stats.chisquare(counts, 1500 * cold).pvalue < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ()}, "a prompt is one token or more, from 0 to 49"),
        ({"prompt": (50,)}, "from 0 to 49"),
        ({"prompt": (-1,)}, "from 0 to 49"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"temperature": -0.5}, "temperature must be finite and not negative, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"max_new_tokens": 18}, "8 tokens and 18 new ones exceed the context of 24"),
    ],
)
def test_client_errors(parts, stream, change, message):
    arguments = {"prompt": PROMPT} | change
    with pytest.raises(ValueError, match=message):
        SplitClient(NAME, parts[0], arguments.pop("prompt"), Plain(), stream, **arguments)


def test_the_whole_context_can_be_used(parts, stream):
    request = run_in_memory(*parts, PROMPT, Plain(), stream, max_new_tokens=17)
    assert len(request.client.tokens) == 17


def test_cut_errors(model, stream):
    for first, last in ((-1, 2), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match=f"got first {first}, last {last}"):
            Cut(first, last)
    for part in (client_part, server_part):
        with pytest.raises(ValueError, match="cut at block 4 does not fit a model of 3 blocks"):
            part(model, Cut(0, 4))
    with pytest.raises(ValueError, match=r"cut at .*first=1.* at .*first=0"):
        run_in_memory(
            client_part(model, Cut(1, 2)), server_part(model, Cut(0, 2)), PROMPT, Plain(), stream
        )
    for part in (client_part, server_part):
        with pytest.raises(ValueError, match=r"dropout .* call its eval\(\) first"):
            part(gpt2(training=True), Cut(1, 2))
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        dataclasses.replace(NAME, id=b"abc")
    with pytest.raises(ValueError, match="both named 'a'"):
        dataclasses.replace(NAME, client="a", server="a")


def test_a_temperature_near_zero_takes_the_likeliest_token(parts, stream):
    """1e-310 is positive; logits divided by it overflow, and infinities give NaN for chances."""
    likeliest = run_in_memory(*parts, PROMPT, Plain(), stream, max_new_tokens=6).client.tokens
    assert set(likeliest) != {0}
    for temperature in (1e-310, 1e-300, 1e-9):
        cold = run_in_memory(
            *parts, PROMPT, Plain(), stream, max_new_tokens=6, temperature=temperature
        )
        assert cold.client.tokens == likeliest
    logits_BV = torch.tensor([[10.0, 30.0, -20.0]])
    assert tempered(logits_BV, 1e-310).tolist() == [[0, 1, 0]]
    assert torch.allclose(tempered(logits_BV + 1e4, 20.0), (logits_BV / 20).softmax(1), atol=1e-3)
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="and finite; got"):
            next_token(logits_BV, wrong, torch.Generator())


@pytest.mark.parametrize("register", ["parameter", "buffer"])
def test_the_server_gets_nothing_that_stands_outside_the_modules(register):
    """A position table of the decoder itself would go along with every shallow copy."""
    model = tiny()
    if register == "parameter":
        model.table = torch.nn.Parameter(torch.ones(CONTEXT, WIDTH))
    else:
        model.register_buffer("table", torch.ones(CONTEXT, WIDTH))
    with pytest.raises(ValueError, match="itself holds table, which the server would get"):
        server_part(model, CUT)
    assert "table" in client_part(model, CUT).model.state_dict()
