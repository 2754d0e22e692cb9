import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.ecl import ECL, ECLOptions
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork
from ssod_imwa.classification.methods.moco import ExpertContrast, MoCoOptions
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.launch import distribute

VIEWS = ECL.reads["labeled"]

EXPERTS = 3
COMMON = ("iterations", "part", "ema_decay")  # what all methods are told beside their options


@pytest.fixture
def ecl(tiny):
    def make(*, net=tiny.Net, experts=EXPERTS, contrastive=True, queue=16, **settings):
        network = tiny.build(
            lambda: CollaborativeNetwork(
                Experts(net, experts), reference=True, width=5 if contrastive else 0
            )
        )
        contrast = None
        if contrastive:
            contrast = ExpertContrast(network, MoCoOptions(queue=queue, momentum=0.9))
        common = {key: settings.pop(key) for key in COMMON if key in settings}
        training, options = Training(**{"iterations": 8, **common}), ECLOptions(**settings)
        return ECL(network, tiny.COUNTS, options, training=training, contrast=contrast)

    return make


def total(records):
    return sum(value for name, value in records.items() if name.startswith("loss"))


def standardized_loss(logits, label):
    deviation = ((logits - logits.mean()) ** 2).mean().sqrt()
    return -(logits / deviation).log_softmax(0)[label]


def distillation_by_hand(values, temperature, weights=None):
    """Eq. 7 with torch's divergence, image by image."""
    experts, images, _ = values.shape
    result = 0.0
    for k in range(experts):
        for q in range(experts):
            for i in range(images if q != k else 0):
                p = (values[k, i] / temperature).softmax(0)
                log_q = (values[q, i] / temperature).log_softmax(0)
                weight = 1.0 if weights is None else weights[k][i]
                result += weight * temperature**2 * F.kl_div(log_q, p, reduction="sum")
    return result / (images * experts * (experts - 1))


def with_labels(batch, labels):
    return Batch(labeled=replace(batch["labeled"], targets=torch.tensor(labels)))


def test_losses_are_those_of_the_paper_written_out(tiny, ecl):
    method = ecl(alpha=0.7, beta=0.4, temperature=2.0)
    batch = tiny.batch(0, views=VIEWS)
    prior = (torch.tensor(tiny.COUNTS) / sum(tiny.COUNTS)).log()
    out = method.student(batch["labeled"].views["image"])
    labels = batch["labeled"].targets
    keys, queues = method.contrast.key(batch["labeled"].views["key"]), method.contrast.queues
    expected = {"loss_cls": 0.0, "loss_ref": 0.0, "loss_contrastive": 0.0}
    weights = []
    for k in range(EXPERTS):
        expected["loss_cls"] += F.cross_entropy(out.logits[k] + prior, labels) / EXPERTS
        expected["loss_ref"] += F.cross_entropy(out.reference_logits[k] + prior, labels) / EXPERTS
        own = (out.queries[k] * keys[k]).sum(1, keepdim=True)
        scores = torch.cat([own, out.queries[k] @ queues[k].features.T], dim=1) / 0.2
        expected["loss_contrastive"] += 0.4 * F.cross_entropy(scores, torch.zeros_like(labels))
        heads = (out.logits[k].detach(), out.reference_logits[k].detach())
        losses = [[standardized_loss(z, y) for z, y in zip(h, labels, strict=True)] for h in heads]
        weights.append([float(cls / ref) for cls, ref in zip(*losses, strict=True)])
    expected["loss_kd_logits"] = 0.7 * distillation_by_hand(out.logits, 2.0, weights)
    expected["loss_kd_features"] = 0.7 * distillation_by_hand(out.features, 2.0)
    records = method.losses(batch, 0)
    assert {name for name in records if name.startswith("loss")} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(records[name], value, rtol=1e-4, atol=1e-6)
    weights = torch.tensor(weights)
    torch.testing.assert_close(records["transfer_mean"], weights.mean())
    torch.testing.assert_close(records["transfer_max"], weights.max())
    right = (out.logits.sum(0).argmax(1) == labels).float().mean()
    torch.testing.assert_close(records["train_accuracy"], 100 * right)


@pytest.mark.parametrize("contrastive", [True, False])
def test_one_expert_has_the_losses_of_its_heads_and_no_other_to_learn_from(tiny, ecl, contrastive):
    method = ecl(experts=1, contrastive=contrastive)
    batch = tiny.batch(0, views=method.reads["labeled"])
    prior = (torch.tensor(tiny.COUNTS) / sum(tiny.COUNTS)).log()
    out, labels = method.student(batch["labeled"].views["image"]), batch["labeled"].targets
    records = method.losses(batch, 0)
    for name, logits in (("loss_cls", out.logits[0]), ("loss_ref", out.reference_logits[0])):
        torch.testing.assert_close(records[name], F.cross_entropy(logits + prior, labels))
    assert records["loss_kd_logits"].item() == records["loss_kd_features"].item() == 0
    assert ("loss_contrastive" in records) is contrastive
    total(records).backward()
    assert tiny.without_gradient(method.student) == set()
    assert all(p.grad.isfinite().all() for p in method.student.parameters())


