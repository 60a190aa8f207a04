import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import BLUE, GREEN, RED, WHITE, assert_color, refusal, solid
from PIL import Image

from latent_dmmd.data import images
from latent_dmmd.data.images import read_image
from latent_dmmd.data.sources import load_images
from latent_dmmd.utils.errors import DataError


def noise(*size):
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


# reading one image


def test_pixels_are_kept(tmp_path):
    pixels = noise(16, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    decoded = read_image(tmp_path / "a.png", 16)
    assert decoded.is_contiguous() and torch.equal(decoded, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(read_image((tmp_path / "a.png").read_bytes(), 16), decoded)


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = GREEN
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        assert_color(read_image(tmp_path / name, 10), GREEN)
        assert_color(read_image(tmp_path / name, 40)[:, 12:28, 12:28], GREEN)


def test_exif_orientation_is_followed(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8], image[8:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise: the top becomes the right
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    decoded = read_image(tmp_path / "a.jpg", 16)
    assert_color(decoded[:, :, 9:], RED, 3)
    assert_color(decoded[:, :, :7], BLUE, 3)


def palette_with_transparency(path):
    image = solid("P", 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (0, 0, 8, 4))
    image.save(path, transparency=0)


def sixteen_bits(path):
    Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)).save(path)


def animated(path):
    frames = [solid("RGB", BLUE), solid("RGB", RED)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


ODD = {
    "grey L": ("a.png", lambda p: solid("L", 77).save(p), (77, 77, 77)),
    "1 bit": ("a.png", lambda p: solid("1", 1).save(p), WHITE),
    "16-bit grey": ("a.png", sixteen_bits, (128, 128, 128)),
    "16-bit TIFF": ("a.tif", sixteen_bits, (128, 128, 128)),
    "16-bit TIFF, big-endian": ("a.tif", lambda p: solid("I;16B", 0x80FF).save(p), (128, 128, 128)),
    "LA, half transparent": ("a.png", lambda p: solid("LA", (0, 51)).save(p), (204, 204, 204)),
    "RGBA, transparent red": ("a.png", lambda p: solid("RGBA", (*RED, 0)).save(p), WHITE),
    "RGBA, a fifth of red": ("a.png", lambda p: solid("RGBA", (*RED, 51)).save(p), (255, 204, 204)),
    "RGB, one color transparent": ("a.png", lambda p: solid("RGB", RED).save(p, transparency=RED), WHITE),
    "palette": ("a.png", lambda p: solid("RGB", (10, 20, 30)).quantize().save(p), (10, 20, 30)),
    "CMYK JPEG": ("a.jpg", lambda p: solid("CMYK", (0, 255, 255, 0)).save(p, quality=95), RED),
    "YCbCr JPEG": ("a.JPEG", lambda p: solid("RGB", GREEN).save(p, "JPEG", quality=95), GREEN),
    "LAB TIFF": ("a.tiff", lambda p: solid("LAB", (255, 128, 128)).save(p), WHITE),
    "animated GIF": ("a.gif", animated, BLUE),
    "animated WebP": ("a.webp", animated, BLUE),
    "BMP": ("a.bmp", lambda p: solid("RGB", BLUE).save(p), BLUE),
    "spaces and umlauts": ("ein schönes Bild ß.png", lambda p: solid("RGB", BLUE).save(p), BLUE),
    "PNG named .jpg": ("a.jpg", lambda p: solid("RGB", BLUE).save(p, "PNG"), BLUE),
}


@pytest.mark.parametrize("name, save, color", ODD.values(), ids=ODD.keys())
def test_odd_images(tmp_path, name, save, color):
    save(tmp_path / name)
    (decoded,) = load_images(str(tmp_path), 8)
    assert decoded.shape == (3, 8, 8)
    assert_color(decoded, color, 2)


def test_palette_with_transparency(tmp_path):
    palette_with_transparency(tmp_path / "a.png")
    decoded = read_image(tmp_path / "a.png", 8)
    assert_color(decoded[:, :4], BLUE)
    assert_color(decoded[:, 4:], WHITE)


def truncate(path, image, **options):
    image.save(path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt_png(path):
    """A PNG whose compressed data are not."""
    solid("RGB", RED).save(path)
    raw = bytearray(path.read_bytes())
    start = raw.index(b"IDAT") + 4
    raw[start : start + 8] = b"\xff" * 8
    path.write_bytes(raw)


def text_bomb(path):
    """A PNG whose text chunk unpacks to more than Pillow allows."""
    import zlib

    solid("RGB", RED).save(path)
    raw = path.read_bytes()
    chunk = b"zTXtComment\x00\x00" + zlib.compress(b"x" * 2**21)
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(raw[:33] + chunk + raw[33:])


BAD = {
    "truncated JPEG": ("a.jpg", lambda p: truncate(p, Image.fromarray(noise(32, 32, 3)))),
    "truncated PNG": ("a.png", lambda p: truncate(p, Image.fromarray(noise(32, 32, 3)))),
    "truncated GIF": ("a.gif", lambda p: truncate(p, Image.fromarray(noise(32, 32)))),
    "truncated WebP": ("a.webp", lambda p: truncate(p, Image.fromarray(noise(32, 32, 3)))),
    "truncated TIFF": ("a.tif", lambda p: truncate(p, Image.fromarray(noise(32, 32, 3)), compression="tiff_lzw")),
    "corrupt PNG": ("a.png", corrupt_png),
    "text bomb": ("a.png", text_bomb),
    "bomb of 100 megapixels": ("a.png", lambda p: Image.new("1", (10_000, 10_000)).save(p)),
    "zero bytes": ("a.png", lambda p: p.write_bytes(b"")),
    "text": ("a.png", lambda p: p.write_text("hello")),
    "1x1": ("a.png", lambda p: solid("RGB", RED, (1, 1)).save(p)),
    "float TIFF": ("a.tif", lambda p: Image.fromarray(np.ones((32, 32), np.float32)).save(p)),
    "32-bit TIFF": ("a.tif", lambda p: Image.fromarray(np.full((32, 32), 200, np.int32)).save(p)),
    "spaces and umlauts": ("ein  schönes Bild ß.png", lambda p: p.write_bytes(b"")),
}


@pytest.mark.parametrize("name, save", BAD.values(), ids=BAD.keys())
def test_bad_images_are_named(tmp_path, name, save):
    save(tmp_path / name)
    source = load_images(str(tmp_path), 32)
    assert len(source) == 1
    assert str(tmp_path / name) in refusal(source.__getitem__, 0)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_damaged_bytes_never_give_another_error(suffix):
    buffer = BytesIO()
    Image.fromarray(noise(16, 16, 3)).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    rng = np.random.default_rng(0)
    for _ in range(150):
        raw = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        at = rng.integers(0, min(len(raw), 200), 4)
        raw[at] = rng.integers(0, 256, 4)
        try:
            assert read_image(raw.tobytes(), 16, "damaged").shape == (3, 16, 16)
        except DataError as error:
            assert "damaged" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("error", [struct.error("unpack"), KeyError(3), TypeError(), MemoryError(), OSError("a\nb")])
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, error):
    def decode(file):
        raise error

    solid("RGB", RED).save(tmp_path / "a.png")
    monkeypatch.setattr(images.ImageOps, "exif_transpose", decode)
    text = refusal(read_image, tmp_path / "a.png", 8)
    assert str(tmp_path / "a.png") in text and not text.endswith(": ")


@pytest.mark.parametrize("limit", [300, 150])
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    """Pillow warns above the limit and raises above twice the limit; both are refused."""
    solid("RGB", RED, (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    text = refusal(read_image, tmp_path / "a.png", 16)
    assert str(tmp_path / "a.png") in text and f"more than {limit} pixels" in text


def test_an_eighth_of_the_resolution_is_too_small(tmp_path):
    solid("RGB", RED, (40, 4)).save(tmp_path / "small.png")
    solid("RGB", RED, (40, 5)).save(tmp_path / "large.png")
    assert "40x4" in refusal(read_image, tmp_path / "small.png", 32)
    assert_color(read_image(tmp_path / "large.png", 32), RED)


def test_directory_is_no_image(tmp_path):
    (tmp_path / "x.png").mkdir()
    assert "x.png" in refusal(read_image, tmp_path / "x.png", 8)
    assert "no images" in refusal(load_images, str(tmp_path), 8)
    solid("RGB", RED).save(tmp_path / "x.png" / "inner.png")
    assert load_images(str(tmp_path), 8).names == [str(tmp_path / "x.png" / "inner.png")]


# masks and images to edit


def saved(image, path, **options):
    image.save(path, **options)
    return path


def half_mask(mode, on, off=0):
    """8 × 8 pixels whose left half is selected."""
    mask = Image.new(mode, (8, 8), off)
    mask.paste(on, (0, 0, 4, 8))
    return mask


def palette_mask():
    mask = half_mask("P", 1)
    mask.putpalette([0, 0, 0, 10, 20, 30])  # the selected index is dark
    return mask


MASKS = {
    "0 and 255": lambda: half_mask("L", 255),
    "0 and 1": lambda: half_mask("L", 1),
    "one bit": lambda: half_mask("1", 1),
    "palette": palette_mask,
    "colour": lambda: half_mask("RGB", (255, 255, 255), (0, 0, 0)),
    "alpha": lambda: half_mask("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)),
    "opaque": lambda: half_mask("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)),
    "16 bits": lambda: half_mask("I;16", 65535),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_select_the_same(kind, tmp_path):
    mask = images.open_mask(saved(MASKS[kind](), tmp_path / "mask.png"))
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), np.asarray(half_mask("L", 255)))


def test_a_mask_that_selects_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match="mask.png selects nothing"):
        images.open_mask(saved(Image.new("L", (8, 8)), tmp_path / "mask.png"))


def test_a_phones_photograph_and_its_mask_are_turned(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90° clockwise
    photo = Image.new("RGB", (16, 8), RED)
    photo.paste(BLUE, (0, 0, 8, 8))
    turned = images.open_rgb(saved(photo, tmp_path / "photo.png", exif=exif))
    assert turned.size == (8, 16) and turned.getpixel((4, 2)) == BLUE and turned.getpixel((4, 13)) == RED
    mask = images.open_mask(saved(half_mask("L", 255), tmp_path / "mask.png", exif=exif))
    assert mask.getpixel((4, 1)) == 255 and mask.getpixel((4, 6)) == 0
