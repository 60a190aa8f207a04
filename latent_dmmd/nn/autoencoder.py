"""The small autoencoder that the project trains from scratch, and the discriminator of its patches."""

from diffusers import AutoencoderDC
from torch import nn

from latent_dmmd.utils.errors import check

# stages from full resolution down: channels over width, layers of the encoder, layers of the decoder
STAGES = ((1, 0, 0), (1, 1, 2), (2, 1, 2), (4, 2, 2), (4, 2, 2))
DOWNSAMPLING = {8: 4, 16: 5}  # pixels to one latent along a side: number of stages
WIDTHS = (8, 256)


def check_architecture(latent_channels: int, width: int, downsampling: int) -> None:
    """Raise ConfigError for what `build_autoencoder` does not take."""
    check(downsampling in DOWNSAMPLING, f"downsampling must be 8 or 16; got {downsampling}")
    low, high = WIDTHS
    check(low <= width <= high and width % 8 == 0, f"width must be a multiple of 8 from {low} to {high}; got {width}")
    fits = 0 < latent_channels <= 4 * width and 4 * width % latent_channels == 0
    check(fits, f"latent_channels must divide 4 * width = {4 * width}; got {latent_channels}")


def build_autoencoder(latent_channels: int = 8, width: int = 32, downsampling: int = 16) -> AutoencoderDC:
    """A deep-compression autoencoder (Chen et al., 2025) with random weights and no layer at full resolution.

    The defaults are the bundled architecture: 3.7 million parameters, 16 × 16 pixels to one latent of 8 channels.

    Args:
        latent_channels: Channels of latents, a divisor of 4 · width, so that its shortcuts average whole groups.
        width: Channels at half resolution, a multiple of 8 from 8 to 256; up to four times as many further down.
        downsampling: Pixels to one latent along a side, 8 or 16.

    Raises:
        ConfigError: For other sizes.
    """
    check_architecture(latent_channels, width, downsampling)
    widths, encoder_layers, decoder_layers = zip(*STAGES[: DOWNSAMPLING[downsampling]])
    channels, no_attention = tuple(width * w for w in widths), ((),) * len(widths)
    return AutoencoderDC(
        latent_channels=latent_channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=encoder_layers,
        decoder_layers_per_block=decoder_layers,
        encoder_qkv_multiscales=no_attention,
        decoder_qkv_multiscales=no_attention,
    )


class PatchDiscriminator(nn.Sequential):
    """Logits of overlapping patches of 38 pixels: pixels (B, 3, H, W) to (B, 1, H/8, W/8)."""

    def __init__(self, width: int = 32) -> None:
        conv = nn.utils.parametrizations.spectral_norm
        super().__init__(
            conv(nn.Conv2d(3, width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            conv(nn.Conv2d(width, 2 * width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            conv(nn.Conv2d(2 * width, 4 * width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            conv(nn.Conv2d(4 * width, 1, 3, 1, 1)),
        )
