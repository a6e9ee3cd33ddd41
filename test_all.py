"""Every test: python -m pytest -q test_all.py  (CPU, no network, three minutes).

SLOW=1 python -m pytest -qs test_all.py -k judge  repeats the README's measurement on `shapes`, in seven minutes.
"""
import contextlib
import csv
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import diffusion
import sample
import vae

HERE = Path(__file__).parent
TINY_VAE = "--preset shapes --size 16 --widths 8 16 --blocks 1 --z-channels 4 --no-attention --disc-width 8 --batch-size 8 --max-steps 4 --log-every 1 --no-bf16 --device cpu".split()
TINY_UNET = "--samples 24 --widths 16 16 --blocks 1 --batch-size 8 --max-steps 4 --log-every 1 --sample-steps 4 --no-bf16 --device cpu".split()


# ---- helpers ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 40 PNGs of 20x18 in train/ and 8 in val/, three classes."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 40), ("val", 8)):
        pixels = data.draw_shapes(split, range(count), 20)
        for i in range(count):
            folder = root / split / ("circle", "cross", "square")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i].permute(1, 2, 0).numpy()[:, :18]).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory):
    """The folder of a finished tiny run of both stages."""
    out = tmp_path_factory.mktemp("trained")
    vae.main(["--data", str(images), "--out", str(out), *TINY_VAE])
    diffusion.main(["--out", str(out), *TINY_UNET])
    return out


