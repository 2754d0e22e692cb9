import functools

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.soups import fixed, greedy, line, metric_of, uniform


def models(*values):
    return [{"w": torch.tensor([float(value)])} for value in values]


def near(target):
    return lambda state: -abs(float(state["w"]) - target)


def counting(metric):
    def counted(state):
        counted.calls += 1
        return metric(state)

    counted.calls = 0
    return counted


def greedy_by_hand(values, metric, keep_ties):
    """The recipe on plain numbers."""
    order = sorted(range(len(values)), key=lambda i: -metric(values[i]))
    soup, quality = [order[0]], metric(values[order[0]])
    for i in order[1:]:
        value = metric(sum(values[j] for j in [*soup, i]) / (len(soup) + 1))
        if value > quality or (keep_ties and value == quality):
            soup.append(i)
            quality = value
    return sorted(soup)


@pytest.mark.parametrize("keep_ties", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_greedy_against_the_recipe_on_numbers(seed, keep_ties):
    # Small integers, so that ties occur and means of up to four are exact.
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, (4,), generator=generator).tolist()
    coefficients = greedy(models(*values), metric=near(1), keep_ties=keep_ties)
    expected = greedy_by_hand(values, lambda x: -abs(float(torch.tensor(x)) - 1), keep_ties)
    assert [i for i, value in enumerate(coefficients) if value] == expected
    assert sum(coefficients) == pytest.approx(1)
    assert len({value for value in coefficients if value}) == 1


def test_greedy_keeps_ties_unless_told():
    same = models(2, 2)
    assert greedy(same, metric=near(0)) == [0.5, 0.5]
    assert greedy(same, metric=near(0), keep_ties=False) == [1, 0]


@pytest.mark.parametrize("members", [1, 2, 5])
def test_greedy_evaluates_at_most_2m_minus_1_times(members):
    metric = counting(near(0))
    greedy(models(*range(members)), metric=metric)
    assert metric.calls == 2 * members - 1


def test_line_takes_the_best_point():
    assert line(models(0, 4), metric=near(3)) == [0.25, 0.75]
    assert line(models(0, 4), metric=near(-1)) == [1, 0]
    assert line(models(0, 10), metric=near(1), grid=[0.1, 0.9]) == [0.9, 0.1]


def test_line_prefers_the_middle_on_a_tie():
    assert line(models(0, 4), metric=lambda state: 1.0) == [0.5, 0.5]


def test_uniform_and_fixed():
    assert uniform(models(1, 2, 3, 4)) == [0.25] * 4
    assert fixed(models(1, 2), coefficients=[0.3, 0.7]) == [0.3, 0.7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(uniform, []), "no model to average"),
        (functools.partial(greedy, [], metric=near(0)), "no model to average"),
        (functools.partial(fixed, models(1), coefficients=[0.5]), "must sum to 1"),
        (functools.partial(line, models(1), metric=near(0)), "line is for 2 models, there are 1"),
        (functools.partial(line, models(1, 2), metric=near(0), grid=[]), "grid = "),
        (functools.partial(line, models(1, 2), metric=near(0), grid=[2.0]), "grid = "),
        (functools.partial(greedy, models(1), metric=lambda state: float("nan")), "is NaN"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_metric_of_modules_puts_their_weights_back():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    metric = metric_of({"m": model}, lambda: model.weight.item())
    assert metric({"m.weight": torch.tensor([[2.0]])}) == 2
    assert model.weight.item() == 5


def test_metric_of_modules_puts_their_weights_back_after_an_error():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)

    def fails():
        raise OSError("no images")

    with pytest.raises(OSError, match="no images"):
        metric_of({"m": model}, fails)({"m.weight": torch.tensor([[2.0]])})
    assert model.weight.item() == 5
