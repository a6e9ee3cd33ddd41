"""Every test, on a CPU and without a network: python -m pytest -q test_all.py"""
import ast
import colorsys
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import ANY, Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import approx
from torch.distributed.run import get_args_parser
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import data
import diffusion
import sample
import vae

torch.set_num_threads(1)

SCRIPTS = {"data": data, "vae": vae, "diffusion": diffusion, "sample": sample}
HERE = Path(data.__file__).parent
TINY = "--batch-size 8 --max-steps 4 --log-every 1 --no-bf16 --device cpu --workers 2".split()
TINY_VAE = ["--data", "images", "--preset", "shapes", "--size", "16", "--widths", "8", "16",
            "--z-channels", "4", "--disc-width", "8", *TINY]
TINY_UNET = ["--widths", "16", "16", "--sample-steps", "4", "--lr-warmup", "2", *TINY]

# ---- fixtures and helpers -----------------------------------------------------------------------
@pytest.fixture(scope="session")
def shapes():
    return data.Shapes("val", 64)

@pytest.fixture(scope="session")
def images(shapes, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(shapes.draw(torch.arange(60), 20)):
        folder = root / ("train" if i < 40 else "val") / "circle cross square".split()[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        data.to_image(pixels[:, :, :18]).save(folder / f"{i:03d}.png")
    return root

@pytest.fixture(scope="session")
def trained(images, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("trained"))
        os.symlink(images, "images")
        run(vae, *TINY_VAE)
        run(diffusion, *TINY_UNET)
        return Path("out/images").resolve()

@pytest.fixture(autouse=True)
def place(images, tmp_path, monkeypatch):       # every test runs in a folder of its own
    monkeypatch.chdir(tmp_path)
    os.symlink(images, "images")
    torch.manual_seed(0)
    yield
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):   # the loops catch them for good
        signal.signal(number, signal.default_int_handler)

@pytest.fixture
def own(trained):
    return Path(shutil.copytree(trained, "out/images"))

def run(script, *flags):
    """main() with flags like "--out", "here", or "--out here"."""
    words = []
    for flag in map(str, flags):
        words += flag.split() if flag.startswith("--") else [flag]
    script.main(words)

def stopped(function, *args):           # the one line with which it ends the process
    with pytest.raises(SystemExit, match="^error: .*$") as caught:
        function(*args)
    return str(caught.value)

def columns(path):
    return np.genfromtxt(path, delimiter=",", names=True, deletechars="")

def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)

def fill(root, *names):
    """Images of grey 0, 10, 20, ... under these names."""
    for k, name in enumerate(names):
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (24, 20), 10 * k).save(path)

def greys(dataset):
    return [round(pixels.float().mean().item()) for pixels, _ in dataset]

# ---- data ---------------------------------------------------------------------------------------
def test_shapes_are_a_function_of_split_and_row(shapes):
    train = data.Shapes("train", 4)
    assert torch.equal(shapes.draw(torch.tensor([7, 3, 12]), 64), shapes.images[[7, 3, 12]])
    assert len(torch.cat([train.u, shapes.u]).unique(dim=0)) == 22_000

@pytest.mark.parametrize("k, half", [(0, 0.9 * math.pi ** 0.5 / 2), (6, 0.8)])
def test_circles_and_squares_have_their_area_place_and_colours(shapes, k, half):
    for i in range(k, 100, 10):                 # `half` the side of a square of their area
        u = shapes.u[i].numpy()
        image = shapes.images[i].permute(1, 2, 0).numpy() / 255
        change = image - image[0, 0]
        ink = change[np.unravel_index(np.abs(change).sum(2).argmax(), (64, 64))]
        cover = change @ ink / (ink @ ink)
        radius = cover.sum() ** 0.5 / 2 / half
        middle = [np.average(axis, weights=cover) for axis in np.mgrid[:64, :64]]
        assert radius == approx(16 + 8 * u[0], rel=0.01)
        assert middle == approx(23.5 + 16 * u[[3, 2]], abs=0.2)
        assert image[0, 0] == approx(1 - 0.3 * u[5:8], abs=0.01)
        assert tuple(image[0, 0] + ink) == approx(colorsys.hsv_to_rgb(u[4], 1, 0.8), abs=0.01)

@pytest.mark.parametrize("column, value, caption", [
    (0, 0.43, "a small cyan circle in the middle"), (0, 0.45, "a cyan circle in the middle"),
    (3, 0.29, "a cyan circle at the top"), (3, 0.31, "a cyan circle"),
    (4, 0.33, "a green circle in the middle"), (4, 0.43, "a circle in the middle"),
    (9, 0.09, "a circle in the middle"), (9, 0.11, "a cyan circle in the middle"),
    (10, 0.09, "a cyan shape in the middle"), (4, 0.99, "a red circle in the middle")])
def test_captions_are_true_and_leave_out_one_in_ten_and_borders(column, value, caption):
    u = torch.full((1, 12), 0.5)                # of sizes 0.5 is the border
    u[0, column] = value
    assert data.Shapes.caption(Namespace(u=u, targets=[0], classes=["circle"]), 0) == caption

def published_crop(image, size):        # as in guided-diffusion, Dhariwal and Nichol (2021)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image)[top:top + size, left:left + size]

@pytest.mark.parametrize("width, height", [(95, 70), (131, 302), (40, 51), (1, 80)])
def test_crops_are_those_of_published_results(width, height):
    image = Image.effect_noise((width, height), 100).convert("RGB")
    cropped = data.center_crop(image, 64).permute(1, 2, 0).numpy()
    assert cropped == approx(published_crop(image, 64), abs=1)

RAMP = np.arange(256, dtype=np.uint8)[None].repeat(40, 0)
GREY = Image.fromarray(RAMP)

@pytest.mark.parametrize("image", [
    GREY, GREY.quantize(256), GREY.convert("RGB").convert("CMYK"), GREY.convert("LA"),
    Image.fromarray(RAMP * np.uint16(257)), Image.fromarray(np.float32(RAMP)),
    Image.fromarray(np.float32(RAMP / 255))])
def test_kinds_of_images_keep_their_look(image):
    image.save("x.tif")
    read = np.asarray(data.read_image("x.tif")).astype(int)
    assert read == approx(RAMP[:, :, None].repeat(3, 2), abs=1)

def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6                            # the first column belongs on top
    GREY.save("turned.png", exif=exif)
    assert np.array_equal(data.read_image("turned.png").getchannel(0), np.rot90(RAMP, -1))

def test_transparency_is_on_white():
    Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save("rgba.png")
    Image.new("P", (8, 8), 0).save("palette.png", transparency=0)
    assert data.read_image("rgba.png").getpixel((0, 0)) == (255, 204, 204)
    assert data.read_image("palette.png").getpixel((0, 0)) == (255, 255, 255)

