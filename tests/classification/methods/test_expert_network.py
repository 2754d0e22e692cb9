import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork
from ssod_imwa.classification.models.experts import Experts


@pytest.fixture
def network(tiny):
    def make(**options):
        options = {"reference": True, "width": 5, **options}
        return tiny.build(lambda: CollaborativeNetwork(Experts(tiny.Net, 3), **options))

    return make


def test_training_mode_returns_what_each_expert_computes_alone(tiny, network):
    images = tiny.batch("images")["labeled"].views["image"]
    model = network().train()
    outputs = model(images)
    for k, expert in enumerate(model.deployed.experts):
        features = expert.features(images)
        rows = model.projections[k](features)
        torch.testing.assert_close(outputs.features[k], features)
        torch.testing.assert_close(outputs.logits[k], expert.classifier(features))
        torch.testing.assert_close(outputs.reference_logits[k], model.references[k](features))
        torch.testing.assert_close(outputs.queries[k], rows / rows.norm(dim=1, keepdim=True))


def test_eval_mode_returns_the_experts_mean(tiny, network):
    images = tiny.batch("images")["labeled"].views["image"]
    model = network().eval()
    logits = model(images)
    assert torch.equal(logits, deployed(model)(images))
    torch.testing.assert_close(logits, sum(expert(images) for expert in model.deployed.experts) / 3)


def test_heads_that_are_not_wanted_are_not_there(tiny, network):
    model = network(reference=False, width=0)
    outputs = model(tiny.batch("images")["labeled"].views["image"])
    assert outputs.reference_logits is None
    assert outputs.queries is None
    assert all(name.startswith("deployed.") for name in model.state_dict())


def test_reference_heads_have_weights_of_their_own(tiny, network):
    model = network()
    heads = [*(expert.classifier for expert in model.deployed.experts), *model.references]
    for i, one in enumerate(heads):
        for other in heads[:i]:
            assert one.weight.shape == other.weight.shape
            assert not torch.equal(one.weight, other.weight)


def test_reference_heads_are_of_the_classifiers_kind(tiny):
    experts = Experts(lambda: tiny.Net("cosine", scale=16.0), 2)
    head = CollaborativeNetwork(experts, reference=True).references[0]
    assert type(head) is type(experts.experts[0].classifier)
    assert head.scale == 16.0
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(3))


def test_reference_heads_begin_as_the_network_draws_its_classifier(tiny):
    class Marked(tiny.Net):
        def initialize(self, part):
            torch.nn.init.constant_(part.weight, 7.0)

    network = CollaborativeNetwork(Experts(Marked, 2), reference=True)
    assert all((head.weight == 7).all() for head in network.references)


def test_query_heads_have_the_width_asked_for(tiny, network):
    first, _, last = network(width=7, hidden=11).projections[2]
    assert (first.in_features, first.out_features, last.out_features) == (6, 11, 7)
    assert network().projections[0][0].out_features == 6


def test_branch_holds_the_networks_own_parameters_under_their_names(tiny, network):
    model = network()
    branch = model.branch(model.projections)
    own, all_ = dict(branch.named_parameters()), dict(model.named_parameters())
    assert all(own[name] is all_[name] for name in own)
    left_out = {
        n.split(".")[0] if "classifier" not in n else "classifier" for n in all_ - own.keys()
    }
    assert left_out == {"classifier", "references"}
    model.train(), branch.train()
    images = tiny.batch("images")["labeled"].views["image"]
    torch.testing.assert_close(branch(images), model(images).queries)


def test_branch_leaves_the_network_as_it_is(tiny, network):
    model = network()
    before = {name: id(x) for name, x in model.named_parameters()}
    model.branch(model.projections)
    assert {name: id(x) for name, x in model.named_parameters()} == before
    assert model(tiny.batch("images")["labeled"].views["image"]).logits.shape == (3, 6, 3)


def test_branch_keeps_what_experts_share(tiny):
    model = CollaborativeNetwork(Experts(tiny.Net, 3, shared_groups=1), width=5)
    first, second, _ = model.branch(model.projections).deployed.experts
    assert first.stem is second.stem
    assert first.layer1 is not second.layer1


def test_rows_have_length_1_in_half_precision(tiny, network):
    model = network().to(torch.bfloat16)
    queries = model(tiny.batch("images")["labeled"].views["image"].bfloat16()).queries
    assert queries.dtype == torch.float32
    torch.testing.assert_close(queries.norm(dim=2), torch.ones(3, 6))
    assert not torch.equal(queries, F.normalize(queries.bfloat16(), dim=2).float())


def test_a_classifier_that_is_no_expert_is_refused(tiny):
    with pytest.raises(ValueError, match=r"a TinyNet is not allowed \(must be Experts\)"):
        CollaborativeNetwork(tiny.Net())
    with pytest.raises(ValueError, match="width = -1 is not allowed"):
        CollaborativeNetwork(Experts(tiny.Net, 2), width=-1)
