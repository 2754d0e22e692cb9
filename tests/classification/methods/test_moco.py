import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork
from ssod_imwa.classification.methods.moco import ExpertContrast, MoCoOptions
from ssod_imwa.classification.models.experts import Experts

VIEWS = ("image", "key")

QUEUE, WIDTH, EXPERTS = 14, 5, 2  # two batches of 6 and a part of the third


@pytest.fixture
def network(tiny):
    return tiny.build(lambda: CollaborativeNetwork(Experts(tiny.Net, EXPERTS), width=WIDTH)).train()


@pytest.fixture
def views(tiny):
    return lambda t: tuple(tiny.batch("views", t, views=VIEWS)["labeled"].views.values())


def contrast_of(network, *, seed=0, **settings):
    options = MoCoOptions(**{"queue": QUEUE, "momentum": 0.9, **settings})
    return ExpertContrast(network, options, seed=seed)


def steps(network, contrast, views, *, count, first=0, parts=1):
    """Train the queries for some steps; the loss of each."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    losses = []
    for t in range(first, first + count):
        optimizer.zero_grad()
        total = 0.0
        for one, other in zip(*(view.chunk(parts) for view in views(t)), strict=True):
            loss = contrast.loss(network(one).queries, other, t)
            (loss / parts).backward()
            total += loss.item() / parts
        optimizer.step()
        contrast.after_step(0)
        losses.append(total)
    return losses


def key_by_hand(expert, head, images):
    return F.normalize(head(expert.features(images)), dim=1)


def info_nce_by_hand(queries, keys, queue, temperature):
    total = 0.0
    for query, key in zip(queries.detach(), keys, strict=True):
        own = math.exp(float(query @ key) / temperature)
        others = sum(math.exp(float(query @ row) / temperature) for row in queue)
        total -= math.log(own / (own + others))
    return total / len(queries)


def test_losses_are_those_of_moco_written_out(network, views):
    """MoCo moves the keys at the start of a step; here a list is the queue, oldest key first."""
    contrast = contrast_of(network, temperature=0.3)
    queues = [list(queue.features.clone()) for queue in contrast.queues]
    keys_of = copy.deepcopy([*network.deployed.experts]), copy.deepcopy([*network.projections])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for t in range(5):
        with torch.no_grad():
            for k in range(EXPERTS):
                slow = [*keys_of[0][k].parameters(), *keys_of[1][k].parameters()]
                fast = [*network.deployed.experts[k].parameters()]
                fast += [*network.projections[k].parameters()]
                for s, f in zip(slow, fast, strict=True):
                    s.copy_(0.9 * s + 0.1 * f)
        queries, expected = network(views(t)[0]).queries, 0.0
        for k in range(EXPERTS):
            keys = key_by_hand(keys_of[0][k], keys_of[1][k], views(t)[1]).detach()
            expected += info_nce_by_hand(queries[k], keys, queues[k], 0.3)
            queues[k] = [*queues[k][len(keys) :], *keys]
        loss = contrast.loss(queries, views(t)[1], t)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        contrast.after_step(0)
        for k, queue in enumerate(contrast.queues):
            rows = queue.features.roll(-queue.position, 0)  # oldest first
            torch.testing.assert_close(rows, torch.stack(queues[k]), rtol=1e-4, atol=1e-5)


def test_key_parameters_follow_and_statistics_are_of_the_keys_own_images(network, views):
    contrast = contrast_of(network)
    start = copy.deepcopy(contrast.key.state_dict())
    first_layer = contrast.key.deployed.experts[1].stem[0](views(0)[1])
    batch_mean = first_layer.mean((0, 2, 3))
    steps(network, contrast, views, count=1)
    own = dict(network.named_parameters())
    for name, parameter in contrast.key.named_parameters():
        expected = 0.9 * start[name] + 0.1 * own[name]
        torch.testing.assert_close(parameter, expected.detach())
    mean = contrast.key.deployed.experts[1].stem[1].running_mean
    torch.testing.assert_close(mean, 0.1 * batch_mean)
    assert not torch.allclose(mean, network.deployed.experts[1].stem[1].running_mean)


def test_the_first_keys_are_the_queries_of_equal_views(network, views):
    view = views(0)[0]
    contrast = contrast_of(network)
    loss = contrast.loss(network(view).queries, view, 0)
    contrast.after_step(0)
    for queue, queries in zip(contrast.queues, network(view).queries, strict=True):
        torch.testing.assert_close(queue.features[:6], queries)
    assert torch.isfinite(loss)


def test_the_loss_trains_queries_alone(tiny, network, views):
    contrast = contrast_of(network)
    contrast.loss(network(views(0)[0]).queries, views(0)[1], 0).backward()
    assert all(not p.requires_grad and p.grad is None for p in contrast.key.parameters())
    assert {name.split(".")[-2] for name in tiny.without_gradient(network)} == {"classifier"}


def test_queues_begin_with_directions_of_their_own(network):
    first, second = contrast_of(network).queues
    torch.testing.assert_close(first.features.norm(dim=1), torch.ones(QUEUE))
    assert not torch.equal(first.features, second.features)
    again, other = contrast_of(network), contrast_of(network, seed=1)
    assert torch.equal(again.queues[0].features, first.features)
    assert not torch.equal(other.queues[0].features, first.features)


def test_keys_of_all_micro_batches_enter_after_the_step(network, views):
    contrast = contrast_of(network)
    before = [queue.features.clone() for queue in contrast.queues]
    for t in range(2):
        contrast.loss(network(views(t)[0]).queries, views(t)[1], t)
        assert all(torch.equal(q.features, b) for q, b in zip(contrast.queues, before, strict=True))
    contrast.after_step(0)
    assert [queue.filled for queue in contrast.queues] == [12, 12]
    contrast.after_step(0)
    assert [queue.filled for queue in contrast.queues] == [12, 12]


def test_micro_batches_fill_the_queue_as_a_whole_batch_does(tiny, views):
    def run(parts):
        network = tiny.build(lambda: CollaborativeNetwork(Experts(tiny.Net, EXPERTS), width=WIDTH))
        network.eval()  # statistics of a batch would differ between parts and whole
        contrast = contrast_of(network)
        contrast.key.eval()
        network.forward = network.outputs
        losses = steps(network, contrast, views, count=3, parts=parts)
        return losses, [queue.features for queue in contrast.queues]

    whole, parts = run(1), run(3)
    assert whole[0] == pytest.approx(parts[0], rel=1e-4)
    for one, other in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_legacy_key_heads_stay_at_random_weights_of_their_own(tiny, network, views):
    contrast = contrast_of(network, legacy_key_head=True)
    start = tiny.copied(dict(contrast.key.named_parameters()))
    assert not torch.equal(start["projections.0.0.weight"], network.projections[0][0].weight)
    steps(network, contrast, views, count=3)
    for name, parameter in contrast.key.named_parameters():
        assert not parameter.requires_grad
        if name.startswith("projections."):
            assert torch.equal(parameter, start[name])
    stem = "deployed.experts.0.stem.0.weight"
    assert not torch.equal(contrast.key.get_parameter(stem), start[stem])
    # IMWA averages by these names.
    assert start.keys() <= dict(network.named_parameters()).keys()


def test_queues_survive_a_file(network, views):
    contrast = contrast_of(network)
    steps(network, contrast, views, count=3)  # the ring has come round
    file = io.BytesIO()
    torch.save(contrast.state_dict(), file)
    expected = [queue.features.clone() for queue in contrast.queues]
    follows = steps(copy.deepcopy(network), copy.deepcopy(contrast), views, count=1, first=3)
    restored = contrast_of(network, seed=5)
    restored.loss(network(views(9)[0]).queries, views(9)[1], 9)  # keys of a step that is given up
    restored.key.load_state_dict(contrast.key.state_dict())
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for queue, features in zip(restored.queues, expected, strict=True):
        assert torch.equal(queue.features, features)
        assert (queue.position, queue.filled) == (18 % QUEUE, QUEUE)
    assert steps(network, restored, views, count=1, first=3) == pytest.approx(follows)
    assert restored.queues[0].position == 24 % QUEUE


def test_state_of_another_shape_is_refused(tiny, network):
    state = contrast_of(network).state_dict()
    with pytest.raises(ValueError, match="does not fit"):
        contrast_of(network, queue=QUEUE + 1).load_state_dict(state)
    three = tiny.build(lambda: CollaborativeNetwork(Experts(tiny.Net, 3), width=WIDTH))
    with pytest.raises(ValueError, match="2 queues do not fit 3 experts"):
        contrast_of(three).load_state_dict(state)


def test_two_ranks_shuffle_the_images_of_keys(tiny, network, tmp_path):
    images = [tiny.batch("rank", r, views=VIEWS)["labeled"].views["key"] for r in range(2)]

    def look(rank):
        contrast, seen, processes = contrast_of(network), [], Ranks.of_run().batch
        contrast.key.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for t in range(3):
            contrast.loss(torch.zeros(EXPERTS, 6, WIDTH), images[rank], t, processes)
            contrast.after_step(0)
        return seen

    one, other = tiny.on_two_ranks(look, tmp_path)
    everyones = torch.cat(images)
    orders = []
    for first, second in zip(one, other, strict=True):
        found = (torch.cat([first, second])[:, None] == everyones).flatten(2).all(2)
        orders.append(found.int().argmax(1).tolist())
        assert sorted(orders[-1]) == list(range(12))  # each image once
        assert set(orders[-1][:6]) != set(range(6))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0 is not allowed"),
        ({"momentum": 1.5}, "momentum = 1.5 is not allowed"),
        ({"queue": 0}, "queue = 0 is not allowed"),
    ],
)
def test_arguments_out_of_range_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        contrast_of(network, **options)


def test_a_network_without_query_heads_is_refused(tiny):
    with pytest.raises(ValueError, match="width = 0 is not allowed"):
        ExpertContrast(CollaborativeNetwork(Experts(tiny.Net, 2)), MoCoOptions())