def test_jpegs_with_a_harmless_flaw_print_nothing():
    """In a process of its own, since pytest shows every warning."""
    GREY.convert("RGB").save("x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08")
    image = Path("x.jpg").read_bytes()
    Path("x.jpg").write_bytes(image.replace(b"\xff\xdb", b"\0\0\0\0\xff\xdb", 1))
    command = [sys.executable, "-c", "import data; data.read_image('x.jpg')"]
    there = {**os.environ, "PYTHONPATH": str(HERE)}
    assert subprocess.check_output(command, stderr=subprocess.STDOUT, env=there) == b""

def test_a_folder_with_train_and_val():
    fill("data/cifar10", "train/cat/a.png", "train/cat/b/B.PNG", "train/dog/c.tif", "val/d/d.bmp")
    train, val = data.load("cifar10", 16)       # which may be a folder, too
    assert train.targets.tolist() == [0, 0, 1]
    assert greys(train) + greys(val) == [0, 10, 20, 30]

def test_of_plain_classes_every_50th_image_is_held_out():
    fill("mine", "a/only.png", *[f"b/{k:03d}.png" for k in range(1, 120)])
    train, val = data.load("mine", 16)
    assert [Path(path).stem for path in val.paths] == ["only", "050", "100"]
    assert [len(train), Path(train.paths[0]).stem] == [118, "only"]     # it is trained on, too

def test_what_is_left_out_is_said(capsys):
    fill("mine/train", ".hidden/a.png", "cat/.hidden/a.png", "cat/.a.png", "cat/b.png", "b.png")
    fill("mine/val", ".hidden/b.png", "cat/c.png")
    os.makedirs("mine/train/empty")
    Path("mine/train/cat/b.txt").write_text("a caption")
    train, val = data.load("mine", 16)
    assert train.classes == val.classes == ["cat"]
    assert greys(train) + greys(val) == [30, 10]
    assert "mine/train: left out 2 files" in capsys.readouterr().out

@pytest.mark.parametrize("name", ["nowhere", "imagenet", "images/train/cross/none"])
def test_a_missing_folder_ends_in_one_line(name):
    assert "DIR/train/<class>/*" in stopped(data.load, name, 16)

def test_cifar10_without_a_download_ends_in_one_line():
    with patch("torchvision.datasets.cifar.download_and_extract_archive", side_effect=OSError):
        assert "no download" in stopped(data.load, "cifar10", 32)

def test_unreadable_images_are_named_once_and_another_stands_in(capsys):
    fill("mine/train", "a/1.png", "a/2.png", "b/3.png")
    os.symlink("nowhere", "mine/train/b/0.png")
    Path("mine/train/a/1.png").write_text("no image")
    os.symlink("train", "mine/val")
    train, val = data.load("mine", 16)
    assert greys(train) + greys(train) == [10, 10, 20, 20] * 2          # one of its class
    assert greys(val) + greys(val) == [10, 10, 10, 20] * 2              # any, if held out
    named = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert named == [f"mine/{split}/{k}.png" for split in ("train", "val") for k in ("a/1", "b/0")]

def test_a_class_without_a_readable_image_ends_the_run_by_its_name():
    fill("mine", "train/cat/a.png", "train/dog/b.png", "val/cat/c.png")
    Path("mine/train/dog/b.png").write_text("no image")
    assert "class dog" in stopped(run, vae, *TINY_VAE, "--data mine")

def test_captions_beside_images():
    fill("mine/train", *[f"cat/{k}.png" for k in range(4)])
    os.symlink("train", "mine/val")
    texts = [b"A red dog\nand more", b"\xef\xbb\xbfun \xc3\xa9t\xc3\xa9\r\n", b" \nx"]
    for k, text in enumerate(texts):
        Path(f"mine/train/cat/{k}.txt").write_bytes(text)
    train, _ = data.load("mine", 16)
    assert list(map(train.caption, range(4))) == ["A red dog", "un \xe9t\xe9", "cat", "cat"]

def batches(count, *args):
    return list(itertools.islice(data.micro_batches(*args), count))

def test_epochs_are_permutations_of_their_own():
    epochs = np.concatenate(batches(10, 10, 4, 0, 0, 1, 0)).reshape(4, 10).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 4
    assert len(set(map(tuple, epochs))) == 4

def test_the_order_goes_on_from_any_start_and_is_the_seed_s():
    whole = batches(9, 10, 4, 0, 1, 2, 0)
    assert batches(6, 10, 4, 3, 1, 2, 0) == whole[3:]
    assert batches(9, 10, 4, 0, 1, 2, 1) != whole

def test_processes_and_micro_batches_share_the_same_updates():
    whole = np.array(batches(20, 100, 12, 0, 0, 1, 0))
    ranks = [batches(40, 100, 2, 0, rank, 3, 0) for rank in range(3)]
    assert np.array_equal(np.stack(ranks, axis=1).reshape(20, 12), whole)

def test_pixels_make_a_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(pixels)
    assert (x[0], x[-1]) == (-1, 1)
    assert data.to_uint8(torch.tensor([-1.1, 1.1])).tolist() == [0, 255]
    assert torch.equal(data.to_uint8(x), pixels)

# ---- the VAE ------------------------------------------------------------------------------------
def test_published_vae_has_its_parameters_and_names():
    with torch.device("meta"):
        state = vae.VAE([128, 256, 512, 512], 2, 4, attention=True).state_dict()
    published = {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512), "quant_conv.bias": (8,),
        "decoder.up_blocks.2.upsamplers.0.conv.bias": (256,)}
    assert {name: tuple(state[name].shape) for name in published} == published
    assert [len(state), sum(map(torch.numel, state.values()))] == [248, 83_653_863]

def test_upsampling_is_nearest_neighbour_and_a_convolution():
    up = vae.Upsample(3)
    x = torch.randn(2, 3, 5, 4)
    assert_close(up(x), up.conv(F.interpolate(x, scale_factor=2.0)))

@pytest.mark.parametrize("learning", [True, False])
def test_attention_is_that_of_torch(learning):
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    mask = torch.arange(5) < torch.tensor([2, 4])[:, None, None, None]
    with torch.set_grad_enabled(learning):
        masked = vae.attend(q, k, v, mask)
    assert_close(masked, F.scaled_dot_product_attention(q, k, v, mask))

def test_layers_start_keeping_variance_and_the_latent_with_little_noise():
    model = vae.VAE([32, 64], 1, 16, attention=True)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and not name.endswith("conv2"):
            out = layer(torch.randn(8, layer.in_channels, 16, 16))
            assert out.std((0, 2, 3)).mean().item() == approx(1, abs=0.15)
    _, logvar = model.encode(torch.randn(8, 3, 16, 16))
    assert logvar.mean().item() == approx(-4, abs=0.3)

@pytest.mark.parametrize("size, field", [(18, 8), (32, 18), (64, 38), (78, 38), (256, 78)])
def test_the_discriminator_sees_less_than_the_image(size, field, monkeypatch):
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda norm, x: x)   # it sees everything
    x = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits, _ = vae.Discriminator(size, 4)(x)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    assert (x.grad[0, 0] != 0).any(dim=0).sum() == field

