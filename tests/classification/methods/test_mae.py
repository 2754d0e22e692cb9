import io
import math

import pytest
import torch
from support import needs_fork, on_two_ranks

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.methods.mae import (
    MaskedPretraining,
    encoder_state,
    reconstruction_error,
)
from ssod_imwa.classification.models.mae import MAEOptions, MaskedAutoencoder
from ssod_imwa.classification.models.vit import ViT
from ssod_imwa.classification.models.weights import load_encoder
from ssod_imwa.classification.networks import load_weights
from ssod_imwa.data.batches import Part
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import FORMAT

PATCH, PATCHES, VISIBLE = 2, 16, 4  # images of 8 x 8 pixels


def vit(classes=3, image_size=8):
    return ViT(classes, image_size=image_size, patch_size=PATCH, dim=16, depth=2, heads=2)


def make_method(tiny):
    return MaskedPretraining(
        tiny.build(
            lambda: MaskedAutoencoder(
                vit(), MAEOptions(decoder_width=8, decoder_depth=1, decoder_heads=2)
            )
        )
    )


def in_parts(batch, size):
    part = batch["labeled"]
    cuts = zip(part.views["image"].split(size), part.indices.split(size), strict=True)
    return [Part({"image": images}, None, indices) for images, indices in cuts]


