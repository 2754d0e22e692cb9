import math

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.classification.models.mae import (
    MAEOptions,
    MaskedAutoencoder,
    masked_error,
    normalized_patches,
    patchify,
    sincos_positions,
    split_patches,
)
from ssod_imwa.classification.models.vit import ViT
from ssod_imwa.classification.models.weights import load_encoder


def encoder(classes=5, image_size=16):
    torch.manual_seed(0)
    return ViT(classes, image_size=image_size, patch_size=4, dim=24, depth=2, heads=3)


def autoencoder(**changes):
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return MaskedAutoencoder(encoder(), MAEOptions(**{**decoder, **changes}))


def batch(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return images, torch.rand(count, 16, generator=generator)


def test_patches_are_cut_row_by_row():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    for n in range(6):
        row, column = 4 * (n // 3), 4 * (n % 3)
        for pixel in range(16):
            y, x = row + pixel // 4, column + pixel % 4
            assert patches[1, n, 3 * pixel : 3 * pixel + 3].equal(images[1, :, y, x])


def unpatchify(patches, patch_size, columns):
    batch, count, pixels = patches.shape
    p = patch_size
    cut = patches.reshape(batch, count // columns, columns, p, p, pixels // p**2)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, pixels // p**2, -1, columns * p)


def test_targets_have_mean_0_and_variance_1_in_each_patch():
    patches = 5 + 3 * torch.randn(2, 4, 48)
    targets = normalized_patches(patches).numpy()
    x = patches.double().numpy()
    for b in range(2):
        for n in range(4):
            expected = (x[b, n] - x[b, n].mean()) / math.sqrt(x[b, n].var(ddof=1) + 1e-6)
            assert np.abs(targets[b, n] - expected).max() < 1e-5
    assert normalized_patches(torch.ones(1, 1, 48)).eq(0).all()


def test_the_smallest_noise_stays_visible():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.7, 0.1]])
    visible, masked = split_patches(noise, 2)
    assert visible.tolist() == [[1, 3], [3, 0]]
    assert masked.tolist() == [[True, False, True, False], [False, True, True, False]]


@pytest.mark.parametrize(
    ("ratio", "masked"), [(0.75, 12), (0.5, 8), (0.9, 14), (0.0625, 1), (0.9375, 15)]
)
def test_the_masked_patches_are_counted_exactly(ratio, masked):
    model = autoencoder(mask_ratio=ratio)
    assert model.masked_patches == masked
    assert model.visible_patches == 16 - masked
    _, where = split_patches(batch()[1], model.visible_patches)
    assert where.sum(1).tolist() == [masked] * 3


def test_vit_b_16_sees_49_of_196_patches():
    with torch.device("meta"):
        model = MaskedAutoencoder(ViT(1000), MAEOptions())
    assert (model.visible_patches, model.masked_patches) == (49, 147)
    assert len(model.decoder_blocks) == 8
    assert model.decoder_embed.out_features == 512
    decoder = sum(p.numel() for n, p in model.named_parameters() if n.startswith("decoder"))
    blocks = 8 * (12 * 512**2 + 13 * 512)
    assert decoder == (768 * 512 + 512) + blocks + 2 * 512 + (512 * 768 + 768)


def test_loss_is_that_of_a_loop_over_masked_patches():
    model = autoencoder().eval()
    images, noise = batch()
    loss = model(images, noise)
    order = noise.numpy().argsort(axis=1)
    visible = torch.from_numpy(order[:, :4].copy())
    pixels = model.reconstruct(images, visible).detach().double().numpy()
    patches = patchify(images, 4).double().numpy()
    errors = []
    for b in range(3):
        for n in order[b, 4:]:
            target = (patches[b, n] - patches[b, n].mean()) / math.sqrt(
                patches[b, n].var(ddof=1) + 1e-6
            )
            errors.append(sum((p - t) ** 2 for p, t in zip(pixels[b, n], target, strict=True)) / 48)
    assert loss.item() == pytest.approx(sum(errors) / 36, rel=1e-5)


def test_only_masked_patches_have_an_error():
    pixels, targets = torch.randn(2, 6, 12), torch.randn(2, 6, 12, requires_grad=True)
    masked = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    gradient = torch.autograd.grad(masked_error(pixels, targets, masked), targets)[0]
    assert gradient[~masked].eq(0).all()
    assert torch.allclose(gradient[masked], (2 * (targets - pixels) / 12 / 6)[masked])