def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 2, 4, 8, 8)
    q = Normal(mean, (logvar / 2).exp())
    assert_close(vae.kl_loss(mean, logvar), kl_divergence(q, Normal(0.0, 1.0)).mean())

def test_gan_losses():
    real, fake, zeros = torch.tensor([[2.0, -0.5], [-2.0, 1.0], [0.0, 0.0]])
    bce = F.binary_cross_entropy_with_logits
    both = (bce(real, zeros + 1) + bce(fake, zeros)) / 2
    assert_close(vae.discriminator_loss(real, fake, "bce"), both)
    assert_close(vae.generator_loss(fake, "bce"), bce(fake, zeros + 1))
    assert vae.discriminator_loss(real, fake, "hinge") == (0 + 1.5 + 0 + 2) / 4
    assert vae.generator_loss(fake, "hinge") == 0.5

def test_psnr_and_ssim_are_those_of_numpy():
    a, noise = np.random.default_rng(0).random((2, 3, 11, 11)) / 5      # one window
    b = 0.3 * a + 0.1 * noise
    x, y = torch.from_numpy(np.stack([a, b])).mul(2).sub(1)[:, None]
    weights = np.exp(-(np.mgrid[-5:6, -5:6] ** 2).sum(0) / (2 * 1.5 ** 2)).ravel()
    scores = []
    for p, q in zip(a.reshape(3, 121), b.reshape(3, 121)):
        m, n = np.average([p, q], axis=1, weights=weights)
        (pp, pq), (_, qq) = np.cov(p, q, aweights=weights, ddof=0)
        luminance = (2 * m * n + 1e-4) / (m ** 2 + n ** 2 + 1e-4)
        scores.append(luminance * (2 * pq + 9e-4) / (pp + qq + 9e-4))
    assert vae.ssim(x, y).item() == approx(np.mean(scores), abs=1e-5)
    assert vae.psnr(x, y).item() == approx(-10 * np.log10(np.mean((a - b) ** 2)), abs=1e-5)

@pytest.mark.parametrize("codes", [vae.VQ(7, 2), vae.FSQ(5)])
def test_codes_are_the_nearest_and_gradients_pass_them_by(codes):
    model = vae.VAE([8], 1, 4, attention=False, codes=codes)
    z = (2 * torch.rand(3, 4, 5, 6) - 1).requires_grad_()
    book = getattr(codes, "codebook", torch.linspace(-1, 1, 5)[:, None])
    parts = z.unflatten(1, (-1, book.shape[1])).movedim(2, -1)
    distances = (parts[..., None, :] - book).square().sum(-1)
    code = book[distances.argmin(-1)].movedim(-1, 2).flatten(1, 2).detach().requires_grad_()
    model.decode(z).square().sum().backward()
    model.decoder(model.post_quant_conv(code)).square().sum().backward()
    assert_close(codes(z), code)
    assert_close(z.grad, code.grad)

def one_update(out, *flags):
    run(vae, *TINY_VAE, "--max-steps 1 --adv-warmup 0 --clip 1e9 --out", out, *flags)
    return vae.load_checkpoint(f"{out}/vae.pt")

def test_either_player_learns_from_its_own_loss_alone():
    plain = one_update("plain", "--adv-weight 0 --fm-weight 0")
    fooling = one_update("fooling", "--adv-weight 1 --fm-weight 1")
    hinge = one_update("hinge", "--adv-weight 0 --fm-weight 0 --gan-loss hinge")
    assert [same(plain[part], fooling[part]) for part in ("disc", "vae")] == [True, False]
    assert [same(plain[part], hinge[part]) for part in ("disc", "vae")] == [False, True]

@pytest.mark.parametrize("kind", ["--bottleneck kl", "--bottleneck vq"])
def test_micro_batches_add_up_to_the_whole_batch(kind):
    runs = [one_update("a", kind), one_update("b", kind, "--micro-batch 2 --grad-checkpoint")]
    for player in ("vae_opt", "disc_opt"):
        grads = [[p["exp_avg"] for p in run[player]["state"].values()] for run in runs]
        assert_close(*grads, rtol=1e-3, atol=1e-6)

def test_rates_and_warmups_are_those_of_the_log():
    run(vae, *TINY_VAE, "--max-steps 20 --lr 1e-3 --disc-lr 2e-3 --kl-weight 0.1 --kl-warmup 0.4",
        "--adv-weight 0.5 --adv-warmup 0.6 --fm-weight 0.3")
    log = columns("out/images/vae.csv")
    progress = np.arange(20) / 20
    weights = {"pixel": 1, "kl": 0.1 * np.minimum(1, progress / 0.4),
               "adv": 0.5 * np.minimum(1, progress / 0.6), "fm": 0.3}
    falling = (1 + np.cos(np.pi * progress)) / 2
    state = vae.load_checkpoint("out/images/vae.pt")
    rates = [state[opt]["param_groups"][0]["lr"] for opt in ("vae_opt", "disc_opt")]
    assert rates == approx([1e-3 * falling[-1], 2e-3 * falling[-1]])
    assert log["lr"] == approx(1e-3 * falling)
    for name, weight in weights.items():
        assert log[f"{name}_share"] == approx(weight * log[name] / log["loss"], rel=1e-4)
    assert log["val_psnr"][-1] > log["val_psnr"][0] + 1         # and it learns

def test_train_only_decoder_leaves_the_latents(own):
    run(vae, *TINY_VAE, "--train-only decoder --out tuned --init", own / "vae.pt")
    a, b = (vae.load_checkpoint(f"{out}/vae.pt")["vae"] for out in (own, "tuned"))
    changed = {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"decoder", "post_quant_conv"}

def test_init_takes_the_shape_and_what_is_unset_stays_unset(own):
    run(vae, "--preset cifar10 --size 16 --max-steps 0 --out o --init", own / "vae.pt")
    old, new = (vae.load_checkpoint(f"{out}/vae.pt") for out in (own, "o"))
    assert same(old["vae"], new["vae"])
    config = [new["config"][name] for name in ("widths", "bf16", "compile", "device")]
    assert config == [[8, 16], None, None, None]

PUBLISHED = "given/diffusion_pytorch_model.bin"

@pytest.fixture
def published():
    """The folder `given`, as diffusers saves an AutoencoderKL -> its state dict."""
    state = vae.VAE([8, 16, 16], 2, 3, attention=True).state_dict()
    os.makedirs("given")
    torch.save(state, PUBLISHED)
    about = '{"norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.1}'
    Path("given/config.json").write_text(about)
    return state