@pytest.mark.parametrize("contrastive", [True, False])
def test_without_collaboration_experts_are_those_trained_apart(tiny, ecl, contrastive):
    method = ecl(contrastive=contrastive, alpha=0.0, beta=0.0)
    prior = (torch.tensor(tiny.COUNTS) / sum(tiny.COUNTS)).log()
    alone = copy.deepcopy(
        list(zip(method.student.deployed.experts, method.student.references, strict=True))
    )
    for expert, reference in alone:
        parameters = [*expert.parameters(), *reference.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
        for t in range(3):
            batch = tiny.batch(0, t, views=method.reads["labeled"])
            features = expert.features(batch["labeled"].views["image"])
            heads = (expert.classifier(features), reference(features))
            optimizer.zero_grad()
            labels = batch["labeled"].targets
            loss = sum(F.cross_entropy(logits + prior, labels) for logits in heads)
            (loss / EXPERTS).backward()
            optimizer.step()
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.5, momentum=0.9)
    before = tiny.copied(method.student.state_dict())
    tiny.trainer(method, 3, imwa=False, optimizer=optimizer).train()
    student = method.student
    for k, (expert, reference) in enumerate(alone):
        for name, value in expert.state_dict().items():
            found = student.deployed.experts[k].state_dict()[name]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student.references[k].weight, reference.weight)
    assert not torch.equal(before["references.0.weight"], student.references[0].weight)


def test_experts_that_are_equal_have_nothing_to_distil(tiny, ecl):
    method = ecl()
    first, *others = method.student.deployed.experts
    for other in others:
        other.load_state_dict(first.state_dict())
    records = method.losses(tiny.batch(0, views=VIEWS), 0)
    assert records["loss_kd_logits"].item() == pytest.approx(0, abs=1e-6)
    assert records["loss_kd_features"].item() == pytest.approx(0, abs=1e-6)


def test_transfer_weights_send_no_gradient_into_the_reference_heads(tiny, ecl):
    method = ecl()
    records = method.losses(tiny.batch(0, views=VIEWS), 0)
    references = list(method.student.references.parameters())
    found = torch.autograd.grad(
        records["loss_kd_logits"], references, retain_graph=True, allow_unused=True
    )
    assert found == (None,) * len(references)
    found = torch.autograd.grad(records["loss_ref"], references, retain_graph=True)
    assert all(gradient.any() for gradient in found)
    encoder = method.student.deployed.experts[0].layer1[0].weight
    assert torch.autograd.grad(records["loss_ref"], encoder)[0].any()


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.0, "beta": 0.0}, {"distil": ()}, {"transfer": "none"}]
)
def test_every_parameter_of_the_student_gets_a_gradient(tiny, ecl, options):
    method = ecl(**options)
    total(method.losses(tiny.batch(0, views=VIEWS), 0)).backward()
    assert tiny.without_gradient(method.student) == set()
    assert all(p.grad is None for p in method.contrast.key.parameters())


def test_the_student_is_called_once_through_its_parallel_form(tiny, ecl):
    method = ecl()
    calls = []

    class Parallel(torch.nn.Module):
        def forward(self, *inputs):
            calls.append(inputs)
            return method.student(*inputs)

    method.parallel_student = Parallel()
    batch = tiny.batch(0, views=VIEWS)
    method.losses(batch, 0)
    assert len(calls) == 1
    assert calls[0] == (batch["labeled"].views["image"],)


def test_distillation_takes_the_options_given(tiny, ecl):
    batch = tiny.batch(0, views=VIEWS)
    out = ecl().student(batch["labeled"].views["image"])
    prior = (torch.tensor(tiny.COUNTS) / sum(tiny.COUNTS)).log()

    def loss(**options):
        return ecl(alpha=1.0, **options).losses(batch, 0)["loss_kd_logits"]

    plain = distillation_by_hand(out.logits, 1.0)
    torch.testing.assert_close(loss(transfer="none"), plain, rtol=1e-4, atol=1e-7)
    compensated = distillation_by_hand(out.logits + prior, 1.0)
    torch.testing.assert_close(
        loss(transfer="none", compensated=True), compensated, rtol=1e-4, atol=1e-7
    )
    assert loss(transfer_clip=1e-3) < loss()
    assert loss(transfer="ref_over_cls") != loss()


