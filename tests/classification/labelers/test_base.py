"""What holds for every labeler."""

import copy

import pytest
import torch
from support import copied, same

from ssod_imwa.averaging.member_state import mean_of_states
from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.labelers.base import WeakOutputs, class_counts_of, thresholded
from ssod_imwa.classification.labelers.build import LABELERS


def test_every_labeler_is_tested_here(small):
    assert small.MAKERS.keys() == LABELERS.keys()


@pytest.mark.parametrize("t", [0, 3, 6])
def test_the_same_weak_batch_has_the_same_labels_whatever_came_before(small, make_labeler, t):
    first, second = make_labeler(), make_labeler()
    for step in range(t):
        small.advance(first, step)
    state = copied(first.state_dict())
    for step in range(3):  # other batches, of which only the state may know
        small.advance(second, step, number=90 + step)
    second.load_state_dict(state)
    one, other = small.advance(first, t), small.advance(second, t)
    assert all(map(torch.equal, one[:3], other[:3]))
    assert same(copied(first.state_dict()), copied(second.state_dict()))


def test_labels_of_an_image_do_not_depend_on_its_place_in_the_batch(small, make_labeler):
    labelers = make_labeler(), make_labeler()
    for labeler in labelers:
        for step in range(4):
            small.advance(labeler, step)
        if labeler.reads_labeled_features:
            labeler.see_labeled(*small.labeled(4))
    weak, order = small.weak(4), torch.tensor([3, 1, 4, 0, 2])
    moved = WeakOutputs(
        weak.logits[order], weak.features[order], weak.indices[order], weak.tested_logits[order]
    )
    straight, permuted = (x.label(w, 4) for x, w in zip(labelers, (weak, moved), strict=True))
    assert torch.equal(straight.targets[order], permuted.targets)
    assert torch.equal(straight.mask[order], permuted.mask)
    torch.testing.assert_close(straight.probabilities[order], permuted.probabilities)


def test_states_go_through_files_and_into_new_labelers(small, make_labeler, tmp_path):
    labeler, fresh = make_labeler(), make_labeler()
    for step in range(5):
        small.advance(labeler, step)
    torch.save(labeler.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(copied(labeler.state_dict()), copied(fresh.state_dict()))
    if labeler.state_dict():
        assert not same(copied(labeler.state_dict()), copied(make_labeler().state_dict()))


def test_what_may_be_averaged_is_in_the_state(make_labeler):
    labeler = make_labeler()
    assert labeler.averageable <= labeler.state_dict().keys()


def test_what_may_be_averaged_can_be(small, make_labeler):
    labelers = make_labeler(), make_labeler()
    for member, labeler in enumerate(labelers):
        for step in range(5):
            small.advance(labeler, step, number=10 * member + step)
    names = labelers[0].averageable
    states = [{k: copied(x.state_dict()[k]) for k in names} for x in labelers]
    mean = mean_of_states(states, [1, 1])
    for name in names:
        torch.testing.assert_close(mean[name], (states[0][name] + states[1][name]) / 2)
    merged = copy.deepcopy(labelers[0])
    merged.load_state_dict({**labelers[0].state_dict(), **mean})
    small.advance(merged, 5)


def test_only_labelers_with_state_take_one(small):
    labeler = small.MAKERS["threshold"]()
    labeler.load_state_dict({})
    with pytest.raises(KeyError, match=r"threshold has no state, but was given \['queue'\]"):
        labeler.load_state_dict({"queue": 1})
    with pytest.raises(NotImplementedError, match="threshold does not read labeled features"):
        labeler.see_labeled(*small.labeled(0))


def test_a_state_of_other_sizes_is_refused(small):
    labeler = small.MAKERS["darp"]()
    state = {name: torch.zeros(2, 3) for name in labeler.state_dict()}
    with pytest.raises(ValueError, match=r"predicted of shape \(2, 3\) does not fit \(12, 3\)"):
        labeler.load_state_dict(state)


def test_thresholds_and_counts_are_those_of_plain_loops():
    torch.manual_seed(0)
    probabilities = torch.randn(40, 3).mul(3).softmax(1)
    targets, mask = thresholded(probabilities, 0.8)
    for row, target, sure in zip(probabilities.tolist(), targets.tolist(), mask, strict=True):
        assert row[target] == max(row)
        assert bool(sure) == (max(row) >= 0.8)
    counts = class_counts_of(targets, 3, Group())
    assert counts.tolist() == [targets.tolist().count(k) for k in range(3)]


def test_fixmatch_labels_are_weak_predictions_that_are_sure(small):
    weak = small.weak(0)
    labels = small.MAKERS["threshold"]().label(weak, 0)
    for i, row in enumerate(weak.logits.double().softmax(1).tolist()):
        assert labels.targets[i] == row.index(max(row))
        assert bool(labels.mask[i]) == (max(row) >= 0.6)