@pytest.mark.parametrize("part", ["state_dict", "ema", "model"])
def test_published_vaes_come_in(part, published):
    state = published
    olds = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, old in olds.items():
        state = {key.replace(name, old): tensor for key, tensor in state.items()}
    halves = {f"module._orig_mod.{key}": tensor.half() for key, tensor in state.items()}
    torch.save({part: halves}, PUBLISHED)
    run(vae, "--init given --max-steps 0 --out new --data images --size 16 --device cpu")
    state = vae.load_checkpoint("new/vae.pt")
    assert_close(state["vae"], dict(published), rtol=1e-3, atol=1e-3)
    assert [state["scale"], state["shift"]] == [0.5, 0.1]
    assert vae.load_vae(state).encoder.conv_norm_out.num_groups == 4

def test_of_a_config_the_norm_groups_are_needed(published):
    Path("given/config.json").write_text('{"norm_num_groups": 4}')
    assert vae.read_vae("given")["scale"] == 0.18215
    os.remove("given/config.json")
    assert "config.json" in stopped(vae.read_vae, "given")

@pytest.mark.parametrize("change", [
    {"decoder.conv_in.weight": None}, {"encoder.mid_block.resnets.1.norm2.bias": None},
    {"encoder.down_blocks.0.attentions.0.to_q.weight": torch.ones(1)}])
def test_other_builds_are_refused(change, published):
    torch.save({**published, **change}, PUBLISHED)              # what is no tensor is passed over
    assert list(change)[0] in stopped(vae.read_vae, "given")

def test_exported_vae_is_laid_out_as_in_diffusers(own):
    run(vae, "--resume --max-steps 0")                  # keeps the figures
    run(vae, "--export given")
    config = json.loads(Path("given/config.json").read_text())
    assert config == config | {
        "_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "layers_per_block": 1,
        "latent_channels": 4, "norm_num_groups": 2, "mid_block_add_attention": False,
        "scaling_factor": approx(1 / columns(own / "vae.csv")["z_std"][-1], rel=1e-5)}
    assert same(vae.load_checkpoint(own / "vae.pt")["vae"], torch.load(PUBLISHED))

def test_eval_gives_the_figures_of_its_pictures(own, capsys):
    run(vae, "--eval --png scored --workers 0")
    words = capsys.readouterr().out.splitlines()[-1].split()
    model = vae.load_vae(vae.load_checkpoint(own / "vae.pt"))
    pixels = torch.stack([pixels for pixels, _ in data.load("images", 16)[1]])
    mean, logvar = model.encode(data.to_float(pixels))
    recon = data.to_uint8(model.decode(mean))
    for kind, images in (("real", pixels), ("recon", recon)):
        drawn = [np.asarray(Image.open(f"scored/{kind}/{i:06d}.png")) for i in range(20)]
        assert np.int32(drawn) == approx(images.permute(0, 2, 3, 1).int().numpy(), abs=1)
    psnr = vae.psnr(data.to_float(recon), data.to_float(pixels)).mean().item()
    std = (mean.var() + logvar.exp().mean()).sqrt().item()
    figures = [float(words[words.index(name) + 1]) for name in ("val_psnr", "z_std")]
    assert figures == approx([psnr, std], rel=0.002)
    assert "new folder" in stopped(run, vae, "--eval --png scored")

def test_after_a_resume_no_step_stands_twice(own):
    log = own / "vae.csv"
    text = log.read_text()
    log.write_text(f"{text}5{text.splitlines()[-1][1:]}\n")     # of after the checkpoint
    run(vae, "--resume --max-steps 6")
    assert columns(log)["step"].tolist() == list(range(1, 7))

def test_evaluation_does_not_count_in_the_pace(monkeypatch):
    with patch.object(vae, "evaluate", wraps=vae.evaluate) as spy:
        monkeypatch.setattr(vae, "time", Namespace(time=lambda: time.time() + 9e3 * spy.call_count))
        run(vae, *TINY_VAE, "--eval-every 2")
    assert spy.call_count == 3
    assert columns("out/images/vae.csv")["seconds"].max() < 60

def test_flags_go_over_saved_settings_over_presets_over_defaults(own, monkeypatch):
    def lr(*flags):
        return vae.settings(flags)[0].lr
    monkeypatch.setitem(vae.PRESETS, "cifar10-small", {"lr": 5.0})
    small = ["--preset", "cifar10-small"]
    assert [lr("--data", "shapes"), lr(*small)] == [1e-3, 5]
    assert [lr(*small, "--resume"), lr(*small, "--resume", "--lr", "7")] == [1e-3, 7]
    assert lr("--data", "images", "--out", "new") == vae.PRESETS["imagenet"]["lr"]
    monkeypatch.setitem(diffusion.PRESETS, "shapes", {"lr": 5.0})
    assert diffusion.settings(["--resume"])[0].lr == 2.2e-3

def test_a_run_is_not_started_over_by_mistake(own):
    assert "--overwrite" in stopped(run, vae, *TINY_VAE)
    run(vae, *TINY_VAE, "--overwrite --max-steps 1")
    assert vae.load_checkpoint(own / "vae.pt")["step"] == 1

@pytest.mark.parametrize("flags, advice", [
    ("--bottleneck vq --code-width 3", "--code"), ("--seed -1", "2^64"), ("--resume", "vae.pt"),
    ("--size 15", "multiple of 2"), ("--widths 8 8 8 8 8 8", "of 32"), ("--max-steps 0", "--init"),
    ("--micro-batch 3", "--batch"), ("--train-only decoder", "--init"), ("--init none", "none")])
def test_what_cannot_work_ends_in_one_line_before_anything_is_written(flags, advice):
    assert advice in stopped(run, vae, *TINY_VAE, flags)
    assert os.listdir() == ["images"]

FORK = multiprocessing.get_context("forkserver")        # children of one that has imported torch
FORK.set_forkserver_preload(["torch", "torchvision"])

def child(rank, world, port, name, flags):
    sys.stdout = sys.stderr = open(f"{rank}.log", "w")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run(SCRIPTS[name], *flags)

