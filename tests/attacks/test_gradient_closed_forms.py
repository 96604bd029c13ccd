"""What single layers give away, against gradients that autograd computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attacks.gradient import embedding_tokens, label_of, labels, linear_input
from attacks.gradient.closed_forms import prediction_errors
from attacks.gradient.flow import Flow

VOCABULARY, WIDTH = 40, 16


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def head_gradient(hidden_MD, label_M, generator, weight_M=None):
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    loss_M = F.cross_entropy(hidden_MD @ head.T, label_M, reduction="none")
    loss = loss_M.mean() if weight_M is None else (loss_M * weight_M).sum()
    return torch.autograd.grad(loss, head)[0]


def test_the_input_of_a_linear_layer_is_exact(generator):
    layer = nn.Linear(WIDTH, 9)
    x_D = torch.randn(WIDTH, generator=generator)
    weight, bias = torch.autograd.grad(layer(x_D).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(linear_input(weight, bias).float(), x_D, rtol=1e-5, atol=1e-5)


def test_a_bias_without_gradient_tells_nothing():
    with pytest.raises(ValueError, match="tells nothing"):
        linear_input(torch.ones(2, 3), torch.zeros(2))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_label_of_one_prediction_whatever_the_sign_of_its_input(generator, sign):
    for label in range(VOCABULARY):
        hidden = sign * torch.rand(1, WIDTH, generator=generator)
        gradient = head_gradient(hidden, torch.tensor([label]), generator)
        assert label_of(gradient) == label


def test_the_tokens_that_were_read_and_no_others(generator):
    table = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    ids = torch.tensor([3, 7, 3, 0, 39])
    gradient = torch.autograd.grad(table[ids].square().sum(), table)[0]
    assert embedding_tokens(gradient).tolist() == [0, 3, 7, 39]


def test_labels_are_exact_whatever_the_weights(generator):
    for inputs in (1, 7, WIDTH - 1):
        hidden = torch.randn(inputs, WIDTH, generator=generator)
        wanted = torch.randint(0, VOCABULARY, (inputs,), generator=generator)
        weight = torch.rand(inputs, generator=generator) + 0.1
        gradient = head_gradient(hidden, wanted, generator, weight)
        assert labels(gradient, hidden).tolist() == wanted.tolist()


def test_prediction_errors_are_those_of_each_prediction(generator):
    hidden = torch.randn(5, WIDTH, generator=generator)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    wanted = torch.randint(0, VOCABULARY, (5,), generator=generator)
    expected = ((hidden @ head.T).softmax(1) - F.one_hot(wanted, VOCABULARY)).double() / 5
    errors, std, _ = prediction_errors(expected.T @ hidden.double(), hidden)
    torch.testing.assert_close(errors, expected, rtol=0, atol=1e-9)
    assert float(std.max()) < 1e-9


def test_the_noise_of_prediction_errors_is_what_it_is_said_to_be(generator):
    """A row's noise is the greater of its own and the mean, on 59 degrees of freedom: expected
    mean square 0.93. Over 2,000 rows it deviates by 0.03 at most: a false alarm is below 1e-3."""
    hidden = torch.randn(5, 64, generator=generator)
    noise = 1e-3 * torch.randn(2000, 64, generator=generator)
    errors, std, _ = prediction_errors(noise, hidden)
    assert 0.82 < float((errors / std).square().mean()) < 1.04


def test_as_many_inputs_as_dimensions_are_refused(generator):
    hidden = torch.randn(WIDTH, WIDTH, generator=generator)
    with pytest.raises(ValueError, match="do not fit"):
        labels(torch.zeros(VOCABULARY, WIDTH), hidden)


def test_inputs_that_depend_on_each_other_are_refused(generator):
    hidden = torch.randn(3, WIDTH, generator=generator)
    hidden[2] = hidden[0] + hidden[1]
    with pytest.raises(ValueError, match="depend on each other"):
        labels(torch.zeros(VOCABULARY, WIDTH), hidden)


@pytest.mark.parametrize("step", [0.0, 1e-5, 1e-3])
def test_rounding_whole_rows_to_zero_makes_no_labels(generator, step):
    """Unlikely tokens' rows vanish alike at the coarse step: an error, but none of chance."""
    hidden = torch.randn(5, 64, generator=generator)
    head = 0.3 * torch.randn(400, 64, generator=generator)
    probability = (hidden @ head.T).double().softmax(1)
    wanted = torch.randint(0, 400, (5,), generator=generator)
    errors = (probability - F.one_hot(wanted, 400)) / 5
    gradient = errors.T @ hidden.double()
    rounded = (gradient / step).round() * step if step else gradient
    flow = Flow.of(rounded, torch.arange(400), hidden, probability, step)
    assert flow.explained
    assert [list(labels) for labels in flow.labels] == [[label] for label in wanted.tolist()]


def test_a_flow_says_when_an_input_is_missing(generator):
    hidden = torch.randn(5, 64, generator=generator)
    probability = torch.full((5, 400), 1 / 400, dtype=torch.float64)
    wanted = torch.randint(0, 400, (5,), generator=generator)
    gradient = (probability - F.one_hot(wanted, 400)).T @ hidden.double()
    whole = Flow.of(gradient, torch.arange(400), hidden, probability)
    part = Flow.of(gradient, torch.arange(400), hidden[:4], probability[:4])
    assert whole.explained
    assert not part.explained
