"""The masked autoencoder (He et al., arXiv 2111.06377), which LiVT pre-trains with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import nn

from ssod_imwa.classification.models.vit import WEIGHT_STD, ViT
from ssod_imwa.config.options import Options, option

NORM_EPS = 1e-6  # of layer norms, and below the variance of a patch's pixels


@dataclass(frozen=True)
class MAEOptions(Options):
    """What is masked, and what reconstructs it."""

    mask_ratio: float = option(0.75, "part of the patches that is masked", above=0, below=1)
    decoder_width: int = option(
        512, "width of the decoder's tokens, a multiple of 4 and of the heads", low=4
    )
    decoder_depth: int = option(8, "blocks of the decoder", low=0)
    decoder_heads: int = option(16, "heads of each attention of the decoder", low=1)


class MaskedAutoencoder(nn.Module):
    """Reconstructs the masked patches of images from the visible ones.

    Called on images it returns the loss. `encoder` is a whole classifier: to fine-tune, give its
    state to `load_encoder` (in `models.weights`) of a new one. As in MAE's code, the encoder's
    last layer norm is left behind with the decoder, as the classifier normalizes pooled features
    by one of its own, `fc_norm`; that and the classifier are not trained here. Position embeddings
    are fixed here (sines and cosines), and trained in fine-tuning.

    Args:
        encoder: changed in place: weights as MAE draws them, positions fixed.
        options: of masks and decoder.

    Raises:
        ValueError: the width is no such multiple, or no patch would be visible or masked.

    Example:
        >>> encoder = ViT(10, image_size=16, patch_size=4, dim=32, depth=2, heads=2)
        >>> options = MAEOptions(decoder_width=16, decoder_depth=1, decoder_heads=2)
        >>> model = MaskedAutoencoder(encoder, options)
        >>> model.masked_patches, model(torch.rand(2, 3, 16, 16), torch.rand(2, 16)).shape
        (12, torch.Size([]))
    """

    decoder_positions: torch.Tensor

    def __init__(self, encoder: ViT, options: MAEOptions) -> None:
        super().__init__()
        dim, heads = options.decoder_width, options.decoder_heads
        if dim % heads or dim % 4:
            raise ValueError(
                f"decoder_width = {dim} is not allowed (must be a multiple of decoder_heads = "
                f"{heads} and of 4)"
            )
        self.encoder = encoder
        embedding = encoder.stem.patch_embed
        self.patch_size: int = embedding.patch_size[0]
        rows, columns = embedding.grid_size
        self.visible_patches = _visible(rows * columns, options.mask_ratio)
        self.masked_patches = rows * columns - self.visible_patches
        width = encoder.num_features
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(rows, columns, dim)
        self.register_buffer("decoder_positions", positions, persistent=False)
        self.decoder_blocks = nn.Sequential(
            *(
                Block(dim, heads, qkv_bias=True, norm_layer=type(encoder.fc_norm))
                for _ in range(options.decoder_depth)
            )
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.decoder_pixels = nn.Linear(dim, 3 * self.patch_size**2)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        encoder = self.encoder
        for module in (
            encoder.blocks,
            self.decoder_embed,
            self.decoder_blocks,
            self.decoder_pixels,
        ):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        # The patch embedding is a linear layer on a patch's pixels, whatever its layout in memory.
        weight = encoder.stem.patch_embed.proj.weight
        flat = weight.new_empty(encoder.num_features, weight[0].numel())
        weight.copy_(nn.init.xavier_uniform_(flat).view(weight.shape))
        nn.init.normal_(encoder.stem.cls_token, std=WEIGHT_STD)
        nn.init.normal_(self.mask_token, std=WEIGHT_STD)
        rows, columns = encoder.stem.patch_embed.grid_size
        encoder.stem.pos_embed.copy_(sincos_positions(rows, columns, encoder.num_features))
        for unused in (encoder.stem.pos_embed, encoder.fc_norm, encoder.classifier):
            unused.requires_grad_(False)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The mean over masked patches of the squared error of their normalized pixels.

        Args:
            images: (B, 3, H, W) of the encoder's size, normalized.
            noise: (B, N) of the patches, row by row, uniform: the smallest stay visible.

        Returns:
            A float32 scalar.
        """
        visible, masked = split_patches(noise, self.visible_patches)
        targets = normalized_patches(patchify(images, self.patch_size))
        return masked_error(self.reconstruct(images, visible), targets, masked)

    def reconstruct(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Pixels (B, N, 3 p²) of all patches, from those at indices `visible` (B, n)."""
        stem = self.encoder.stem
        tokens = _gathered(stem.patches(images), visible)
        tokens = self.norm(self.encoder.blocks(stem.with_class_token(tokens)))
        tokens = self.decoder_embed(tokens)
        patches = self.mask_token.to(tokens.dtype).expand(
            len(images), self.decoder_positions.shape[1] - 1, -1
        )
        index = visible[:, :, None].expand(-1, -1, tokens.shape[2])
        patches = patches.scatter(1, index, tokens[:, 1:])
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_positions
        return self.decoder_pixels(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]


def sincos_positions(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Sines and cosines (1, 1 + rows * columns, dim) of rows and columns; 0 for the class token."""
    positions = build_sincos2d_pos_embed([rows, columns], dim)
    return torch.cat([positions.new_zeros(1, dim), positions])[None]


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Patches (B, N, 3 p²) of images (B, 3, H, W), row by row, each pixel's colors together.

    Example:
        >>> patchify(torch.zeros(2, 3, 8, 12), 4).shape
        torch.Size([2, 6, 48])
    """
    batch, colors, height, width = images.shape
    p = patch_size
    cut = images.reshape(batch, colors, height // p, p, width // p, p)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * colors)


def normalized_patches(patches: torch.Tensor) -> torch.Tensor:
    """Patches with mean 0 and (sample) variance 1 each, or 0 where all pixels are equal."""
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return (patches.float() - mean) / (variance + NORM_EPS).sqrt()


def split_patches(noise: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, count) of the smallest noise, and where (B, N) the others are."""
    visible = noise.argsort(dim=1)[:, :count]
    masked = torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)
    return visible, masked


def masked_error(pixels: torch.Tensor, targets: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The squared error per pixel (B, N, P), averaged where `masked` (B, N); in float32."""
    errors = (pixels.float() - targets.float()).square().mean(2)
    return (errors * masked).sum() / masked.sum()


def _gathered(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def _visible(patches: int, mask_ratio: float) -> int:
    visible = round(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise ValueError(
            f"mask_ratio = {mask_ratio} is not allowed with {patches} patches (must leave at least "
            "one visible and one masked)"
        )
    return visible