def start(script, *flags, world=1):
    """-> processes as torchrun starts them; what each prints goes into <rank>.log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    args = [(rank, world, port, script.__name__, flags) for rank in range(world)]
    processes = [FORK.Process(target=child, args=each, daemon=True) for each in args]
    for process in processes:
        process.start()
    return processes

def finish(processes):
    for rank, process in enumerate(processes):
        process.join(120)
        assert process.exitcode == 0, Path(f"{rank}.log").read_text()

def signal_in_second_update(number, script, monkeypatch):
    generator = script.generator
    def signalling(device, seed, step):
        for _ in range(2 if step == 1 else 0):          # twice, as schedulers do
            signal.raise_signal(number)
        return generator(device, seed, step)
    monkeypatch.setattr(script, "generator", signalling)

def weights(script, folder):
    state = torch.load(f"{folder}/{script.__name__}.pt")
    return {name: state[name] for name in ("vae", "disc", "model", "ema") if name in state}

def draw(*flags):
    """What sample.py draws anew in out/images: pixels [n, h, w, 3], and labels."""
    for old in Path("out/images").glob("samples_*/*.png"):
        old.unlink()
    Path("drawn").unlink(missing_ok=True)
    run(sample, "--no-bf16 --device cpu --npz drawn", *flags)
    with np.load("drawn") as drawn:
        return drawn["arr_0"].astype(int), drawn["arr_1"].tolist()

# ---- the method ---------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", ["flow", "sit", "v", "eps"])
def test_path_gives_x0_and_noise_back_from_its_velocity(objective):
    """The derivative is by t on the line, by the angle on the circle."""
    def x(t):
        a, b, _, _ = diffusion.path(objective, t)
        return a * x0 + b * e
    t = torch.linspace(0, 1, 11, dtype=torch.double)
    x0, e = torch.randn(2, 11, dtype=torch.double)
    a, b, da, db = diffusion.path(objective, t)
    h = 1e-5 if objective in ("flow", "sit") else 1e-5 * 2 / np.pi
    v = (x(t + h) - x(t - h)) / 2e-5
    assert [a[0], b[0], a[-1], b[-1]] == approx([1, 0, 0, 1])
    assert_close([da * x0 + db * e, db * x(t) - b * v, a * v - da * x(t)], [v, x0, e])

def test_ddpm_has_the_thousand_steps_of_ho_et_al():
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)
    a, b, da, db = diffusion.path("ddpm", torch.arange(1, 1001) / 1000)
    assert_close([a ** 2, b ** 2, da, db], [kept, 1 - kept, -b, a], rtol=0, atol=1e-5)

@pytest.mark.parametrize("objective", ["flow", "sit", "v", "eps", "ddpm"])
def test_loss_is_the_squared_error_of_what_is_learned(objective):
    """DiT counts its steps from 0; SiT goes from noise to data, and not in thousands."""
    x0, e = torch.randn(2, 10, 1, 4, 4)
    t = torch.linspace(0.1, 0.9, 10)
    a, b, da, db = diffusion.path(objective, t[:, None, None, None])
    v = da * x0 + db * e
    answer = {"eps": e, "ddpm": e, "sit": -v}.get(objective, v)
    asked = {"ddpm": t - 0.001, "sit": 0.001 - t / 1000}.get(objective, t)
    weight = a.flatten() ** -2 if objective == "eps" else torch.ones(10)
    model = Mock(side_effect=[answer, answer + 0.1])
    right = diffusion.diffusion_loss(model, objective, x0, e, t, None)
    wrong = diffusion.diffusion_loss(model, objective, x0, e, t, None)
    assert_close(model.call_args.args[1], asked)
    assert_close([right, wrong], [0 * weight, 0.01 * weight], rtol=1e-3, atol=1e-6)

def solve(objective, sigma, noise, steps, **how):
    """Samples of N(1.5, sigma^2), by a network that knows it."""
    def model(x, t, y):
        a, b, da, db = diffusion.path(objective, t[:, None, None, None])
        x0 = 1.5 + a * sigma ** 2 / (a ** 2 * sigma ** 2 + b ** 2) * (x - 1.5 * a)
        e = (x - a * x0) / b
        return e if objective == "eps" else da * x0 + db * e
    *_, x = diffusion.sample(model, objective, noise, None, None, steps, 1.0, **how)
    return x

@pytest.mark.parametrize("objective", ["flow", "v", "eps"])
@pytest.mark.parametrize("churn", [0, 0.5, 1, 2])       # a fraction of churn is a power of a >= 0
@pytest.mark.parametrize("steps, sigma, tolerance", [(1, 0, 1e-3), (7, 0, 1e-3), (100, 0.4, 0.05)])
def test_sampler_draws_a_point_exactly_and_a_gaussian(objective, churn, steps, sigma, tolerance):
    x = solve(objective, sigma, lambda: torch.randn(8000, 1, 1, 1), steps, churn=churn)
    assert [x.mean().item(), x.std().item()] == approx([1.5, sigma], abs=tolerance)

@pytest.mark.parametrize("objective", ["flow", "v"])
@pytest.mark.parametrize("extrapolate, ratio", [(True, 3.5), (False, 2)])   # of twice the steps
def test_order_of_convergence(objective, extrapolate, ratio):
    noise = torch.randn(100, 1, 1, 1)
    few = solve(objective, 0.8, lambda: noise, 80, extrapolate=extrapolate)
    many = solve(objective, 0.8, lambda: noise, 160, extrapolate=extrapolate)
    solution = 1.5 + 0.8 * noise
    assert (few - solution).norm() / (many - solution).norm() == approx(ratio, abs=0.5)

def test_guidance_goes_from_the_null_class_beyond_the_class():
    model = Mock(side_effect=lambda x, t, y: y.view(-1, 1, 1, 1).expand_as(x))
    x = torch.zeros(2, 4, 1, 1)
    y = torch.tensor([1.0, 2.0])
    v = diffusion.guided_velocity(model, "flow", x, torch.ones(2), y, torch.tensor([5.0]), 3.0)
    assert v.flatten().tolist() == [5 + 3 * (1 - 5)] * 4 + [5 + 3 * (2 - 5)] * 4

@pytest.mark.parametrize("scale, interval, calls", [
    (1, (0, 1), [2] * 10), (5, (0, 1), [4] * 10), (5, (0.25, 0.75), [2] * 3 + [4] * 5 + [2] * 2)])
def test_null_class_is_asked_only_where_guidance_acts(scale, interval, calls):
    model = Mock(side_effect=lambda x, t, y: x)
    x = torch.ones(2, 4, 2, 2)
    y = torch.tensor([0, 1])
    list(diffusion.sample(model, "flow", lambda: x, y, y[:1], 10, scale, interval=interval))
    assert [len(call.args[0]) for call in model.call_args_list] == calls

def times(**how):
    cfg = Namespace(**{"times": "uniform", "times_shift": 1.0, "objective": "flow"} | how)
    return diffusion.draw_times(20_000, cfg, torch.Generator().manual_seed(0))

def test_times_are_uniform_and_evenly_spread():
    t = times().sort().values
    assert t.diff().numpy() == approx(1 / 20_000, abs=1e-6)

@pytest.mark.parametrize("shift", [1.0, 2.0, 0.5])
def test_times_are_logit_normal_with_shifted_odds(shift):
    logit = times(times="logit-normal", times_shift=shift).logit()
    assert [logit.mean().item(), logit.std().item()] == approx([np.log(shift), 1], abs=0.02)

@pytest.mark.parametrize("step, decay", [(0, 0.1), (8, 0.5), (10_000, 0.9)])
def test_average_soon_forgets_its_start(step, decay):
    ema = torch.nn.Linear(3, 2)
    model = torch.nn.Linear(3, 2)
    want = decay * ema.weight + (1 - decay) * model.weight
    diffusion.update_ema(ema, model, 0.9, step)
    assert_close(ema.weight, want)

def test_samples_are_of_the_averaged_weights(own):
    model, _, state = diffusion.load_run(own / "diffusion.pt")
    assert_close(model.state_dict(), state["ema"], rtol=0, atol=0)
    assert not torch.equal(state["ema"]["last.bias"], state["model"]["last.bias"])

# ---- denoisers, words, latents, published weights -----------------------------------------------
def denoiser(channels=4, side=8, classes=3, **how):
    cfg = dict(model="unet", condition="class", widths=[16, 32], blocks=2, attention_at=4,
               pointwise=True, dit="XS/2", objective="ddpm")
    return diffusion.build(Namespace(**cfg | how), channels, side, classes)

def waves(*shape):
    """Numbers that look random, but are the same everywhere."""
    return (torch.arange(np.prod(shape), dtype=torch.double) ** 2).sin().float().view(shape)

def moved(model):
    for p in model.parameters():
        p.data = 0.1 * waves(*p.shape)
    return model

@pytest.mark.parametrize("name, count", [
    ("S/2", 32_963_360), ("B/2", 130_512_416), ("XL/2", 675_129_632)])
def test_dit_has_the_published_names_and_size(name, count):
    """The published count is with the fixed positions and a variance: 16 more rows in the end."""
    with torch.device("meta"):
        state = denoiser(4, 32, 1000, model="dit", dit=name).state_dict()
    found = {re.sub(r"blocks\.\d+", "N", key.rpartition(".")[0]) for key in state}
    size = sum(tensor.numel() for tensor in state.values())
    assert " ".join(sorted(found - {""})) == (
        "N.adaLN_modulation.1 N.attn.proj N.attn.qkv N.mlp.fc1 N.mlp.fc2 "
        "final_layer.adaLN_modulation.1 final_layer.linear t_embedder.mlp.0 t_embedder.mlp.2 "
        "x_embedder.proj y_embedder.embedding_table")
    assert size + 16 * (state["pos_embed"].shape[2] + 1) == count

def test_dit_computes_what_the_published_one_does():
    """Eight numbers of facebookresearch/DiT's models.py: width 192, depth 6, 3 heads, so moved."""
    model = moved(denoiser(model="dit"))
    out = model(waves(2, 4, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([0, 3]))
    assert out[0, :, 2, 5].tolist() == approx([-1.66796, 1.20495, -0.54034, 0.77834], abs=1e-4)
    assert out[1, :, 6, 1].tolist() == approx([-0.48633, 0.46397, 0.06340, -0.00194], abs=1e-4)

@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_denoisers_start_at_zero_and_feel_time_and_label(kind, condition):
    model = denoiser(model=kind, condition=condition)
    x = waves(1, 4, 8, 8)
    words = diffusion.tokenize(["a ring", "a star", ""])[:, None]
    labels = words if condition == "text" else torch.tensor([[0], [1], [3]])
    t = torch.tensor([0.2])
    zero = [p for name, p in model.named_parameters() if re.search("adaLN|cross.to_out", name)]
    assert not any(map(torch.any, [model(x, t, labels[0]), *zero]))
    outs = [moved(model)(x, t, label) for label in labels] + [model(x, t + 0.001, labels[0])]
    assert min((a - b).abs().max() for k, a in enumerate(outs) for b in outs[:k]) > 1e-4

def test_words_are_known_by_their_letters_alone():
    ids = diffusion.tokenize(["a caf\u00e9", "A, CAFE\u0301!", "word " * 30, ""])
    assert torch.equal(ids[0], ids[1])
    assert ids.count_nonzero(dim=1).tolist() == [2, 2, 24, 0]

def test_order_of_words_counts_but_not_what_fills_a_caption_up():
    embedder = diffusion.TextEmbedder(8)
    ids = diffusion.tokenize(["red ring blue star", "blue ring red star", ""])
    before, (words, there) = embedder(ids)
    embedder.embedding_table.weight.data[0] *= -9
    after, (others, _) = embedder(ids)
    assert there.sum(dim=1).tolist() == [5, 5, 1]       # the begin token is always there
    assert_close([after, others[there]], [before, words[there]])
    assert (before[0] - before[1]).abs().max() > 1e-3 and after.isfinite().all()

def test_cross_attention_starts_as_nothing_and_sees_the_words_that_are_there():
    cross = diffusion.CrossAttention(8, heads=2)
    x = torch.randn(1, 5, 8)
    words = torch.randn(1, 3, diffusion.WORD_WIDTH, requires_grad=True)
    there = torch.tensor([[True, True, False]])
    assert torch.equal(cross(x, words, there), x)
    moved(cross)(x, words, there).square().sum().backward()
    assert torch.equal(words.grad.abs().sum(dim=2) > 0, there)

@pytest.mark.parametrize("condition, views", [("class", 2), ("text", 1)])
def test_latents_are_those_of_images_and_mirror_images(condition, views, own):
    """But captions know left from right."""
    next(own.glob("latents_*")).unlink()
    run(diffusion, *TINY_UNET, "--out new --condition", condition)
    coder = vae.load_vae(torch.load(own / "vae.pt"))
    train, _ = data.load("images", 16)
    x = data.to_float(torch.stack([pixels for pixels, _ in train]))
    want = [torch.stack(coder.encode(view), dim=1) for view in (x, x.flip(3))[:views]]
    latents = np.load(next(own.glob("latents_*.npy")))
    assert latents == approx(torch.stack(want, dim=1).numpy(), rel=2e-3, abs=2e-3)

def test_latents_have_a_name_by_all_that_they_depend_on(own):
    def name(part="nothing", size=16, views=2, file="a", text="x"):
        state = torch.load(own / "vae.pt")
        for key, tensor in state["vae"].items():
            tensor += 1e-3 * key.startswith(part)
        Path(file).write_text(text)
        about = Namespace(data="images", size=size, paths=[file])
        return diffusion.latents_file(vae.load_vae(state), about, views, about)
    others = {name("encoder."), name("quant_conv."), name(size=32), name(views=1), name(file="b"),
              name(text="xy")}
    assert name() == name("decoder.")
    assert len(others | {name()}) == 7

def test_latents_that_are_there_are_not_made_again():
    images = {i: (torch.full((3, 2, 2), i, dtype=torch.uint8), 0) for i in range(70)}
    missing = {i: images[i] for i in range(39)}
    encode = Mock(side_effect=lambda x: x.split(1, dim=1)[:2])

    def make(images):
        diffusion.make_latents("./x.npy", (70, 1, 2, 1, 2, 2), encode, images, torch.device("cpu"),
                               torch.autocast("cpu", enabled=False), 2, 0, 1)
    with pytest.raises(KeyError):
        make(missing)
    assert not Path("x.npy").exists()
    make(images)
    assert [len(call.args[0]) for call in encode.call_args_list] == [32, 32, 6]
    assert np.load("x.npy")[:, 0, 1, 0, 1, 1] == approx(np.arange(70) / 127.5 - 1, abs=1e-3)

def test_scale_makes_latents_unit():
    """z = mean + exp(logvar / 2) noise, around 1, has a variance of 4 + 9 here."""
    latents = np.full((4000, 1, 2, 4, 4, 4), np.log(9), np.float16)
    latents[:, :, 0] = np.random.default_rng(0).normal(1, 2, (4000, 1, 4, 4, 4))
    assert diffusion.measure_scale(latents) == approx(13 ** -0.5, rel=0.01)

@pytest.mark.parametrize("condition, counts", [
    ("class", [196, 182, 182, 240]), ("text", [240, 0, 0, 560])])       # of labels; of words
def test_updates_see_unit_latents_and_drop_whole_labels(condition, counts, own, monkeypatch):
    monkeypatch.setattr(data.Folder, "caption", lambda *_: "a red ring")
    loss = Mock(wraps=diffusion.diffusion_loss)
    load = Mock(wraps=np.load)
    monkeypatch.setattr(diffusion, "diffusion_loss", loss)
    monkeypatch.setattr(np, "load", load)
    run(diffusion, *TINY_UNET, "--out new --batch-size 40 --max-steps 20 --label-dropout 0.3",
        "--condition", condition)
    _, _, x0, _, _, y = zip(*[call.args for call in loss.call_args_list])
    counted = torch.cat(y) if condition == "class" else torch.cat(y).count_nonzero(dim=1)
    assert torch.cat(x0).std().item() == approx(1, abs=0.02)
    assert counted.bincount().tolist() == approx(counts, abs=30)
    load.assert_called_once_with(ANY, mmap_mode="r")    # a private map has to fit into memory

@pytest.fixture
def published_dit(own):
    """A DiT of five classes in dit.pt, beside the rows of a variance; the VAE says its scale."""
    state = moved(denoiser(model="dit", classes=5)).state_dict()
    wide = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (4, 4))         # places of a patch, channels
        wide[name] = torch.cat([rows, rows + 1], dim=1).flatten(0, 1)
    torch.save({"ema": wide}, "dit.pt")
    torch.save(torch.load(own / "vae.pt") | {"scale": 0.5, "shift": 0.1}, own / "vae.pt")
    return state

