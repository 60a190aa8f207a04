import pytest
import torch
from conftest import BUILDERS, frozen
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from latent_dmmd.data import autoencoder
from latent_dmmd.data.autoencoder import (
    decode_pixels,
    encode_moments,
    load_autoencoder,
    reconstruct,
    standardise,
    unstandardise,
)
from latent_dmmd.utils.hashing import module_hash
from latent_dmmd.utils.images import to_pixels, to_uint8


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def message(folder):
    with pytest.raises(ValueError) as caught:
        load_autoencoder(str(folder))
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text


def test_class_is_read_from_the_configuration(each_vae, tmp_path):
    each_vae.train().requires_grad_(True).half().save_pretrained(tmp_path)
    vae = load_autoencoder(str(tmp_path))
    assert type(vae) is type(each_vae)
    assert vae.dtype == torch.float32 and not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    for name, weight in each_vae.state_dict().items():
        assert torch.equal(vae.state_dict()[name], weight.float()), name


def test_folder_without_autoencoder(tmp_path):
    assert "config.json" in message(tmp_path)
    assert "config.json" in message(tmp_path / "missing")
    assert "hub name" in message("nobody/such-autoencoder")
    (tmp_path / "config.json").write_text('{"_class_name": ')
    assert "no autoencoder" in message(tmp_path)


@pytest.mark.parametrize("inside", ["autoencoder", "vae", "pipeline/vae"])
def test_the_autoencoder_in_a_folder_is_named(tiny_vae, tmp_path, inside):
    """Of the folders of a run and of a pipeline, which are easily taken for it."""
    tiny_vae.save_pretrained(tmp_path / inside)
    assert message(tmp_path).endswith(f"; did you mean {tmp_path / inside}?")
    assert message("elpv-vea").endswith("; did you mean elpv-vae?")


def test_another_class_is_refused(tmp_path):
    UNet2DModel(
        8, block_out_channels=(4, 4), norm_num_groups=2, attention_head_dim=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(tmp_path)  # fmt: skip
    text = message(tmp_path)
    assert "UNet2DModel" in text and all(name in text for name in BUILDERS)


@pytest.mark.parametrize("damage", ["missing", "truncated", "incomplete", "another shape"])
def test_damaged_weights_are_refused(tiny_vae, tmp_path, damage):
    tiny_vae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "incomplete":
        weights = load_file(path)
        del weights["encoder.conv_in.weight"]
        save_file(weights, path)
    else:
        weights = load_file(path)
        weights["encoder.conv_in.weight"] = torch.zeros(3, 3)
        save_file(weights, path)
    text = message(tmp_path)
    if damage == "incomplete":
        assert "encoder.conv_in.weight" in text


def test_moments_are_those_of_the_autoencoder(each_vae):
    pixels = noise(3, 3, 32, 32).tanh()
    mean, std = encode_moments(each_vae, pixels)
    output = each_vae.encode(pixels)
    if type(each_vae).__name__ == "AutoencoderKL":
        assert torch.equal(mean, output.latent_dist.mean)
        assert torch.equal(std, output.latent_dist.std) and (std > 0).all()
    else:
        assert torch.equal(mean, output[0])
        assert torch.equal(std, torch.zeros_like(mean))
    assert mean.shape == std.shape == (3, 4, 16, 16)
    assert torch.equal(decode_pixels(each_vae, mean), each_vae.decode(mean).sample)


def test_moments_and_pixels_are_float32_whatever_the_weights(each_vae):
    each_vae.bfloat16()
    mean, std = encode_moments(each_vae, noise(1, 3, 32, 32))
    assert mean.dtype == std.dtype == decode_pixels(each_vae, mean).dtype == torch.float32


def test_decoding_is_differentiable(each_vae):
    z = noise(1, 4, 16, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(decode_pixels(each_vae, z).sum(), z)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 4, 3, 3), (2, 5, 4, 3, 3)])
def test_standardise_and_its_inverse(shape):
    z = noise(*shape).double()
    mean, std = [1.0, -2.0, 0.0, 5.0], [0.5, 2.0, 1.0, 10.0]
    standard = standardise(z, mean, std)
    torch.testing.assert_close(standard[..., 3, :, :], (z[..., 3, :, :] - 5) / 10)
    torch.testing.assert_close(unstandardise(standard, mean, std), z)
    torch.testing.assert_close(standardise(z, torch.tensor(mean), torch.tensor(std)), standard)


def test_uint8_survives_the_way_to_pixels_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(values)
    assert pixels[0] == -1 and pixels[-1] == 1
    assert torch.equal(to_uint8(pixels), values)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_reconstruct(each_vae):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = reconstruct(each_vae, images)
    assert result.dtype == torch.uint8 and result.shape == images.shape
    expected = each_vae.decode(encode_moments(each_vae, images / 127.5 - 1)[0]).sample
    expected = ((expected + 1) / 2).clamp(0, 1) * 255
    assert (result - expected).abs().max() <= 0.501
    assert torch.equal(result, reconstruct(each_vae, images))


def test_reconstruct_clips(tiny_vae, monkeypatch):
    monkeypatch.setattr(autoencoder, "decode_pixels", lambda vae, z: torch.tensor([-3.0, 3.0]).expand(1, 3, 2, 2))
    assert set(reconstruct(tiny_vae, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).unique().tolist()) == {0, 255}


def test_hash_changes_with_any_weight(each_vae):
    before = module_hash(each_vae)
    assert before == module_hash(frozen(type(each_vae).__name__)) and len(before) == 16
    for weight in each_vae.state_dict().values():
        first = weight.view(-1)[0].clone()
        weight.view(-1)[0] += 0.01
        assert module_hash(each_vae) != before
        weight.view(-1)[0] = first
    assert module_hash(each_vae) == before
