import torch
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier


class Net(ImageClassifier):
    """Weights of 7, drawn after the layers' own."""

    group_names = ("stem",)

    def __init__(self):
        super().__init__()
        self.num_features = 4
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.classifier = nn.Linear(4, 3)

    def initialize(self, part):
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.constant_(module.weight, 7.0)


def test_a_part_is_drawn_anew_as_its_layers_and_then_its_network_draw_it():
    net = Net()
    for tensor in (*net.parameters(), *net.stem[1].buffers()):
        tensor.data.fill_(2)
    net.redraw(net.stem)
    assert (net.stem[0].weight == 7).all()
    assert not (net.stem[0].bias == 2).any()
    assert (net.stem[1].running_mean == 0).all()
    assert (net.classifier.weight == 2).all()


def test_a_new_classifier_leaves_the_networks_own_alone():
    net = Net()
    before = net.classifier.weight.clone()
    head = net.new_classifier()
    assert (head.weight == 7).all()
    assert head.bias.shape == (3,)
    assert torch.equal(net.classifier.weight, before)