@pytest.mark.parametrize("objective", ["ddpm", "sit"])
def test_published_denoiser_needs_no_images(objective, published_dit):
    os.remove("images")
    run(diffusion, "--device cpu --init dit.pt --max-steps 0 --out new --objective", objective)
    run(sample, "--device cpu --class 4 --count 1 --out new")
    model, _, state = diffusion.load_run("new/diffusion.pt")
    assert_close(model.state_dict(), published_dit, rtol=0, atol=0)
    assert [state["scale"], state["shift"]] == [0.5, 0.1]
    assert len(list(Path("new").glob("samples_4_*/000000.png"))) == 1

# ---- sampling, and whole runs -------------------------------------------------------------------
PETS = ["Cat", "cat", "dog", "\u00fcber"]
WNIDS = ["n01440764", *(f"n{k}" for k in range(2001, 3000))]

@pytest.mark.parametrize("word, classes, found", [
    ("cat", PETS, 1), ("Cat", PETS, 0), ("DOG", PETS, 2), ("2", PETS, 2), ("2", ["0", "2", "1"], 1),
    ("U\u0308ber", PETS, 3), ("crane bird", WNIDS, 134), ("Crane", WNIDS, 517)])
def test_classes_are_found_as_typed_or_without_case_or_by_index(word, classes, found):
    assert sample.find_class(word, classes) == found