@pytest.mark.parametrize("distil", [(), ("logits",), ("features",), ("logits", "features")])
def test_what_is_not_distilled_is_not_computed(tiny, ecl, distil):
    records = ecl(distil=distil).losses(tiny.batch(0, views=VIEWS), 0)
    found = {name.removeprefix("loss_kd_") for name in records if name.startswith("loss_kd_")}
    assert found == set(distil)
    assert ("transfer_mean" in records) == ("logits" in distil)


def test_transfer_weights_are_recorded_by_group(tiny, ecl):
    method = ecl()  # counts 30, 10, 4: medium, few, few
    batch = with_labels(tiny.batch(0, views=VIEWS), [0, 0, 1, 2, 1, 1])
    out = method.student(batch["labeled"].views["image"])
    weights = torch.tensor(
        [
            [
                float(standardized_loss(z, y) / standardized_loss(r, y))
                for z, r, y in zip(cls, ref, batch["labeled"].targets, strict=True)
            ]
            for cls, ref in zip(out.logits.detach(), out.reference_logits.detach(), strict=True)
        ]
    )
    records = method.losses(batch, 0)
    assert {name for name in records if name.startswith("transfer")} == {
        "transfer_mean", "transfer_max", "transfer_medium", "transfer_few",
    }  # fmt: skip
    medium = records["transfer_medium"]
    torch.testing.assert_close(medium, weights[:, :2].mean())
    torch.testing.assert_close(records["transfer_few"], weights[:, 2:].mean())
    batch = with_labels(batch, [2, 2, 1, 2, 1, 1])
    later = method.losses(batch, 1)
    assert torch.equal(later["transfer_medium"], medium)  # none in this batch
    assert not torch.equal(later["transfer_few"], records["transfer_few"])


def test_the_second_view_is_for_keys_alone(tiny, ecl):
    one, other = tiny.batch(0, views=VIEWS), tiny.batch(1, views=VIEWS)
    views = {**one["labeled"].views, "key": other["labeled"].views["key"]}
    mixed = Batch(labeled=replace(one["labeled"], views=views))
    plain, changed = (ecl().losses(batch, 0) for batch in (one, mixed))
    differing = {name for name in plain if not torch.equal(plain[name], changed[name])}
    assert differing == {"loss_contrastive"}


def test_without_contrast_one_view_is_enough(tiny, ecl):
    method = ecl(contrastive=False)
    assert method.reads == {"labeled": ("image",)}
    records = method.losses(tiny.batch(0), 0)
    assert "loss_contrastive" not in records
    assert set(method.models()) == {"student"}
    assert set(ecl(ema_decay=0.9).models()) == {"student", "teacher", "momentum"}


def test_evaluation_gives_the_mean_of_the_experts(tiny, ecl):
    method = ecl(ema_decay=0.5)
    tiny.trainer(method, 2, imwa=False).train()
    images = tiny.batch("test")["labeled"].views["image"]
    model = method.inference_model(1).eval()
    assert model is method.teacher.model
    expected = sum(expert(images) for expert in model.deployed.experts) / EXPERTS
    torch.testing.assert_close(model(images), expected)


def test_a_frozen_part_stays_as_it_is_in_both_networks(tiny, ecl):
    def net():
        model = tiny.Net()
        model.layer1 = torch.nn.Sequential(model.layer1[0], model.layer1[1:])
        return model

    method = ecl(net=net, part="last_block")
    before = tiny.states(method)
    tiny.trainer(method, 4, episodes=2, members=2).train()
    after = tiny.states(method)
    for model in ("student", "momentum"):
        changed = {n for n in before[model] if not torch.equal(before[model][n], after[model][n])}
        assert not any(".stem." in name for name in changed), model
        assert not any(".layer1.0." in name for name in changed), model
        assert any(".layer1.1." in name for name in changed), model
        assert any(name.startswith("projections.") for name in changed), model


def test_members_are_averaged_with_their_momentum_encoders(tiny, ecl):
    method = ecl(ema_decay=0.9)
    members = tiny.Members()
    tiny.trainer(method, 6, episodes=2, members=2, hooks=[members]).train()
    assert set(members.states) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    tiny.check_average(method, members)