def command(script, *flags, cwd=None, processes=0):
    """Run a script as a user does -> the finished process, its output as text."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(20000 + os.getpid() % 20000)]
    return subprocess.run([sys.executable, *(launch if processes else []), str(HERE / script), *map(str, flags)], cwd=cwd,
                          capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})


def stopped(main, *flags):
    """The one line with which main() stops."""
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    line = str(stop.value.code)
    assert line.startswith("error: ") and "\n" not in line, line
    return line


def weights(path):
    state = torch.load(path, weights_only=True)
    return {f"{part}.{name}": tensor for part in ("vae", "disc", "model", "ema") if isinstance(state.get(part), dict)
            for name, tensor in state[part].items()}


def assert_same(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m: f"{name}: {m}", **tolerance or {"rtol": 0, "atol": 0})


EXACT_BUT_ROUNDING = {"rtol": 1e-3, "atol": 2e-5}


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- data ---------------------------------------------------------------------------------------

def test_shapes_are_a_function_of_split_and_row():
    some = data.draw_shapes("train", [7, 3, 12])
    assert torch.equal(some[0], data.draw_shapes("train", range(8))[7])
    assert not torch.equal(some[0], data.draw_shapes("val", [7])[0])
    everything = data.draw_shapes("train", range(200)).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 200
    edges = (everything.float().diff(dim=1).abs() > 0).float().mean()
    assert 0.01 < edges < 0.5                                  # neither flat nor noise


def test_order_is_shuffled_epochs_from_any_start():
    stream = data.order(10, 0, 40, seed=1)
    for epoch in range(4):
        assert sorted(stream[10 * epoch:10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(stream[:10], stream[10:20])
    assert torch.equal(data.order(10, 17, 9, seed=1), stream[17:26])
    assert not torch.equal(data.order(10, 0, 10, seed=2), stream[:10])


def test_schedule_gives_processes_together_what_one_gets_alone():
    alone = torch.cat(list(data.schedule(100, 4, 4, 2, 5, 0, 1, seed=0)))
    pair = [list(data.schedule(100, 4, 2, 2, 5, rank, 2, seed=0)) for rank in range(2)]
    assert torch.equal(torch.cat([rows for both in zip(*pair) for rows in both]), alone)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "I;16", "1"])
def test_every_kind_of_image_keeps_its_look(mode, tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(48, 0)
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "1":
        image = Image.fromarray(ramp).convert("1", dither=Image.Dither.NONE)
    elif mode == "P":
        image = image.convert("RGB").quantize(256)
    else:
        image = image.convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    got = data.read_image(path).numpy().astype(int)
    want = np.where(ramp > 127, 255, 0) if mode == "1" else ramp
    assert got.shape == (3, 48, 64) and np.abs(got - want.astype(int)).max() <= 8


def test_transparent_becomes_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.read_image(tmp_path / "clear.png").min() == 255
    image = Image.new("RGB", (30, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, 30, 10)


def test_jpegs_are_read_and_cropped_as_the_published_results_do(tmp_path):
    """Against Pillow's decoder, area halving and bicubic filter: 40 dB on average."""
    size, rng, psnr = 64, np.random.default_rng(0), []
    for width, height in ((90, 70), (131, 300), (512, 389), (40, 51), (256, 300)):
        coarse = Image.fromarray(rng.integers(0, 256, (1 + height // 16, 1 + width // 16, 3), np.uint8))
        coarse.resize((width, height), Image.BICUBIC).save(tmp_path / "x.jpg", quality=90)
        want = Image.open(tmp_path / "x.jpg")
        while min(want.size) >= 2 * size:
            want = want.resize((want.width // 2, want.height // 2), Image.BOX)
        scale = size / min(want.size)
        want = np.asarray(want.resize((round(want.width * scale), round(want.height * scale)), Image.BICUBIC), np.float32)
        top, left = (want.shape[0] - size) // 2, (want.shape[1] - size) // 2
        got = data.center_crop(data.read_image(tmp_path / "x.jpg"), size).permute(1, 2, 0).numpy()
        psnr.append(10 * np.log10(255 ** 2 / max(0.01, np.square(got - want[top:top + size, left:left + size]).mean())))
    assert np.mean(psnr) > 40 and min(psnr) > 32, psnr


def test_crop_keeps_the_aspect_and_does_not_alias():
    stripes = torch.zeros(3, 400, 1000, dtype=torch.uint8)
    stripes[:, :, ::2] = 255                                    # one-pixel stripes must turn to grey
    crop = data.center_crop(stripes, 64)
    assert crop.shape == (3, 64, 64) and (crop.int() - 127).abs().max() < 12
    disc = torch.from_numpy((np.hypot(*np.mgrid[-100:100, -200:200]) < 80) * np.uint8(255)).expand(3, -1, -1)
    crop = data.center_crop(disc, 50)[0] > 127
    assert abs(int(crop.any(0).sum()) - 40) <= 1 and abs(int(crop.any(1).sum()) - 40) <= 1


def test_folder_is_read_the_same_resident_and_by_workers(images, monkeypatch):
    train, val = data.load(str(images), size=16)
    assert (len(train), len(val), train.classes) == (40, 8, ["circle", "cross", "square"])
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    lazy, _ = data.load(str(images), size=16)
    assert not lazy.resident
    start = lambda source, step, workers: list(data.feed(source, data.schedule(40, 8, 1, step, 7, 0, 1, seed=0), torch.device("cpu"), workers))
    whole = start(train, 0, 0)
    for workers in (0, 2, 4):                                   # from step 3 on, in the middle of an epoch
        for (x, y), (x2, y2) in zip(whole[3:], start(lazy, 3, workers), strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)


def test_file_list_is_kept_and_made_anew_when_a_folder_changes(images, tmp_path, monkeypatch):
    import shutil
    shutil.copytree(images, tmp_path / "images")
    before = str(data.load(str(tmp_path / "images"), size=16, keep=str(tmp_path))[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", None)                      # not needed the second time
        assert str(data.load(str(tmp_path / "images"), size=16, keep=str(tmp_path))[0]) == before
    shutil.copy(images / "train" / "cross" / "001.png", tmp_path / "images" / "train" / "cross" / "new.png")
    after = data.load(str(tmp_path / "images"), size=16, keep=str(tmp_path))[0]
    assert len(after) == 41 and str(after) != before


def test_workers_get_no_copy_of_the_list_or_the_latents(trained):
    """However workers are started: what is sent to them does not grow with the number of files."""
    from multiprocessing.reduction import ForkingPickler
    names = np.array([f"{i:08d}_with_a_long_name.jpeg" for i in range(100_000)], "S")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "RESIDENT_BYTES", 0)
        images = data.Images(["a", "b"], np.arange(100_000) % 2, 16, folder="x", names=names)
    assert len(ForkingPickler.dumps(images)) < 5000
    latents = diffusion.Latents(trained / "latents.npy", torch.zeros(40).long(), torch.device("cpu"))
    latents.resident = False
    assert len(ForkingPickler.dumps(latents)) < 5000
    assert latents.__getitems__(torch.tensor([3, 1]))[0].shape == (2, 2, 4, 8, 8)


def test_preview(images, tmp_path, capsys):
    data.main(["--data", str(images), "--size", "16", "--out", str(tmp_path)])
    assert "40 training and 8 validation images, 16x16, 3 classes of 13 to 14: circle, cross, square" in capsys.readouterr().out
    assert Image.open(tmp_path / "data.png").size == (2 + 10 * 18, 2 + 8 * 18)


def test_folder_without_val_holds_images_out(images):
    train, val = data.load(str(images / "train"), size=16)
    assert len(train) == 39 and len(val) == 1
    assert not (train.pixels == val.pixels[0]).flatten(1).all(1).any()


def test_cifar10_of_torchvision(tmp_path, monkeypatch):
    """Up to the download: torchvision's reader on batches of its own format, made here."""
    import pickle
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    train, val = data.load("cifar10", str(tmp_path))
    assert train.pixels.shape == (20, 3, 64, 64) and val.labels.tolist() == [0, 1, 2, 9] and train.classes[9] == "j"
    raw = pickle.loads((folder / "test_batch").read_bytes())["data"][0].reshape(3, 32, 32)
    small = torch.nn.functional.avg_pool2d(val.pixels[0].float(), 2)
    assert np.corrcoef(small.flatten(), raw.flatten())[0, 1] > 0.9


# ---- the VAE and its losses ---------------------------------------------------------------------

def test_published_vae():
    with torch.device("meta"):
        model = vae.VAE((128, 256, 512, 512))
        mean, logvar = model.encode(torch.empty(2, 3, 256, 256))
        assert mean.shape == logvar.shape == (2, 4, 32, 32) and model.decode(mean).shape == (2, 3, 256, 256)
    parts = [count(part) for part in (model.encoder, model.decoder, model.quant, model.post_quant, model)]
    assert parts == [34_163_592, 49_490_179, 72, 20, 83_653_863]


@pytest.mark.parametrize("widths, blocks, attention", [((32, 64, 64), 1, False), ((64, 128, 256), 2, True)])
def test_vae_starts_with_more_signal_than_noise(widths, blocks, attention):
    torch.manual_seed(0)
    with torch.no_grad():
        mean, logvar = vae.VAE(widths, blocks, 4, attention).encode(data.to_float(data.draw_shapes("train", range(32))))
    assert mean.std(0).mean() > 1.5 * (logvar / 2).exp().mean()     # else the first updates learn to do without the latent


def test_upsampling_is_nearest_neighbour_and_a_convolution():
    up, x = vae.Upsample(3).double(), torch.randn(2, 3, 5, 4, dtype=torch.double)
    want = F.conv2d(F.interpolate(x, scale_factor=2.0), up.weight, up.bias, padding=1)
    torch.testing.assert_close(up(x), want)


def test_attention_and_layout_of_the_cpu_change_nothing():
    q, k, v = torch.randn(3, 2, 5, 7, 8, dtype=torch.double)
    torch.testing.assert_close(vae.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    model, x = vae.VAE((128, 128), 1, attention=True).double(), torch.randn(2, 3, 8, 8, dtype=torch.double)
    mean, logvar = model.encode(x)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x), (mean, logvar))
        assert model.through(model.encoder[:2], x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept():
    data.start(SimpleNamespace(device="cpu", bf16=False, compile=False))
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2 ** 24)                                     # 64 MB, 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 1000                                   # a block may be cut once or twice before it fits


@pytest.mark.parametrize("size, field", [(32, 18), (64, 38), (256, 78)])
def test_receptive_field_of_the_discriminator(size, field):
    disc = vae.Discriminator(size, 8).double()
    for module in disc.modules():                               # GroupNorm sees the whole image: not part of the question
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    x = torch.randn(1, 3, size, size, dtype=torch.double, requires_grad=True)
    logits, _ = disc(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert (x.grad.abs().sum((0, 1, 3)) > 0).sum() == field < size + 32 * (size > 64)


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 4, 8, 8, dtype=torch.double), torch.randn(2, 4, 8, 8, dtype=torch.double)
    q, p = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(vae.kl_loss(mean, logvar), torch.distributions.kl_divergence(q, p).mean())


def test_adversarial_losses():
    real, fake = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    bce = F.binary_cross_entropy_with_logits
    want = (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2
    torch.testing.assert_close(vae.discriminator_loss(real, fake, "bce"), want)
    torch.testing.assert_close(vae.generator_loss(fake, "bce"), bce(fake, torch.ones_like(fake)))
    assert vae.discriminator_loss(torch.full((2,), 2.0), torch.full((2,), -2.0), "hinge") == 0
    assert vae.discriminator_loss(torch.zeros(2), torch.zeros(2), "hinge") == 1
    assert vae.generator_loss(torch.full((2,), 3.0), "hinge") == -3


def test_logvar_is_clamped_and_noise_scaled():
    model = vae.VAE((8, 16), 1, 2, False)
    model.quant.bias.data[:] = torch.tensor([3.0, -3.0, 100.0, -100.0])
    mean, logvar = model.encode(torch.zeros(1, 3, 8, 8))
    assert logvar[0, 0].max() == 20 and logvar[0, 1].min() == -20
    seen = []
    model.decode = lambda z: seen.append(z)
    model(torch.zeros(1, 3, 8, 8), torch.ones(1, 2, 4, 4))
    torch.testing.assert_close(seen[0], mean + (logvar / 2).exp())


def test_each_player_leaves_the_other_alone():
    torch.manual_seed(0)
    model, disc = vae.VAE((8, 16), 1, 2, False), vae.Discriminator(16, 8)
    x, noise = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 2, 8, 8)
    cfg = SimpleNamespace(gan_loss="bce", l1_weight=0.8)
    on = {"pixel": 1.0, "kl": 0.1, "adv": 0.5, "fm": 0.5}
    vae.micro_step(model, disc, disc, None, x, noise, on, cfg, 1, torch.autocast("cpu", enabled=False))
    got_disc, got_vae = [p.grad.clone() for p in disc.parameters()], [p.grad.clone() for p in model.parameters()]

    recon, mean, logvar = model(x, noise)
    real, fake = disc(x)[0], disc(recon.detach())[0]
    want = torch.autograd.grad(vae.discriminator_loss(real, fake, "bce"), list(disc.parameters()))
    for a, b in zip(got_disc, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    fake, features = disc(recon)
    loss = (vae.pixel_loss(recon, x, 0.8) + 0.1 * vae.kl_loss(mean, logvar) + 0.5 * vae.generator_loss(fake, "bce")
            + 0.5 * vae.feature_loss(features, [f.detach() for f in disc(x)[1]]))
    for a, b in zip(got_vae, torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(p.requires_grad for p in disc.parameters())


def test_perceptual_loss_reaches_the_reconstruction(monkeypatch):
    import torchvision.models
    untrained = torchvision.models.vgg16
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: untrained())
    loss, x = vae.Perceptual(), torch.rand(1, 3, 32, 32) * 2 - 1
    recon = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    loss(recon, x).backward()
    assert recon.grad.abs().sum() > 0 and loss(x, x) == 0


def test_overfits_one_batch():
    torch.manual_seed(0)
    model, x = vae.VAE((16, 32), 1, 4, True), data.to_float(data.draw_shapes("train", range(8)))
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(90):
        recon, _, _ = model(x, torch.zeros(()))
        loss = F.mse_loss(recon, x)
        opt.zero_grad(), loss.backward(), opt.step()
    assert loss < 0.03


# ---- paths, guidance, samplers ------------------------------------------------------------------

@pytest.mark.parametrize("objective", ["flow", "v", "eps"])
def test_path_round_trip(objective):
    t = torch.linspace(0, diffusion.first_time(objective), 11, dtype=torch.double).view(-1, 1)
    x0, e = torch.randn(2, 11, 5, dtype=torch.double)
    a, b, da, db = diffusion.path(objective, t)
    x, v = a * x0 + b * e, da * x0 + db * e
    torch.testing.assert_close(a * db - da * b, torch.ones_like(a))
    torch.testing.assert_close(db * x - b * v, x0)
    torch.testing.assert_close(a * v - da * x, e)
    torch.testing.assert_close(torch.stack([a[0], b[0]]), torch.tensor([[1.0], [0.0]], dtype=torch.double))
    if objective == "eps":
        got = diffusion.velocity(lambda x, t, y: e.view(11, 5, 1, 1), "eps", x.view(11, 5, 1, 1), t.view(-1), None)
        torch.testing.assert_close(got.double().view(11, 5), v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["flow", "v", "eps"])
def test_loss_is_zero_for_the_right_answer_only(objective):
    x0, e = torch.randn(2, 6, 4, 4, 4)
    t, y = torch.linspace(0.05, 0.9, 6), torch.arange(6)
    dropped, seen = torch.tensor([True, False] * 3), []

    def oracle(x, t, y):
        seen.append(y)
        _, _, da, db = diffusion.path(objective, t.view(-1, 1, 1, 1))
        return e if objective == "eps" else da * x0 + db * e

    loss = diffusion.diffusion_loss(oracle, objective, x0, e, t, y, dropped, 10)
    torch.testing.assert_close(loss, torch.zeros(6))
    assert seen[0].tolist() == [10, 1, 10, 3, 10, 5]
    off = diffusion.diffusion_loss(lambda *given: oracle(*given) + 0.1, objective, x0, e, t, y, dropped, 10)
    torch.testing.assert_close(off, 0.01 / diffusion.path("v", t)[0] ** 2 if objective == "eps" else torch.full((6,), 0.01))


@pytest.mark.parametrize("objective", ["flow", "v", "eps"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_sampler_is_exact_where_x0_is_known(objective, sampler):
    x0 = torch.randn(1, 4, 4, 4)

    def model(x, t, y):                                         # every path from this x leads to x0
        a, b, da, db = diffusion.path(objective, t.view(-1, 1, 1, 1))
        e = (x - a * x0) / b
        return e if objective == "eps" else da * x0 + db * e

    for steps in (1, 7):
        *_, x = sample.sample(model, objective, torch.randn(3, 4, 4, 4), torch.zeros(3).long(), 10, steps, sampler=sampler)
        torch.testing.assert_close(x, x0.expand_as(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("objective", ["flow", "v", "eps"])
def test_sampler_draws_a_gaussian_of_known_score(objective):
    mu, sigma = 1.5, 0.4

    def model(x, t, y):                                         # the exact posterior mean of x0 ~ N(mu, sigma^2)
        a, b, da, db = diffusion.path(objective, t.view(-1, 1, 1, 1))
        x0 = mu + a * sigma ** 2 / (a ** 2 * sigma ** 2 + b ** 2) * (x - a * mu)
        e = (x - a * x0) / b.clamp_min(1e-4)
        return e if objective == "eps" else da * x0 + db * e

    errors = {}
    for sampler, steps in (("euler", 100), ("euler", 20), ("heun", 20)):
        *_, x = sample.sample(model, objective, torch.randn(500, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
                                 torch.zeros(500).long(), 10, steps, sampler=sampler)
        assert abs(x.mean() - mu) < 0.05
        errors[sampler, steps] = abs(x.std() - sigma).item()
    assert errors["euler", 100] < 0.015 and errors["heun", 20] < errors["euler", 20] / 2 + 1e-3


def test_guidance():
    v = {0: torch.randn(1, 4, 2, 2), 10: torch.randn(1, 4, 2, 2)}
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return torch.cat([v[k] for k in y.tolist()])

    args = model, "flow", torch.randn(2, 4, 2, 2), torch.full((2,), 0.5), torch.zeros(2).long()
    torch.testing.assert_close(sample.guided(*args, 5.0, 10), (v[10] + 5 * (v[0] - v[10])).repeat(2, 1, 1, 1))
    torch.testing.assert_close(sample.guided(*args, 1, 10), v[0].repeat(2, 1, 1, 1))
    assert calls == [4, 2]                                      # one batch of both halves; no null half at 1
    calls.clear()
    list(sample.sample(model, "flow", args[2], args[4], 10, 10, cfg=5.0, interval=(0.25, 0.75)))
    assert calls.count(4) == 5 and calls.count(2) == 5


def test_random_draws_of_an_update():
    cfg = SimpleNamespace(seed=0, z_channels=4, side=4, objective="flow", times="uniform", label_dropout=0.1)
    z, e, t, dropped = diffusion.draw(cfg, 3, 20_000, "cpu")
    assert abs(dropped.float().mean() - 0.1) < 0.01 and abs((z * e).mean()) < 0.01
    assert abs(t.sort().values - torch.linspace(0, 1, 20_000)).max() < 1e-3
    assert torch.equal(t, diffusion.draw(cfg, 3, 20_000, "cpu")[2]) and not torch.equal(e, diffusion.draw(cfg, 4, 20_000, "cpu")[1])
    cfg.times = "logit-normal"
    t = diffusion.draw(cfg, 3, 20_000, "cpu")[2]
    assert abs(t.logit().mean()) < 0.02 and abs(t.logit().std() - 1) < 0.02


def test_start_noise_does_not_depend_on_the_batch():
    assert torch.equal(sample.start_noise(8, (4, 2, 2), 5)[6], sample.start_noise(1, (4, 2, 2), 5, first=6)[0])


# ---- denoisers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, published", [("S/2", 32_963_360), ("B/2", 130_512_416), ("XL/2", 675_129_632)])
def test_published_dit(name, published):
    """facebookresearch/DiT counts the fixed positions, and predicts a variance: 4 more channels out."""
    with torch.device("meta"):
        model = diffusion.DiT(4, 32, 1000, name)
        out = model(torch.empty(2, 4, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.long))
    d = model.out.in_features
    assert out.shape == (2, 4, 32, 32) and count(model) + model.positions.numel() + (d + 1) * 16 == published


@pytest.mark.parametrize("make", [lambda: diffusion.UNet(4, 8, 10, (16, 32), 1, 4), lambda: diffusion.DiT(4, 8, 10, "XS/2")])
def test_denoisers_start_at_zero_and_feel_time_and_class(make):
    torch.manual_seed(0)
    model, x, t, y = make(), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.2]), torch.tensor([1, 1])
    assert model(x, t, y).abs().max() == 0
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    out = model(x, t, y)
    assert out.shape == x.shape
    for other in (model(x, t + 0.001, y), model(x, t, y + 1), model(x, t, torch.full_like(y, 10))):
        assert (other - out).abs().max() > 1e-4


def test_dit_puts_patches_back_where_they_were():
    model = diffusion.DiT(4, 8, 10, "XS/2")
    model.blocks = torch.nn.ModuleList()
    x = torch.zeros(1, 4, 8, 8)
    x[0, 2, 5, 3] = 1                                           # in patch (2, 1)
    torch.nn.init.normal_(model.out.weight)
    moved = (model(x, torch.zeros(1), torch.zeros(1).long()) - model(0 * x, torch.zeros(1), torch.zeros(1).long())).abs().sum((0, 1))
    assert (moved > 1e-4).nonzero().tolist() == [[4, 2], [4, 3], [5, 2], [5, 3]]


def test_ema():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    model.weight.data[:], ema.weight.data[:] = 1.0, 0.0
    diffusion.update_ema(ema, model, 0.999, 0)
    assert ema.weight.item() == pytest.approx(0.9)              # 1 - (1 + 0) / (10 + 0)
    diffusion.update_ema(ema, model, 0.999, 100_000)
    assert ema.weight.item() == pytest.approx(0.9 + 0.1 * 0.001)


# ---- whole runs ---------------------------------------------------------------------------------

def test_three_commands(images, tmp_path):
    """As typed, in an empty folder, and the pictures they leave."""
    for script, *flags in (("vae.py", "--data", images, *TINY_VAE), ("diffusion.py", *TINY_UNET), ("sample.py", "--class", "2", "--cfg", "5")):
        done = command(script, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / images.name
    assert Image.open(run / "recon_000004.png").size == (2 + 8 * 18, 2 + 2 * 18)
    assert Image.open(run / "samples_000004.png").size == (2 + 3 * 18, 2 + 8 * 18)
    assert np.asarray(Image.open(run / "grid_2_cfg5_euler4_seed0.png")).std() > 1
    rows = list(csv.DictReader(open(run / "vae.csv")))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["val_psnr"] == rows[2]["val_psnr"] != rows[3]["val_psnr"]
    shares = sum(float(rows[-1][f"{name}_share"]) for name in ("pixel", "kl", "adv", "fm"))
    assert shares == pytest.approx(1, abs=1e-3)
    assert not list(run.glob("*.part*"))


def test_pictures_are_drawn_with_the_averages_and_change_nothing(trained, tmp_path, monkeypatch):
    drawn, draw = [], sample.sample
    monkeypatch.setattr(sample, "sample", lambda model, *args: drawn.append(
        {name: p.detach().clone() for name, p in model.named_parameters()}) or draw(model, *args))
    diffusion.main(["--vae", str(trained / "vae.pt"), *TINY_UNET, "--eval-every", "2", "--out", str(tmp_path)])
    assert_same(tmp_path / "diffusion.pt", trained / "diffusion.pt")
    state, loaded = torch.load(tmp_path / "diffusion.pt"), dict(sample.load_denoiser(str(trained / "diffusion.pt"))[0].named_parameters())
    assert len(drawn) == 2 and any(not torch.equal(drawn[-1][name], state["model"][name]) for name in loaded)
    for name in loaded:                                         # in training, and in sample.py
        assert torch.equal(drawn[-1][name], state["ema"][name]) and torch.equal(loaded[name], state["ema"][name])


def test_latents(trained, images):
    """Row by row what the VAE gives, mirrored in the second view; scale is 1 / std of the sampled latents."""
    model, state = vae.load_vae(trained / "vae.pt")
    train, _ = data.load(str(images), size=16)
    moments = np.load(trained / "latents.npy")
    assert moments.shape == (40, 2, 2, 4, 8, 8) and moments.dtype == np.float16
    x = data.to_float(train.pixels)
    for view, x in enumerate((x, x.flip(3))):
        want = torch.stack(model.encode(x), 1)
        torch.testing.assert_close(torch.from_numpy(moments[:, view]).float(), want, rtol=2e-3, atol=2e-3)
    z = moments[:, :, 0] + np.exp(moments[:, :, 1].astype(float) / 2) * np.random.default_rng(0).standard_normal(moments[:, :, 0].shape)
    scale = torch.load(trained / "diffusion.pt")["scale"]
    assert abs(diffusion.normalise(z, scale).std() - 1) < 0.02
    np.testing.assert_allclose(diffusion.denormalise(diffusion.normalise(z, scale), scale), z)
    rows = diffusion.Latents(trained / "latents.npy", train.labels, torch.device("cpu"))
    rows.to("cpu")
    assert len(rows) == 80 and rows.__getitems__(torch.tensor([7]))[1] == train.labels[3]


def test_precompute_goes_on_where_it_stopped(trained, images, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "CODED_PIXELS", 16 * 16 ** 2)
    model, _ = vae.load_vae(trained / "vae.pt")
    train, _ = data.load(str(images), size=16)
    file, calls = str(tmp_path / "latents.npy"), []
    encode = model.encode

    def stumbling(x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(x)

    model.encode = stumbling
    args = model, train, file, {"vae": "a"}, SimpleNamespace(overwrite=False, workers=0), data.Signals(), 0, 1, torch.device("cpu"), torch.autocast("cpu", enabled=False)
    with pytest.raises(KeyboardInterrupt):
        diffusion.precompute(*args)
    diffusion.precompute(*args)
    assert len(calls) == 4 + 4                                  # three blocks of two views; one block was done
    model.encode = encode
    whole = str(tmp_path / "whole.npy")
    diffusion.precompute(model, train, whole, *args[3:])
    assert np.array_equal(np.load(file), np.load(whole))
    facts = json.loads((tmp_path / "whole.json").read_text())           # a row lost before the scale was measured is made again
    (tmp_path / "whole.json").write_text('{"vae": "a"}')
    data.write_rows(whole, 21, np.zeros_like(np.load(whole)[21:22]))
    assert diffusion.precompute(model, train, whole, *args[3:]) == facts["scale"] and np.array_equal(np.load(file), np.load(whole))


def run_until(monkeypatch, main, step, *flags):
    """main() as if Ctrl-C came at `step`."""
    asked = []
    with monkeypatch.context() as patch:
        check = data.Signals.check

        def interrupted(self, *args):
            asked.append(1)
            self.caught = signal.SIGINT * (len(asked) > step)
            check(self, *args)

        patch.setattr(data.Signals, "check", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([str(flag) for flag in flags])
    assert stop.value.code == 1


def test_resume_is_exact(images, trained, tmp_path, monkeypatch):
    flags = "--data", images, *TINY_VAE, "--out", tmp_path
    run_until(monkeypatch, vae.main, 2, *flags)
    assert torch.load(tmp_path / "vae.pt")["step"] == 2
    vae.main(["--resume", "--out", str(tmp_path)])
    assert_same(tmp_path / "vae.pt", trained / "vae.pt")
    flags = "--vae", trained / "vae.pt", *TINY_UNET, "--out", tmp_path
    run_until(monkeypatch, diffusion.main, 3, *flags)
    diffusion.main(["--resume", "--vae", str(trained / "vae.pt"), "--out", str(tmp_path)])
    assert_same(tmp_path / "diffusion.pt", trained / "diffusion.pt")
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "diffusion.csv"))] == ["1", "2", "3", "4"]


def column(path, name):
    return [float(row[name]) for row in csv.DictReader(open(path))]


def test_accumulation_equals_one_batch(images, trained, tmp_path):
    """In the weights, and in the gradient norms: AdamW and clipping forgive a wrong scale."""
    vae.main(["--data", str(images), *TINY_VAE, "--batch-size", "2", "--accum", "4", "--out", str(tmp_path)])
    assert_same(tmp_path / "vae.pt", trained / "vae.pt", **EXACT_BUT_ROUNDING)
    diffusion.main(["--vae", str(trained / "vae.pt"), *TINY_UNET, "--batch-size", "2", "--accum", "4", "--out", str(tmp_path)])
    assert_same(tmp_path / "diffusion.pt", trained / "diffusion.pt", **EXACT_BUT_ROUNDING)
    for log, name in (("vae.csv", "vae_norm"), ("vae.csv", "disc_norm"), ("diffusion.csv", "norm")):
        assert column(tmp_path / log, name) == pytest.approx(column(trained / log, name), rel=1e-3)


def test_two_processes_equal_one(images, trained, tmp_path):
    done = command("vae.py", "--data", images, *TINY_VAE, "--batch-size", 2, "--accum", 4, "--out", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "vae.pt", trained / "vae.pt", **EXACT_BUT_ROUNDING)
    (tmp_path / "vae.pt").write_bytes((trained / "vae.pt").read_bytes())
    done = command("diffusion.py", "--out", tmp_path, *TINY_UNET, "--batch-size", 2, "--accum", 4, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("taking the VAE") == 1             # of two processes one talks
    assert (tmp_path / "latents.npy").read_bytes() == (trained / "latents.npy").read_bytes()
    assert_same(tmp_path / "diffusion.pt", trained / "diffusion.pt", **EXACT_BUT_ROUNDING)


def test_four_processes_go_on_with_the_run_of_one(images, trained, tmp_path, monkeypatch):
    """With accumulation; the two rounds of latents are interrupted and shared out anew, too."""
    run_until(monkeypatch, vae.main, 2, "--data", images, *TINY_VAE, "--out", tmp_path)
    done = command("vae.py", "--resume", "--batch-size", 1, "--accum", 8, "--out", tmp_path, processes=4)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "vae.pt", trained / "vae.pt", **EXACT_BUT_ROUNDING)
    (tmp_path / "vae.pt").write_bytes((trained / "vae.pt").read_bytes())
    run_until(monkeypatch, diffusion.main, 2, *TINY_UNET, "--out", tmp_path)
    data.write_rows(tmp_path / "latents.npy", 0, np.zeros_like(np.load(tmp_path / "latents.npy")))
    facts = json.loads((tmp_path / "latents.json").read_text())         # as if not one image had been encoded
    del facts["scale"]
    (tmp_path / "latents.json").write_text(json.dumps(facts))
    done = command("diffusion.py", "--resume", "--batch-size", 1, "--accum", 8, "--out", tmp_path, processes=4)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "latents.npy").read_bytes() == (trained / "latents.npy").read_bytes()
    assert_same(tmp_path / "diffusion.pt", trained / "diffusion.pt", **EXACT_BUT_ROUNDING)


def launch(script, *flags, processes=0):
    """Start a script -> the running process, after its first line."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(20000 + os.getpid() % 20000)]
    run = subprocess.Popen([sys.executable, *(torchrun if processes else []), str(HERE / script), *map(str, flags)], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.stdout.readline(), run.stderr.read()
    return run


def test_kill_9_at_any_moment(images, trained, tmp_path):
    """KILLS=50 python -m pytest -q test_all.py -k kill: in training, checkpointing and encoding; the run goes on, to the same bits."""
    long = ["--max-steps", "24", "--eval-every", "2"]
    plan = {"vae.py": ["--data", images, *TINY_VAE, *long], "diffusion.py": [*TINY_UNET, *long]}
    length, rng, kills, runs = {}, np.random.default_rng(), int(os.environ.get("KILLS", 3)), 0
    for script, flags in plan.items():
        start = launch(script, *flags, "--out", tmp_path / "whole")
        clock = time.time()
        start.communicate()
        length[script] = time.time() - clock
    while kills > 0:
        runs += 1
        for script, flags in plan.items():
            out, finished = tmp_path / f"run{runs}", False
            while not finished:
                made = out / script.replace(".py", ".pt")
                run = launch(script, *flags, "--out", out, *(["--resume"] if made.exists() else []))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(rng.uniform(0, length[script]) if kills > 0 else None)
                kills -= run.poll() is None
                run.kill()
                finished = run.wait() == 0
                assert finished or run.returncode == -signal.SIGKILL, run.stderr.read()
            assert_same(made, tmp_path / "whole" / made.name)
        assert (out / "latents.npy").read_bytes() == (tmp_path / "whole" / "latents.npy").read_bytes()
        assert not list(out.glob("*.part"))


def test_a_process_that_dies_ends_the_run(images, tmp_path):
    run = launch("vae.py", "--data", images, *TINY_VAE, "--max-steps", 100000, "--out", tmp_path, processes=2)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "SIGKILL" in errors


def test_signals_save_first(images, tmp_path):
    flags = ["--data", images, *TINY_VAE, "--max-steps", 100000, "--eval-every", 100000, "--out"]
    runs = {number: launch("vae.py", *flags, tmp_path / number.name) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, run in runs.items():
        log = tmp_path / number.name / "vae.csv"
        while not log.exists() or log.stat().st_size == 0:
            time.sleep(0.1)
            assert run.poll() is None
        run.send_signal(number)
        out, _ = run.communicate(timeout=60)
        assert run.returncode == (0 if number == signal.SIGTERM else 1) and "--resume" in out
        assert torch.load(log.with_name("vae.pt"))["step"] > 0


def test_sigterm_while_encoding(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffusion, "CODED_PIXELS", 16 * 16 ** 2)
    encode = diffusion.encode
    monkeypatch.setattr(diffusion, "encode", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), encode(*args))[1])
    (tmp_path / "vae.pt").write_bytes((trained / "vae.pt").read_bytes())
    with pytest.raises(SystemExit) as stop:
        diffusion.main(["--out", str(tmp_path), *TINY_UNET])
    assert stop.value.code == 0 and "run again to go on" in capsys.readouterr().out
    assert [diffusion.made(np.load(tmp_path / "latents.npy"), first, 16) for first in (0, 16, 32)] == [True, False, False]


def test_resume_takes_the_settings_of_the_run_but_not_its_overwrite(tmp_path):
    torch.save({"made_by": "vae.py", "step": 3, "config": {"lr": 0.1, "overwrite": True}}, tmp_path / "vae.pt")
    cfg = SimpleNamespace(out=str(tmp_path), resume=True, overwrite=False, lr=0.5)
    assert data.begin(cfg, {"resume": True}, "vae.pt", "vae.py")["step"] == 3
    assert cfg.lr == 0.1 and not cfg.overwrite              # else diffusion.py would remake another VAE's latents unasked


def test_what_changed_is_named_on_resume(images, trained, tmp_path, capsys):
    import shutil
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "cross" / "001.png").unlink()
    (tmp_path / "vae.pt").write_bytes((trained / "vae.pt").read_bytes())
    state = torch.load(tmp_path / "vae.pt")
    state["config"]["code"] = "older"
    torch.save(state, tmp_path / "vae.pt")
    vae.main(["--resume", "--out", str(tmp_path), "--data", str(tmp_path / "images"), "--max-steps", "5", "--lr", "1e-4"])
    said = capsys.readouterr().out
    assert f"lr was {vae.LR}, is now 0.0001" in said and "code was older" in said and "dataset was 40 images" in said and "is now 39 images" in said


def test_bench_reports_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = "--max-steps 5 --batch-size 2 --accum 2 --device cpu"
    for script, flags in ((vae, sizes), (diffusion, sizes), (sample, "--batch-size 2 --steps 2 --device cpu")):
        script.main(["--bench", "--preset", "shapes", *flags.split()])
        said = capsys.readouterr().out
        seconds, images, rate = re.search(r": ([\d.e-]+) s for (\d+) images, ([\d.]+) images/s", said.splitlines()[-1]).groups()
        assert int(images) / float(seconds) == pytest.approx(float(rate), rel=0.01)
        assert script != sample or said.startswith("encoding: ") and "\ndecoding: " in said
        assert sum(int(share) for share in re.findall(r" (\d+)%[,\n]", said.splitlines()[-1] + "\n")[1:]) == pytest.approx(100, abs=25)
    assert not list(tmp_path.iterdir())


def test_bench_does_not_catch_ctrl_c():
    """It would save random weights over the run that lies there."""
    before = signal.getsignal(signal.SIGINT)
    vae.main(["--bench", *TINY_VAE])
    assert signal.getsignal(signal.SIGINT) == before


def test_compiles_once_and_whole(images, trained, tmp_path, monkeypatch):
    """No graph breaks, no recompilation along the run; here with a compiler that leaves the graph as it is."""
    graphs, compile = [], torch.nn.Module.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **flags: compile(self, backend=backend, fullgraph=True, **flags))
    for extra in ([], ["--grad-checkpoint"]):
        torch._dynamo.reset(), graphs.clear()
        vae.main(["--data", str(images), *TINY_VAE, "--compile", "--eval-every", "2", "--out", str(tmp_path), "--overwrite", *extra])
        assert len(graphs) == 3                                 # the VAE; the discriminator, learning and frozen
        assert_same(tmp_path / "vae.pt", trained / "vae.pt", **EXACT_BUT_ROUNDING)
        for model in ("unet", "dit"):
            torch._dynamo.reset(), graphs.clear()
            diffusion.main(["--vae", str(trained / "vae.pt"), *TINY_UNET, "--model", model, "--compile", "--eval-every", "2",
                            "--out", str(tmp_path), "--overwrite", *extra])
            assert len(graphs) == 1


def test_flops_are_those_of_the_formula():
    """Two per multiplication in every linear layer and product of attention; backward costs twice the forward pass."""
    cfg = SimpleNamespace(model="dit", dit="S/2", z_channels=4, side=32, classes=range(1000), objective="flow")
    n, d, depth = 256, 384, 12
    block = 2 * n * d * (3 * d + d + 8 * d) + 2 * 2 * n * n * d + 2 * d * 6 * d
    ends = 2 * n * d * 16 + 2 * n * 16 * d + 2 * d * 2 * d + 2 * (256 * d + d * d)
    assert diffusion.flops_per_image(cfg) == pytest.approx(3 * (depth * block + ends), rel=0.01)


@pytest.mark.parametrize("make", [lambda: diffusion.UNet(4, 8, 10, (16, 32), 1, 4), lambda: diffusion.DiT(4, 8, 10, "XS/2"), lambda: vae.VAE((8, 16), 1, 2)])
def test_grad_checkpoint_saves_memory_and_changes_nothing(make):
    torch.manual_seed(0)
    model = make()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs = (torch.randn(4, 3, 16, 16), torch.zeros(())) if isinstance(model, vae.VAE) else (torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4))
    grads, saved = [], []
    for checkpointed in (False, True):
        size = []
        if checkpointed:
            vae.recompute(model, vae.ResBlock, diffusion.DiTBlock)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (size.append(t.nbytes), t)[1], lambda t: t):
            out = model(*inputs)
        saved.append(sum(size))
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert saved[1] < 0.5 * saved[0]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_non_finite_updates_are_skipped_then_stop_the_run(images, tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "pixel_loss", lambda recon, x, w: recon.mean() * math.nan)
    flags = ["--data", str(images), *TINY_VAE, "--out", str(tmp_path), "--max-steps", "20"]
    assert "not finite" in stopped(vae.main, *flags) and not (tmp_path / "vae.pt").exists()
    monkeypatch.setattr(vae, "pixel_loss", lambda recon, x, w: F.mse_loss(recon, x) * torch.where(x.mean() > 0.5, math.nan, 1))
    vae.main([*flags, "--overwrite"])
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "vae.pt").values())
    monkeypatch.setattr(vae, "pixel_loss", lambda recon, x, w: F.mse_loss(recon, x) * torch.where(x.mean() > 0.5, 1e9, 1))
    vae.main([*flags, "--overwrite"])
    skipped, norms = column(tmp_path / "vae.csv", "skipped"), column(tmp_path / "vae.csv", "vae_norm")
    assert skipped[-1] == sum(norm > vae.SPIKE for norm in norms[:20]) > 0


def test_presets_and_flags():
    given = data.flags(vars(vae), ["--lr", "1", "--widths", "8", "16", "--no-compile"])
    cfg = data.settings(vars(vae), given, "imagenet")
    assert (cfg.lr, cfg.widths, cfg.compile, cfg.accum, cfg.disc_lr) == (1.0, (8, 16), False, 16, 3e-4)
    assert data.settings(vars(vae), {}, "some/folder").preset == "imagenet"
    with pytest.raises(SystemExit):
        data.flags(vars(vae), ["--learning-rate", "1"])
    for script in (vae, diffusion):
        for row in script.PRESETS.values():
            assert set(row) <= {name for name, _ in data.fenced(vars(script))}
    assert data.share(SimpleNamespace(batch_size=8, accum=16), 8) == (8, 2)
    assert data.share(SimpleNamespace(batch_size=128, accum=1), 2) == (64, 1)
    with pytest.raises(SystemExit, match="129"):
        data.share(SimpleNamespace(batch_size=128, accum=1), 3)


def test_samples(trained, tmp_path):
    """npz, numbered files and grid hold the same images, whatever the batch; names work as indices do."""
    flags = ["--out", str(trained), "--n", "5", "--class", "cross", "2", "--no-bf16"]
    sample.main([*flags, "--npz", str(tmp_path / "a.npz"), "--png", str(tmp_path / "png")])
    sample.main([*flags, "--npz", str(tmp_path / "b.npz"), "--batch-size", "2", "--gif", str(tmp_path / "x.gif")])
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["arr_0"].shape == (5, 16, 16, 3) and a["arr_0"].dtype == np.uint8 and a["arr_1"].tolist() == [1, 2, 1, 2, 1]
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"].astype(int)).max() <= 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000003.png")), a["arr_0"][3])
    assert Image.open(tmp_path / "x.gif").n_frames == 5
    assert "exists" in stopped(sample.main, *flags, "--npz", tmp_path / "a.npz")
    sample.main([*flags, "--npz", str(tmp_path / "c.npz"), "--seed", "1"])
    assert not np.array_equal(a["arr_0"], np.load(tmp_path / "c.npz")["arr_0"])


def test_class_names():
    wnids = ["n01440764"] + [f"n{i}" for i in range(2000, 2999)]
    assert sample.find_class("207", wnids) == 207 and sample.find_class("Golden Retriever", wnids) == 207
    assert "unicorn" in stopped(lambda argv: sample.find_class("unicorn", wnids))
    assert "0 to 1" in stopped(lambda argv: sample.find_class("7", ["cat", "dog"]))


# ---- what users get wrong -----------------------------------------------------------------------

def test_wrong_data_is_named(images, tmp_path, capsys):
    assert "train/<class>" in stopped(vae.main, "--data", tmp_path / "nowhere", "--out", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "0 images" in stopped(vae.main, "--data", tmp_path / "empty", "--out", tmp_path / "o")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "cat" / "a.png")
    assert "two classes" in stopped(vae.main, "--data", tmp_path / "one", "--out", tmp_path / "o")
    assert "multiple of 2" in stopped(vae.main, "--data", images, *TINY_VAE, "--size", 15, "--out", tmp_path / "o")
    for flag, value in (("--preset", "mnist"), ("--gan-loss", "wgan"), ("--bacth-size", "8")):
        with pytest.raises(SystemExit) as stop:
            vae.main([flag, value])
        assert stop.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_unreadable_images(damage, tmp_path, capfd, monkeypatch):
    for i in range(150):
        folder = tmp_path / ("a", "b")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), i, np.uint8)).save(folder / f"{i:03d}.jpg")
    bad = tmp_path / "a" / "010.jpg"
    bad.write_bytes(b"not an image" if damage == "text" else bad.read_bytes()[:300])
    train, _ = data.load(str(tmp_path), size=16)
    assert capfd.readouterr().err.count("unreadable image") == 1 and len(train) == 147
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    lazy, _ = data.load(str(tmp_path), size=16)
    batches = list(data.feed(lazy, data.schedule(147, 49, 1, 0, 6, 0, 1, seed=0), torch.device("cpu"), 2))      # two epochs
    assert capfd.readouterr().err.count("unreadable image") == 1
    for x, y in batches:                                        # image i is grey i; its class is i % 2; the next stands in for 10
        value = x.float().mean((1, 2, 3)).round().long()
        assert ((value % 2 == y) | (value == 12)).all() and (value != 10).all()
    for i in range(0, 20, 2):
        (tmp_path / "a" / f"{i:03d}.jpg").write_text("nonsense")
    lazy, _ = data.load(str(tmp_path), size=16)
    list(data.feed(lazy, data.schedule(147, 49, 1, 0, 3, 0, 1, seed=0), torch.device("cpu"), 2))
    assert "images cannot be read" in stopped(lambda argv: lazy.check())
    monkeypatch.undo()
    assert "images cannot be read" in stopped(lambda argv: data.load(str(tmp_path), size=16))


def test_image_bombs_are_refused(tmp_path):
    Image.new("L", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(Image.DecompressionBombError):
        data.read_image(tmp_path / "bomb.png")


def test_checkpoints_that_do_not_fit(images, trained, tmp_path, monkeypatch):
    assert "run vae.py first" in stopped(diffusion.main, "--vae", tmp_path / "vae.pt")
    monkeypatch.chdir(tmp_path)
    assert "run diffusion.py first" in stopped(sample.main)
    whole = (trained / "vae.pt").read_bytes()
    (tmp_path / "vae.pt").write_bytes(whole[:5000])
    assert "truncated" in stopped(diffusion.main, "--vae", tmp_path / "vae.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "vae.pt")
    assert "not a checkpoint of vae.py" in stopped(diffusion.main, "--vae", tmp_path / "vae.pt")
    torch.save(SimpleNamespace(evil=os.system), tmp_path / "vae.pt")
    assert "no checkpoint" in stopped(diffusion.main, "--vae", tmp_path / "vae.pt")

    (tmp_path / "vae.pt").write_bytes(whole)
    assert "--resume" in stopped(vae.main, "--data", images, "--out", tmp_path)
    assert (tmp_path / "vae.pt").read_bytes() == whole
    for name in ("latents.npy", "latents.json", "diffusion.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    for damage in (lambda raw: raw[:5000], lambda raw: __import__("pickle").dumps(SimpleNamespace(evil=os.system))):
        (tmp_path / "latents.npy").write_bytes(damage((trained / "latents.npy").read_bytes()))
        assert "truncated or no array" in stopped(diffusion.main, "--vae", tmp_path / "vae.pt", "--out", tmp_path / "new", *TINY_UNET)
    (tmp_path / "latents.npy").write_bytes((trained / "latents.npy").read_bytes())
    other = torch.load(tmp_path / "vae.pt")
    other["vae"]["quant.bias"] += 1
    torch.save(other, tmp_path / "vae.pt")
    before = (tmp_path / "latents.npy").read_bytes()
    assert "other latents" in stopped(diffusion.main, "--vae", tmp_path / "vae.pt", "--out", tmp_path / "new", *TINY_UNET)
    assert (tmp_path / "latents.npy").read_bytes() == before
    assert "another VAE" in stopped(sample.main, "--out", tmp_path)


@pytest.mark.parametrize("script, limit, file", [(vae, 50_000, "vae.pt"), (diffusion, 50_000, "latents.npy"), (diffusion, 200_000, "diffusion.pt")])
def test_full_disk_leaves_what_was_there(script, limit, file, images, trained, tmp_path):
    """No file can grow beyond `limit` bytes."""
    (tmp_path / "vae.pt").write_bytes((trained / "vae.pt").read_bytes())
    flags = TINY_UNET if script is diffusion else ["--data", images, *TINY_VAE, "--resume", "--max-steps", "6"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        assert file in stopped(lambda argv: data.guard(lambda: script.main(argv)), "--out", tmp_path, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {path: path.read_bytes() for path in before} == before and not list(tmp_path.glob("*.part"))
    assert tmp_path / file in before or not (tmp_path / file).exists()


def test_read_only_folder(images, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")                                      # no folder can be made below a file, even by root
    done = command("vae.py", "--data", images, *TINY_VAE, "--out", blocked / "run")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- the README's measurements: minutes, not part of the quick run ----------------------------------

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="minutes: set SLOW=1")


@slow
@pytest.mark.filterwarnings("ignore")           # pytest would collect torchvision's, in the workers' memory
def test_scale_of_three_hundred_thousand_files(tmp_path, monkeypatch):
    """Start-up time, and the resident memory of the loader's workers over a pass."""
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    jpegs, pixels = [], data.draw_shapes("train", range(100), 24)
    for image in pixels:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "x.jpg", quality=80)
        jpegs.append((tmp_path / "x.jpg").read_bytes())
    for k in range(1000):
        (tmp_path / "images" / f"n{k:08d}").mkdir(parents=True)
        for i in range(300):
            (tmp_path / "images" / f"n{k:08d}" / f"n{k:08d}_{i}.JPEG").write_bytes(jpegs[(k + i) % 100])
    for attempt in ("first", "second"):
        start = time.time()
        train, _ = data.load(str(tmp_path / "images"), size=16, keep=str(tmp_path))
        seconds = time.time() - start
        print(f"{attempt} start-up on {len(train):,} files: {seconds:.2f} s")
    assert seconds < 5
    memory, start = [], time.time()
    for i, _ in enumerate(data.feed(train, data.schedule(len(train), 98, 1, 0, 3000, 0, 1, seed=0), torch.device("cpu"), 2)):
        if i % 300 == 100:
            workers = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            status = [Path(f"/proc/{worker}/status").read_text() for worker in workers]
            memory.append([int(re.search(r"VmRSS:\s+(\d+)", text)[1]) // 1024 for text in status])
    print(f"a pass in {time.time() - start:.0f} s; MB of each worker along it: {memory}")
    assert max(memory[-1]) < 1.05 * max(memory[1])


@slow
def test_speed_of_loading(tmp_path):
    """Photographs a second on one core, next to Pillow and torchvision's transforms. PHOTOS=DIR/<class>/*.JPEG for real ones."""
    from torchvision.transforms import functional
    torch.set_num_threads(1)
    files = sorted(Path(os.environ.get("PHOTOS", tmp_path)).glob("*/*"))
    if not files:
        (tmp_path / "a").mkdir()
        for i in range(200):
            noise = Image.fromarray(np.random.default_rng(i).integers(0, 256, (47, 63, 3), np.uint8))
            noise.resize((500, 375), Image.BICUBIC).save(tmp_path / "a" / f"{i}.jpg", quality=92)
        files = sorted(tmp_path.glob("*/*"))

    def plain(file):
        image = Image.open(file).convert("RGB")
        while min(image.size) >= 512:
            image = image.resize((image.width // 2, image.height // 2), Image.BOX)
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
        left, top = (image.width - 256) // 2, (image.height - 256) // 2
        return functional.normalize(functional.to_tensor(image.crop((left, top, left + 256, top + 256))), [0.5] * 3, [0.5] * 3)

    def ours(file):
        return data.center_crop(data.read_image(file), 256)

    rates = {plain: [], ours: []}
    for _ in range(5):
        for read in rates:
            start = time.perf_counter()
            images = [read(file) for file in files[:300]]
            rates[read].append(len(images) / (time.perf_counter() - start))
    psnr = [10 * math.log10(4 / max(1e-6, (data.to_float(ours(file)) - plain(file)).square().mean())) for file in files[:300]]
    a, b = np.median(rates[ours]), np.median(rates[plain])
    print(f"{a:.0f} images a second and core, plain pipeline {b:.0f}: {a / b:.2f} times; {np.mean(psnr):.1f} dB on average, {min(psnr):.1f} at least")
    assert a > 2 * b and np.mean(psnr) > 40


def train_judge(train, steps=900):
    """A small classifier of 32x32 images, trained on a split -> a function from float images to classes."""
    def layer(c_in, c_out, stride):
        return [torch.nn.Conv2d(c_in, c_out, 3, stride, 1), torch.nn.BatchNorm2d(c_out), torch.nn.ReLU()]

    torch.manual_seed(0)
    model = torch.nn.Sequential(*layer(3, 32, 1), *layer(32, 64, 2), *layer(64, 64, 1), *layer(64, 128, 2), *layer(128, 128, 2),
                                torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(512, 10))
    opt = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    for step in range(steps):
        x, y = train.__getitems__(data.order(len(train), 128 * step, 128, seed=1))
        F.cross_entropy(model(data.to_float(x)), y).backward()
        opt.step(), opt.zero_grad(), schedule.step()
    model.eval().requires_grad_(False)
    return lambda x: torch.cat([model(part).argmax(1) for part in x.split(500)])


@slow
def test_judge_of_the_default_pipeline(tmp_path):
    start = time.time()
    for script in ("vae.py", "diffusion.py", "sample.py"):
        subprocess.run([sys.executable, HERE / script], cwd=tmp_path, check=True)
        print(f"{script}: {time.time() - start:.0f} s since the start")
    run = tmp_path / "out" / "shapes"
    sample.main(["--out", str(run), "--n", "500", "--npz", str(tmp_path / "samples.npz")])
    train, val = data.load("shapes")
    judge, x = train_judge(train), data.to_float(val.pixels)
    model, _ = vae.load_vae(run / "vae.pt")
    recon = torch.cat([model(part, torch.zeros(()))[0] for part in x.split(500)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (recon - x).square().mean((1, 2, 3))).mean()
    samples = np.load(tmp_path / "samples.npz")
    named = judge(data.to_float(torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2))) == torch.from_numpy(samples["arr_1"])
    on_val, on_recon, on_samples = (judge(x) == val.labels).float().mean(), (judge(recon) == val.labels).float().mean(), named.float().mean()
    print(f"judge on val {on_val:.1%}, on reconstructions {on_recon:.1%} (PSNR {psnr:.2f} dB), on 500 samples {on_samples:.1%}: "
          + ", ".join(f"{name} {named[samples['arr_1'] == k].float().mean():.0%}" for k, name in enumerate(train.classes)))
    assert on_val >= 0.98 and psnr >= 30 and on_recon >= 0.95 and on_samples >= 0.9