def test_image_i_is_a_function_of_seed_and_i_alone(own):
    pixels, labels = draw("--count 5 --class cross 2")
    again, _ = draw("--count 7 --class cross 2 --batch-size 2")
    other, _ = draw("--count 5 --class cross 2 --seed 1")
    assert labels == [1, 2, 1, 2, 1]
    assert np.abs(pixels - again[:5]).max() <= 1
    assert min(np.abs(pixels[0] - image).max() for image in (*pixels[1:], other[0])) > 1

def test_captions_are_counted_and_drawn(own, capsys):
    shutil.copytree("images", "captions")
    Path("captions/train/circle/000.txt").write_text("a red circle")
    run(diffusion, *TINY_UNET, "--condition text --data captions --out new")
    sample.main(["--out", "new", "--count", "3", "--prompt", "a red circle", "to the left"])
    assert "captions beside 1 of 40 images" in capsys.readouterr().out
    assert torch.load("new/diffusion.pt")["config"]["times_shift"] == 2
    assert len(list(Path("new").glob("samples_a-red-circle-to-the-left_*/*.png"))) == 3
    for prompt in ("", "word " * 25):
        assert "1 to 24 words" in stopped(sample.main, ["--out", "new", "--prompt", prompt])

def test_numbered_images_that_are_there_are_kept(own):
    pixels, _ = draw("--count 3")
    files = sorted(own.glob("samples_*/*.png"))
    Image.new("RGB", (16, 16)).save(files[0])
    files[1].unlink()
    run(sample, "--no-bf16 --device cpu --count 3")
    again = [np.asarray(Image.open(file)) for file in files]
    assert np.array_equal(again, [0 * pixels[0], *pixels[1:]])

def test_one_file_is_enough_for_a_grid_and_its_animation(own):
    shutil.copy(own / "diffusion.pt", ".")
    shutil.rmtree("out")
    os.remove("images")
    run(sample, "--device cpu --out . --gif x")
    assert Image.open(next(Path().glob("grid_all_*.png"))).size == (2 + 3 * 18, 2 + 8 * 18)
    assert Image.open("x").n_frames == 4

def test_flags_go_over_what_the_run_says_and_into_the_name(own, capsys):
    for flags in ("", "--interval 0.1 0.8", "--no-bf16"):
        run(sample, f"--device cpu --cfg 0 --steps 3 --churn 0 {flags}")
    assert "cfg 0, 3 steps, churn 0:" in capsys.readouterr().out
    assert len(list(own.glob("grid_*"))) == 3

VQ = [*TINY_VAE, "--bottleneck vq --codes 16"]
FSQ = [*TINY_VAE, "--bottleneck fsq --levels 5"]
WORDS = [*TINY_UNET, "--condition text"]

@pytest.mark.parametrize("script, flags, number", [
    (vae, TINY_VAE, signal.SIGTERM), (vae, VQ, signal.SIGINT), (vae, FSQ, signal.SIGHUP),
    (diffusion, TINY_UNET, signal.SIGHUP), (diffusion, WORDS, signal.SIGTERM)])
def test_a_stopped_run_ends_with_the_same_bits(script, flags, number, own, monkeypatch):
    run(script, *flags, "--out whole")
    signal_in_second_update(number, script, monkeypatch)
    with pytest.raises(SystemExit, match="saved update 2 .*--resume"):
        run(script, *flags, "--out cut")
    for _ in range(2):
        run(script, "--resume --out cut")
        assert_close(weights(script, "cut"), weights(script, "whole"), rtol=0, atol=0)