def patch_by_hand(image, number):
    """The pixels of a patch, colors innermost, with mean 0 and sample variance 1."""
    top, left = PATCH * (number // 4), PATCH * (number % 4)
    pixels = [
        image[color, row, column].item()
        for row in range(top, top + PATCH)
        for column in range(left, left + PATCH)
        for color in range(3)
    ]
    mean = sum(pixels) / len(pixels)
    variance = sum((x - mean) ** 2 for x in pixels) / (len(pixels) - 1)
    return [(x - mean) / math.sqrt(variance + 1e-6) for x in pixels]


def error_by_hand(model, images, noise):
    """The mean over masked patches: all but the few of the smallest noise."""
    orders = [sorted(range(PATCHES), key=row.__getitem__) for row in noise.tolist()]
    visible = torch.tensor([order[:VISIBLE] for order in orders])
    with torch.no_grad():
        pixels = model.reconstruct(images, visible).tolist()
    errors = []
    for image, found, order in zip(images, pixels, orders, strict=True):
        for number in order[VISIBLE:]:
            target = patch_by_hand(image, number)
            squares = [(a - b) ** 2 for a, b in zip(found[number], target, strict=True)]
            errors.append(sum(squares) / len(squares))
    return sum(errors) / len(errors)


def test_the_loss_is_that_of_the_patches_which_the_global_generator_masks(tiny):
    method, batch = make_method(tiny), tiny.batch(0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        noise = torch.rand(len(batch["labeled"].targets), PATCHES)
        torch.manual_seed(7)
        records = method.losses(batch, 0)
    assert set(records) == {"loss_reconstruction"}
    expected = error_by_hand(method.student, batch["labeled"].views["image"], noise)
    assert records["loss_reconstruction"].item() == pytest.approx(expected, rel=1e-5)


def test_masks_differ_from_step_to_step(tiny):
    method, batch = make_method(tiny), tiny.batch(0)
    with torch.random.fork_rng():
        losses = [method.losses(batch, t)["loss_reconstruction"].item() for t in range(5)]
    assert len(set(losses)) == 5


def test_what_is_trained_gets_a_gradient_and_the_rest_none(tiny):
    method = make_method(tiny)
    method.losses(tiny.batch(0), 0)["loss_reconstruction"].backward()
    unused = {name for name in dict(method.student.named_parameters()) if "classifier" in name}
    unused |= {"encoder.fc_norm.weight", "encoder.fc_norm.bias", "encoder.stem.pos_embed"}
    assert tiny.without_gradient(method.student) == unused


def test_training_lowers_the_error(tiny):
    method = make_method(tiny)
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    optimizer, before = torch.optim.AdamW(parameters, lr=3e-3), tiny.batch(9)
    start = reconstruction_error(method.student.eval(), [before["labeled"]])["reconstruction_error"]
    tiny.trainer(method, 40, optimizer=optimizer).train()
    end = reconstruction_error(method.student.eval(), [before["labeled"]])["reconstruction_error"]
    assert end < 0.97 * start


def test_the_error_is_the_mean_over_images_whatever_their_batches(tiny):
    model, batch = make_method(tiny).student.eval(), tiny.batch(3)
    whole = reconstruction_error(model, [batch["labeled"]])["reconstruction_error"]
    parts = in_parts(batch, 4)
    assert [len(part) for part in parts] == [4, 2]
    for batches in (parts, parts[::-1], in_parts(batch, 1)):
        result = reconstruction_error(model, batches)["reconstruction_error"]
        assert result == pytest.approx(whole, rel=1e-5)


@needs_fork
def test_ranks_share_the_images_and_agree_on_the_error(tiny, tmp_path):
    model = make_method(tiny).student.eval()
    batch = tiny.batch(3)
    whole = reconstruction_error(model, [batch["labeled"]])["reconstruction_error"]

    def measure(rank):
        return reconstruction_error(model, in_parts(batch, 1)[rank::2], Ranks.of_run().run)

    for found in on_two_ranks(measure, tmp_path):
        assert found["reconstruction_error"] == pytest.approx(whole, rel=1e-5)


def test_the_error_is_the_same_at_every_call_and_leaves_the_generator_alone(tiny):
    model, batch = make_method(tiny).student.eval(), tiny.batch(3)
    state = torch.get_rng_state()
    first, second = (reconstruction_error(model, [batch["labeled"]]) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_masked_in_their_own_ways(tiny):
    model, batch = make_method(tiny).student.eval(), tiny.batch(3, size=1)
    errors = set()
    for index in range(8):
        moved = Part(batch["labeled"].views, None, torch.tensor([index]))
        errors.add(reconstruction_error(model, [moved])["reconstruction_error"])
    assert len(errors) == 8


def test_the_error_of_no_images_is_refused(tiny):
    with pytest.raises(ValueError, match="0 images are not allowed"):
        reconstruction_error(make_method(tiny).student, [])


@pytest.mark.parametrize(("classes", "image_size"), [(3, 8), (5, 8), (5, 12)])
def test_fine_tuning_begins_with_the_encoder_and_a_classifier_of_its_own(tiny, classes, image_size):
    method = make_method(tiny)
    tiny.trainer(method, 3).train()
    file = io.BytesIO()
    torch.save(method.student.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = tiny.build(lambda: vit(classes, image_size), seed=4)
    model = tiny.build(lambda: vit(classes, image_size), seed=4)
    encoder = encoder_state(state)
    assert not any(name.startswith("classifier") for name in encoder)
    load_encoder(model, encoder, source="pre-training")
    trained = method.student.encoder
    assert tiny.same(model.blocks.state_dict(), trained.blocks.state_dict())
    assert torch.equal(model.stem.cls_token, trained.stem.cls_token)
    assert tiny.same(model.classifier.state_dict(), fresh.classifier.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    if image_size == 8:
        images = tiny.batch(1)["labeled"].views["image"]
        assert torch.equal(model.eval().features(images), trained.eval().features(images))


def test_a_run_that_fine_tunes_is_told_an_autoencoders_file_by_its_weights(tiny, tmp_path):
    student = make_method(tiny).student
    content = {"student": student.state_dict(), "inference_model": "student", "format": FORMAT}
    write_checkpoint(tmp_path / "model_final.pth", content)
    model = tiny.build(vit, seed=4)
    load_weights(model, str(tmp_path))
    assert tiny.same(model.blocks.state_dict(), student.encoder.blocks.state_dict())
    again = make_method(tiny).student
    load_weights(again, str(tmp_path))  # another pre-training goes on with the decoder, too
    assert tiny.same(again.state_dict(), student.state_dict())


def test_weights_without_an_encoder_are_refused():
    with pytest.raises(ValueError, match=r"\['stem.weight'\]... are not allowed"):
        encoder_state({"stem.weight": torch.zeros(1)})


def test_imwa_averages_encoder_and_decoder(tiny):
    method, members = make_method(tiny), tiny.Members()
    tiny.trainer(method, 4, episodes=2, members=2, hooks=[members]).train()
    state, (one, other) = method.student.state_dict(), (members.states[1, m] for m in (0, 1))
    differing = {
        name for name in state if not tiny.same(one["student"][name], other["student"][name])
    }
    trained = {name for name, p in method.student.named_parameters() if p.requires_grad}
    assert differing == trained
    tiny.check_average(method, members)


def test_one_member_in_two_episodes_is_plain_training_bitwise(tiny):
    plain, wrapped = make_method(tiny), make_method(tiny)
    tiny.trainer(plain, 4, imwa=False).train()
    tiny.trainer(wrapped, 4, episodes=2).train()
    assert tiny.same(tiny.states(plain), tiny.states(wrapped))


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_goes_on_from_its_saved_state_bitwise(tiny, step):
    save, straight = tiny.SaveAt(step), make_method(tiny)
    trainer = tiny.trainer(straight, 4, episodes=2, members=2)
    trainer.register_hooks([save])
    trainer.train()
    resumed = make_method(tiny)
    trainer = tiny.trainer(resumed, 4, episodes=2, members=2)
    trainer.load_state_dict(save.read())
    trainer.train()
    assert tiny.same(tiny.states(straight), tiny.states(resumed))
