import copy

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.weights import named_state
from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.wide_resnet import WideResNet


def experts(count=3, shared_groups=0, build=lambda: CifarResNet(10, depth=8)):
    torch.manual_seed(0)
    return Experts(build, count, shared_groups=shared_groups)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shared_groups", [0, 1, 3])
@pytest.mark.parametrize(
    "build",
    [lambda: CifarResNet(10, depth=8), lambda: WideResNet(10, depth=10, width=1)],
    ids=["resnet", "wide"],
)
def test_each_expert_alone_gives_its_features_and_logits(build, shared_groups):
    model = experts(3, shared_groups, build).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    images = torch.randn(4, 3, 16, 16)
    features, logits = model.expert_features(images), model.expert_logits(images)
    assert len(features) == model.num_experts == 3
    assert logits.shape == (3, 4, 10)
    for k, expert in enumerate(model.experts):
        assert features[k].equal(expert.features(images))
        assert features[k].shape == (4, model.num_features)
        assert logits[k].equal(expert(images))
    assert torch.allclose(model(images), (logits[0] + logits[1] + logits[2]) / 3, atol=1e-6)


def test_experts_begin_with_different_weights():
    model = experts()
    a, b = model.experts[0], model.experts[2]
    pairs = zip(a.named_parameters(), b.parameters(), strict=True)
    assert all(not p.equal(q) for (name, p), q in pairs if p.dim() > 1)


def test_common_groups_are_counted_and_run_once():
    separate, common = experts(), experts(shared_groups=2)
    one = CifarResNet(10, depth=8)
    assert parameters(separate) == 3 * parameters(one)
    assert parameters(common) == 3 * parameters(one) - 2 * parameters(nn.ModuleList(one.groups[:2]))
    calls = []
    common.experts[0].layer1.register_forward_hook(lambda *_: calls.append(1))
    common.train()(torch.randn(2, 3, 8, 8))
    assert len(calls) == 1
    assert common.experts[2].stem[1].num_batches_tracked == 1


def test_common_groups_stay_common_in_copies_and_are_averaged_once():
    model = copy.deepcopy(experts(shared_groups=2))
    assert model.experts[1].layer1 is model.experts[0].layer1
    assert model.experts[1].layer2 is not model.experts[0].layer2
    names = named_state({"student": model})
    assert "student.experts.0.stem.0.weight" in names
    assert "student.experts.1.stem.0.weight" not in names
    other = experts(shared_groups=2)
    nn.init.zeros_(other.experts[0].stem[0].weight)
    other.load_state_dict(model.state_dict())
    assert other.experts[2].stem[0].weight.equal(model.experts[0].stem[0].weight)


def test_an_experts_state_is_that_of_a_whole_classifier():
    model = experts(shared_groups=2).eval()
    single = CifarResNet(10, depth=8).eval()
    single.load_state_dict(model.experts[1].state_dict())
    images = torch.randn(2, 3, 8, 8)
    assert single(images).equal(model.expert_logits(images)[1])


def test_gradients_of_all_experts_reach_the_common_groups():
    model = experts(2, shared_groups=1).eval()
    images = torch.randn(2, 3, 8, 8)
    stem = model.experts[0].stem[0].weight
    both = torch.autograd.grad(model.expert_logits(images).sum(), stem)[0]
    single = [torch.autograd.grad(e(images).sum(), stem)[0] for e in model.experts]
    assert torch.allclose(both, single[0] + single[1], rtol=1e-4, atol=1e-4)


def test_one_expert_is_a_classifier_among_none():
    model = experts(1).eval()
    images = torch.randn(4, 3, 16, 16)
    assert model(images).equal(model.experts[0](images))
    assert model.expert_logits(images).shape == (1, 4, 10)


def test_no_experts_are_refused():
    with pytest.raises(ValueError, match=r"experts = 0 is not allowed .*at least 1"):
        experts(0)


@pytest.mark.parametrize("shared_groups", [-1, 4])
def test_all_groups_cannot_be_common(shared_groups):
    with pytest.raises(ValueError, match=rf"shared_groups = {shared_groups} .*must be 0\.\.3"):
        experts(2, shared_groups)