@pytest.mark.parametrize("script, flags", [
    (vae, TINY_VAE), (vae, VQ), (vae, FSQ), (diffusion, TINY_UNET), (diffusion, WORDS)])
def test_processes_and_micro_batches_change_nothing(script, flags, own):
    run(script, *flags, "--out one")
    for file in own.glob("latents_*"):
        file.rename(f"one/{file.name}")
    finish(start(script, *flags, "--out two --micro-batch 2", world=2))
    assert_close(weights(script, "two"), weights(script, "one"), rtol=2e-3, atol=2e-5)
    for file in own.glob("latents_*"):
        assert file.read_bytes() == Path("one", file.name).read_bytes()

@pytest.mark.parametrize("script, flags", [(vae, TINY_VAE), (diffusion, TINY_UNET)])
def test_a_killed_run_ends_with_the_same_bits(script, flags, own):
    """KILLS=50 python -m pytest -q test_all.py -k killed"""
    flags = [*flags, "--max-steps 24 --eval-every 2 --out"]
    began = time.time()
    finish(start(script, *flags, "whole"))
    seconds = time.time() - began
    for k in range(int(os.environ.get("KILLS", 2)) // 2):
        for file in own.glob("latents_*"):
            file.unlink()
        [process] = start(script, *flags, k)
        process.join(np.random.default_rng().uniform(0, seconds))
        process.kill()
        process.join()
        goes_on = ["--resume"] if Path(f"{k}/{script.__name__}.pt").exists() else []
        finish(start(script, *flags, k, *goes_on))
        assert_close(weights(script, k), weights(script, "whole"), rtol=0, atol=0)

@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_no_file_is_replaced_while_it_is_mapped(own, monkeypatch):      # Windows refuses that
    def refuse(old, new, replace=os.replace):
        mapped = Path("/proc/self/maps").read_text()
        assert os.path.realpath(old) not in mapped and os.path.realpath(new) not in mapped
        replace(old, new)
    monkeypatch.setattr(os, "replace", refuse)
    run(vae, "--resume --max-steps 6")
    run(diffusion, "--resume --max-steps 6")
    run(diffusion, *TINY_UNET, "--out new")             # encodes: the VAE has changed

@pytest.mark.parametrize("script", [vae, diffusion])
@pytest.mark.parametrize("room, flags, words", [
    (50_000, "", "what was saved before is whole"),
    (2 ** 30, "--lr nan --log-every 9 --eval-every 2", "not finite")])
def test_a_full_disk_or_loss_of_nan_spares_the_checkpoint(script, room, flags, words, own, request):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    file = own / f"{script.__name__}.pt"
    before = file.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    assert words in stopped(run, script, f"--resume --max-steps 8 --out {own} {flags}")
    assert file.read_bytes() == before
    assert not list(own.glob("*.part"))

def test_three_commands_in_a_row():
    flags = {"vae.py": TINY_VAE, "diffusion.py": TINY_UNET, "sample.py": ["--class", "2"]}
    for script in flags:
        command = [sys.executable, HERE / script, *flags[script]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    sizes = {file.name[:12]: Image.open(file).size for file in Path("out/images").glob("*.png")}
    assert sizes == {"recon_000000": (146, 38), "recon_000004": (146, 38),
                     "samples_0000": (56, 488), "grid_square_": (146, 20)}
    assert "taking out/images/diffusion.pt" in done.stdout

# ---- the house ----------------------------------------------------------------------------------
@pytest.mark.parametrize("script, flags, words", [
    (diffusion, "--vae nowhere.pt", "nowhere.pt"), (diffusion, "--init x", "--objective"),
    (diffusion, "--batch-size 9 --micro-batch 2", "--batch-size"),
    (diffusion, "--widths 8 8 8 8 8", "--widths"), (diffusion, "--model dit --dit S/3", "S/3"),
    (diffusion, "--init x --objective ddpm --max-steps 0", "published --init and --vae"),
    (diffusion, "--model dit --micro-batch 1 --compile", "--micro-batch 2"),
    (sample, "--npz x.npz", "--count"), (sample, "--class unicorn --count 1", "unicorn"),
    (sample, "--prompt ring", "--condition text"), (sample, f"--seed {2 ** 64}", "2^64")])
def test_nonsense_ends_in_a_line_before_anything_is_written(script, flags, words, own):
    next(own.glob("latents_*")).unlink()
    before = sorted(Path().rglob("*"))
    new = [*TINY_UNET, "--out new"] if script is diffusion else []
    assert words in stopped(run, script, *new, flags)
    assert sorted(Path().rglob("*")) == before

@pytest.mark.parametrize("name", ["README.md", "vae.py", "diffusion.py", "sample.py"])
def test_documented_commands_are_accepted(name):
    lines = re.findall(r"(?:^ *|&& )((?:python|torchrun) [^&\n]+)", (HERE / name).read_text(), re.M)
    words = [shlex.split(line, comments=True)[1:] for line in lines]
    commands = [get_args_parser().parse_args(command) for command in words]
    ours = [command for command in commands if command.training_script[:-3] in SCRIPTS]
    assert len(ours) > 2
    for command in ours:
        try:
            SCRIPTS[command.training_script[:-3]].settings(command.training_script_args)
        except SystemExit as stop:
            assert str(stop.code).startswith("error: ")     # no such run; argparse exits with 2

@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_stand_at_the_top_and_go_one_way(name):
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found = getattr(node, "module", node.names[0].name)
            assert found not in list(SCRIPTS)[list(SCRIPTS).index(name):], node.lineno
            assert node.col_offset == 0 or found == "safetensors.torch", node.lineno

LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
WORK = (ast.Call, ast.BinOp, ast.IfExp, ast.BoolOp, ast.Subscript, *LOOPS)

def faults(node):
    """What a statement has too much of."""
    parts = list(ast.walk(node))
    value = getattr(node, "value", None)
    if isinstance(node, ast.Expr) and isinstance(value, (ast.Tuple, ast.BoolOp, ast.IfExp, *LOOPS)):
        yield "several in one"
    if isinstance(node, ast.Assign) and isinstance(value, ast.Tuple):
        if isinstance(node.targets[0], ast.Tuple) and any(isinstance(part, WORK) for part in parts):
            yield "a, b = f(), g()"
    if not hasattr(node, "body") and sum(isinstance(part, ast.IfExp) for part in parts) > 1:
        yield "two conditionals"

@pytest.mark.parametrize("name", SCRIPTS)
def test_one_idea_a_line(name):
    text = (HERE / f"{name}.py").read_text()
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    rows = [node.lineno for node in statements]
    assert len(rows) == len(set(rows))
    assert [(node.lineno, fault) for node in statements for fault in faults(node)] == []
    assert max(map(len, text.splitlines())) <= 100