def test_reconstruction_does_not_see_masked_patches():
    model = autoencoder().eval()
    images, noise = batch()
    visible, masked = split_patches(noise, model.visible_patches)
    changed = patchify(images, 4)
    changed[masked] = torch.randn_like(changed[masked])
    other = unpatchify(changed, 4, columns=4)
    assert model.reconstruct(other, visible).equal(model.reconstruct(images, visible))
    changed[~masked] += 1
    other = unpatchify(changed, 4, columns=4)
    assert not model.reconstruct(other, visible).allclose(model.reconstruct(images, visible))


def test_reconstruction_does_not_depend_on_the_order_of_visible_patches():
    model = autoencoder().eval()
    images, noise = batch()
    visible, _ = split_patches(noise, model.visible_patches)
    expected = model.reconstruct(images, visible)
    assert torch.allclose(model.reconstruct(images, visible.flip(1)), expected, atol=1e-5)


def test_a_place_is_decoded_from_its_own_position():
    # Without attention between tokens a masked patch is a function of its position alone.
    model = autoencoder(decoder_depth=0).eval()
    images, noise = batch()
    visible, masked = split_patches(noise, model.visible_patches)
    pixels = model.reconstruct(images, visible)
    for b in range(3):
        for n in range(16):
            if masked[b, n]:
                token = model.mask_token[0, 0] + model.decoder_positions[0, 1 + n]
                assert torch.allclose(
                    pixels[b, n], model.decoder_pixels(model.decoder_norm(token)), atol=1e-5
                )


def test_positions_are_sines_and_cosines_of_rows_and_columns():
    positions = sincos_positions(2, 3, 16)[0]
    assert positions[0].eq(0).all()
    for row in range(2):
        for column in range(3):
            rates = [10000 ** (-i / 4) for i in range(4)]
            expected = [
                wave(at * rate)
                for wave in (math.sin, math.cos)
                for at in (row, column)
                for rate in rates
            ]
            assert positions[1 + 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)
    model = autoencoder()
    assert model.encoder.stem.pos_embed.equal(sincos_positions(4, 4, 24))
    assert not model.encoder.stem.pos_embed.requires_grad


def test_gradients_reach_what_is_trained():
    model = autoencoder()
    model(*batch()).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        "encoder.stem.pos_embed",
        "encoder.fc_norm.weight",
        "encoder.fc_norm.bias",
        "encoder.classifier.weight",
        "encoder.classifier.bias",
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.abs().sum() > 0, name


def test_loss_falls_on_a_few_images():
    model = autoencoder()
    images, noise = batch()
    smooth = nn.functional.interpolate(images[:, :, :4, :4], size=(16, 16), mode="bilinear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(smooth, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.95
    assert losses[-1] < 0.5 * losses[0]


def test_fine_tuning_starts_from_the_encoder():
    model = autoencoder()
    with torch.no_grad():
        for p in model.encoder.blocks.parameters():
            p.add_(0.01)
    tuned = encoder(classes=9)
    load_encoder(tuned, model.encoder.state_dict(), source="MAE")
    for name, x in model.encoder.state_dict().items():
        assert name.startswith("classifier.") or tuned.state_dict()[name].equal(x), name
    assert all(p.requires_grad for p in tuned.parameters())
    larger = encoder(classes=9, image_size=24)
    load_encoder(larger, model.encoder.state_dict(), source="MAE")
    assert larger(torch.zeros(1, 3, 24, 24)).shape == (1, 9)


def test_loss_is_float32_under_autocast():
    model = autoencoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(*batch())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(*batch()).item(), rel=0.05)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 0.01, 0.99])
def test_masks_of_all_or_nothing_are_refused(ratio):
    with pytest.raises(ValueError, match=f"mask_ratio = {ratio} is not allowed"):
        autoencoder(mask_ratio=ratio)


def test_decoder_width_is_checked():
    with pytest.raises(ValueError, match=r"decoder_width = 18 is not allowed .*decoder_heads = 4"):
        autoencoder(decoder_width=18, decoder_heads=4)