def test_queues_stay_with_their_members(tiny, ecl):
    method = ecl(queue=64)
    members, queues = tiny.Members(), {}

    def watch(position):
        queue = method.contrast.queues[1]
        queues[position.member, position.t] = queue.features[: queue.filled].clone()

    run = tiny.trainer(method, 6, episodes=2, members=2, hooks=[members, tiny.Watch(watch)])
    run.train()
    for member in range(2):
        for t in range(6):
            assert len(queues[member, t]) == 6 * (t + 1)
            assert t == 0 or torch.equal(queues[member, t][: 6 * t], queues[member, t - 1])
    assert not torch.equal(queues[0, 5], queues[1, 5])
    left = method.contrast.queues[1]  # after the run member 0 is next
    assert torch.equal(left.features[: left.filled], queues[0, 5])


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_run_resumes_bit_for_bit(tiny, ecl, step):
    def run():
        method = ecl(ema_decay=0.9)
        save = tiny.SaveAt(step)
        trainer = tiny.trainer(method, 5, episodes=2, members=2)
        trainer.register_hooks([save])
        return method, trainer, save

    straight, trainer, save = run()
    trainer.train()
    resumed, trainer, _ = run()
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))


def test_accumulation_writes_all_keys_of_a_step(tiny, ecl):
    method = ecl(queue=32)
    tiny.trainer(method, 2, imwa=False, accumulation=3).train()
    assert [queue.filled for queue in method.contrast.queues] == [12] * EXPERTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha = -0.1 is not allowed"),
        ({"beta": float("nan")}, "beta = nan is not allowed"),
        ({"temperature": 0}, "temperature = 0 is not allowed"),
        ({"distil": ["logit"]}, r"distil = \['logit'\] is not allowed"),
        ({"transfer": "both"}, "transfer = 'both' is not allowed"),
        ({"transfer_clip": -1.0}, "transfer_clip = -1.0 is not allowed"),
        ({"part": "head"}, "part = 'head' is not allowed"),
        ({"iterations": 0}, "iterations = 0 is not allowed"),
    ],
)
def test_arguments_out_of_range_are_refused(ecl, options, message):
    with pytest.raises(ValueError, match=message):
        ecl(**options)


def test_networks_that_do_not_fit_are_refused(tiny, ecl):
    def network(**options):
        return CollaborativeNetwork(Experts(tiny.Net, 2), **options)

    training = Training(1)
    with pytest.raises(ValueError, match="without reference heads is not allowed"):
        ECL(network(), tiny.COUNTS, ECLOptions(), training=training)
    with pytest.raises(ValueError, match="4 counts are not allowed"):
        ECL(network(reference=True), [9, 9, 9, 9], ECLOptions(), training=training)
    with pytest.raises(ValueError, match="belong together"):
        ECL(network(reference=True, width=5), tiny.COUNTS, ECLOptions(), training=training)
    contrast = ExpertContrast(network(width=5), MoCoOptions())
    with pytest.raises(ValueError, match="belong together"):
        ECL(
            *(network(reference=True), tiny.COUNTS, ECLOptions()),
            training=training,
            contrast=contrast,
        )


# --------------------------------------------------------------------------------------- two ranks


def one_step(tiny, method, rank):
    """The gradients of a step on the rank's batch."""
    total(method.losses(tiny.batch("rank", rank, views=VIEWS), 0)).backward()
    method.after_step(0)
    return {name: p.grad.clone() for name, p in method.student.named_parameters()}


def without_batch_statistics(method):
    """So that keys do not depend on how ranks share the images."""
    method.contrast.key.eval()
    return method


def test_two_ranks_average_gradients_and_share_all_keys(tiny, ecl, tmp_path):
    def step(rank):
        method = without_batch_statistics(ecl())
        distribute(method, Ranks.of_run())
        gradients = one_step(tiny, method, rank)
        return {"gradients": gradients, **method.contrast.state_dict()}

    ranks = tiny.on_two_ranks(step, tmp_path)
    alone = [one_step(tiny, without_batch_statistics(ecl()), rank) for rank in range(2)]
    key = without_batch_statistics(ecl()).contrast.key
    batches = [tiny.batch("rank", r, views=VIEWS) for r in range(2)]
    keys = key(torch.cat([batch["labeled"].views["key"] for batch in batches]))
    for found in ranks:
        for name, gradient in found["gradients"].items():
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        for k in range(EXPERTS):
            torch.testing.assert_close(found[f"queue_{k}"]["features"][:12], keys[k])
            assert int(found[f"queue_{k}"]["position"]) == 12


def test_ranks_end_with_the_same_models_and_queues(tiny, ecl, tmp_path):
    def train(rank):
        method = ecl(queue=32)
        distribute(method, Ranks.of_run())
        trainer = tiny.trainer(method, 2, members=2)
        trainer._batches = lambda start: (
            tiny.batch(0, g, views=VIEWS).split(2)[rank] for g in range(start, 4)
        )
        trainer.train()
        return tiny.states(method)

    one, other = tiny.on_two_ranks(train, tmp_path)
    assert tiny.same(one["student"], other["student"])
    assert tiny.same(one["momentum"], other["momentum"])
    assert tiny.same(one["own"]["contrast"], other["own"]["contrast"])
