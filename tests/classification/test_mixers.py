import math

import pytest
import torch
from torch import nn

from ssod_imwa.classification.mixers import MIXERS
from ssod_imwa.classification.mixing import mfw_strengths

COUNTS = [300, 40, 5]
LABELS = torch.tensor([0, 0, 1, 2, 0, 1])
SHAPE = torch.Size([6, 3, 8, 4])


def make(kind, network=None, **settings):
    return MIXERS[kind](COUNTS, MIXERS[kind].options_class(**settings), network)


def images(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def draws(mixer, count, labels=LABELS, *, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [mixer.draw(labels, SHAPE) for _ in range(count)]


def mixed_by_hand(values, drawn):
    """Sample by sample; a share of the batch counts for each of its samples."""
    rows = []
    for n, partner in enumerate(drawn.permutation.tolist()):
        share = drawn.shares[n if len(drawn.shares) > 1 else 0].item()
        rows.append((1 - share) * values[n].double() + share * values[partner].double())
    return torch.stack(rows).float()


def labels_by_hand(labels, drawn, shares):
    rows = torch.zeros(len(labels), len(COUNTS), dtype=torch.float64)
    for n, partner in enumerate(drawn.permutation.tolist()):
        rows[n, labels[n]] += 1 - shares[n]
        rows[n, labels[partner]] += shares[n]
    return rows


def test_none_leaves_images_labels_and_the_generator_alone():
    batch, before = images(), torch.get_rng_state()
    drawn = make("none").draw(LABELS, SHAPE)
    assert drawn.targets is LABELS
    assert drawn.images(batch) is batch
    assert torch.equal(torch.get_rng_state(), before)


def test_mixings_are_a_function_of_the_global_generator():
    mixer = make("mixup")
    (first,), (same,), (other,) = (draws(mixer, 1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.images(images()), same.images(images()))
    assert torch.equal(first.targets, same.targets)
    assert not torch.equal(first.targets, other.targets)


def test_mixup_mixes_images_and_labels_by_one_share():
    for drawn in draws(make("mixup", alpha=0.8), 5):
        assert drawn.shares.shape == (1,)
        expected = mixed_by_hand(images(), drawn)
        torch.testing.assert_close(drawn.images(images()), expected)
        share = drawn.shares.item()
        targets = labels_by_hand(LABELS, drawn, [share] * len(LABELS))
        torch.testing.assert_close(drawn.targets.double(), targets)


@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_mixups_shares_have_the_spread_of_their_beta_distribution(alpha):
    shares = torch.cat([d.shares for d in draws(make("mixup", alpha=alpha), 2000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 2000))
    assert shares.var().item() == pytest.approx(variance, rel=0.1)


def test_remix_gives_labels_to_the_rarer_partner():
    whole = 0
    for drawn in draws(make("remix"), 20):
        share = drawn.shares.item()
        shares = []
        for n, partner in enumerate(drawn.permutation.tolist()):
            own, other = COUNTS[LABELS[n]], COUNTS[LABELS[partner]]
            rarer, commoner = own >= 3 * other, 3 * own <= other
            full = (rarer and 1 - share < 0.5) or (commoner and share < 0.5)
            shares.append(float(rarer) if full else share)
            whole += full
        expected = labels_by_hand(LABELS, drawn, shares)
        torch.testing.assert_close(drawn.targets.double(), expected)
        torch.testing.assert_close(drawn.images(images()), mixed_by_hand(images(), drawn))
    assert whole > 20


def test_mixup_or_cutmix_is_one_or_the_other_as_often():
    found = draws(make("mixup_or_cutmix", alpha=0.8), 400)
    boxes = [drawn.box for drawn in found if drawn.box is not None]
    assert len(boxes) == pytest.approx(200, abs=4 * 10)  # four standard deviations
    assert len(set(boxes)) > 50


def test_cutmix_mixes_labels_by_the_pixels_that_were_taken():
    marked = torch.arange(6.0).reshape(6, 1, 1, 1).expand(SHAPE)  # each pixel says whose it is
    found = draws(make("mixup_or_cutmix"), 40)
    found = [drawn for drawn in found if drawn.box is not None]
    assert len(found) > 5
    for drawn in found:
        mixed = drawn.images(marked)
        for n, partner in enumerate(drawn.permutation.tolist()):
            expected = torch.zeros(len(COUNTS), dtype=torch.float64)
            for pixel in mixed[n, 0].flatten().tolist():
                assert pixel in (n, partner)
                expected[LABELS[int(pixel)]] += 1 / 32
            torch.testing.assert_close(drawn.targets[n].double(), expected)


def layered():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())


def test_manifold_mixup_mixes_the_output_of_the_drawn_layer():
    model = layered()
    places = {None: 0, model[0]: 1, model[2]: 3}  # how many of the modules come before
    mixer = make("manifold", model, layers=["input", "0", "2"])
    found = draws(mixer, 30)
    assert {drawn.layer for drawn in found} == set(places)
    for drawn in found:
        with drawn.at_layer():
            outputs = model(drawn.images(images()))
        before = places[drawn.layer]
        mixed = mixed_by_hand(model[:before](images()), drawn)
        torch.testing.assert_close(outputs, model[before:](mixed))
        targets = labels_by_hand(LABELS, drawn, [drawn.shares.item()] * len(LABELS))
        torch.testing.assert_close(drawn.targets.double(), targets)


def test_a_layer_is_left_alone_afterwards_also_by_an_error():
    model = layered()
    (drawn,) = draws(make("mfw", model, layers=["0"]), 1)
    clean = model(images())
    with drawn.at_layer():
        assert not torch.equal(model(images()), clean)
    assert torch.equal(model(images()), clean)
    with pytest.raises(RuntimeError), drawn.at_layer():
        model(torch.zeros(1, 7, 2, 2))
    assert torch.equal(model(images()), clean)


def test_mfw_mixes_features_by_shares_of_their_own_and_keeps_the_labels():
    network = nn.Sequential(nn.Identity())
    mixer = make("mfw", network, layers=["0"], alpha=2.0)
    strengths = mfw_strengths(COUNTS)
    found = draws(mixer, 400)
    for drawn in found[:5]:
        assert drawn.targets is LABELS
        assert torch.equal(drawn.images(images()), images())
        with drawn.at_layer():
            features = network(images())
        torch.testing.assert_close(features, mixed_by_hand(images(), drawn))
    relative = torch.stack([drawn.shares for drawn in found]) / strengths[LABELS]
    assert 0 < relative.min() < relative.max() < 1
    # Beta(2, 2) has the variance 1/20; independent draws of a batch are not correlated.
    assert relative.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 20 / 2400))
    assert relative.var().item() == pytest.approx(1 / 20, rel=0.1)
    assert torch.corrcoef(relative[:, :2].T)[0, 1].abs() < 4 / math.sqrt(400)


def test_mfws_settings_reach_its_strengths():
    settings = {"beta": 0.5, "deviation": "arithmetic"}
    mixer = make("mfw", alpha=1e4, **settings)  # draws near 1/2
    (drawn,) = draws(mixer, 1)
    expected = mfw_strengths(COUNTS, **settings)[LABELS] / 2
    torch.testing.assert_close(drawn.shares, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("kind", "mixes"),
    [
        ("none", False),
        ("mfw", False),
        ("mixup", True),
        ("remix", True),
        ("manifold", True),
        ("mixup_or_cutmix", True),
    ],
)
def test_who_mixes_labels_has_shares_as_targets(kind, mixes):
    mixer = make(kind)
    assert mixer.mixes_labels is mixes
    (drawn,) = draws(mixer, 1)
    assert drawn.targets.shape == ((6, 3) if mixes else (6,))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mixup", {"alpha": 0}, "alpha = 0 is not allowed"),
        ("mixup", {"alpha": math.nan}, "alpha = nan is not allowed"),
        ("mfw", {"layers": ["input", "0"]}, r"2 layers are not allowed \(must be 1\)"),
        ("manifold", {"layers": []}, r"0 layers are not allowed \(must be at least 1\)"),
        ("mfw", {"beta": 0}, "beta = 0"),
        ("mfw", {"deviation": "harmonic"}, "deviation = 'harmonic' is not allowed"),
    ],
)
def test_mixers_refuse_what_is_unknown_or_out_of_range(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make(kind, layered(), **settings)
