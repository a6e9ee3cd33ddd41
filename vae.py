"""Stage one: a KL-VAE trained against a PatchGAN (Rombach et al. 2022, arXiv:2112.10752).

    python vae.py                           # shapes
    python vae.py --data imagenet           # data/imagenet/train/<wnid>/*.JPEG
    torchrun --nproc-per-node 8 vae.py --data imagenet

Writes out/<data>/: vae.pt, vae.csv (every loss and its share) and recon_*.png (images above,
reconstructions below). On two CPU cores the default takes a minute and a half and ends at a val_psnr of 34.2 dB.
"""
import contextlib
import functools
import math
import os
import sys
import time
import timeit
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import data

# -------------------------------------------------------------------------------------------------
# run
DATA = "shapes"             # shapes, cifar10, imagenet, or a folder of images
DATA_DIR = ""               # where a named dataset lies; empty: data/<name>
PRESET = ""                 # one of shapes, cifar10, imagenet; the row below to start from, empty: by --data
SIZE = 32                   # pixels a side
OUT = ""                    # the run's folder; empty: out/<data>
MAX_STEPS = 1600            # updates of the VAE, and of the discriminator
BATCH_SIZE = 8              # images per micro-step, over all processes
ACCUM = 1                   # micro-steps per update
EVAL_EVERY = 800            # updates between validations, pictures and checkpoints
EVAL_IMAGES = 1000          # validation images used, the same ones each time
LOG_EVERY = 10              # updates between rows of the log
SEED = 0                    # of the weights, the order of the images and all noise
RESUME = False              # go on from the run's checkpoint
OVERWRITE = False           # start again on top of a run
# model
WIDTHS = (32, 64, 64)       # channels at each resolution; one halving between neighbours
BLOCKS = 1                  # residual blocks at each resolution (the decoder has one more)
Z_CHANNELS = 16             # of the latent
ATTENTION = False           # self-attention at the lowest resolution
DISC_WIDTH = 32             # channels of the discriminator's first layer
# loss
L1_WEIGHT = 0.0             # pixel loss = (1 - this) * mse + this * l1
KL_WEIGHT = 4e-3            # on the KL per latent element, after the warmup
KL_WARMUP = 0.2             # share of the updates over which the KL's weight grows from 0
ADV_WEIGHT = 0.02           # on the adversarial loss, after the warmup
ADV_WARMUP = 0.4            # share of the updates over which the adversarial weight grows from 0
FM_WEIGHT = 0.1             # on feature matching
GAN_LOSS = "bce"            # one of bce, hinge
PERCEPTUAL_WEIGHT = 0.0     # on VGG16 features; above 0 torchvision downloads 528 MB of weights
# optimiser
LR = 1e-3                   # VAE: AdamW, cosine decay
LR_MIN = 1e-7               # where the cosine ends
DISC_LR = 1e-3              # discriminator
DISC_LR_MIN = 1e-7          # where its cosine ends
CLIP = 1.0                  # gradient norm of either player
# system
DEVICE = ""                 # cuda, cpu, mps; empty: cuda where there is one
BF16 = None                 # bfloat16 autocast; unset: where it is faster
COMPILE = None              # torch.compile; unset: on a GPU
GRAD_CHECKPOINT = False     # recompute the residual blocks in the backward pass: a fifth of the activations, slower
WORKERS = 8                 # processes that decode images which do not fit in memory
BENCH = False               # time the steps on random images and stop; writes nothing
# -------------------------------------------------------------------------------------------------
PRESETS = {
    "shapes": {},
    "cifar10": dict(SIZE=64, MAX_STEPS=117_000, BATCH_SIZE=128, EVAL_EVERY=2000, WIDTHS=(64, 128, 256), BLOCKS=2, Z_CHANNELS=4,
                    ATTENTION=True, DISC_WIDTH=64, L1_WEIGHT=0.8, KL_WEIGHT=2e-2, LR=8e-4, DISC_LR=2.4e-3, DISC_LR_MIN=1e-6),
    "imagenet": dict(SIZE=256, MAX_STEPS=130_110, BATCH_SIZE=8, ACCUM=16, EVAL_EVERY=1000, WIDTHS=(128, 256, 512, 512), BLOCKS=2,
                     Z_CHANNELS=4, ATTENTION=True, DISC_WIDTH=64, L1_WEIGHT=0.8, KL_WEIGHT=1e-2, LR=1e-4, DISC_LR=3e-4),
}
BETAS = (0.5, 0.9)          # of both AdamWs: a short memory suits a moving target
AMX = torch.cpu._is_amx_tile_supported()        # a CPU with matrix units
SPIKE = 1000.0              # an update whose gradient norm is above this is skipped
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}     # dense bf16 FLOP/s


# ---- the autoencoder ----------------------------------------------------------------------------

def norm(channels):
    return nn.GroupNorm(math.gcd(channels, min(32, channels // 4)), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Pre-activation residual block: [b, c_in, h, w] -> [b, c_out, h, w]."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)      # starts as its shortcut

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def attend(q, k, v):
    """Softmax attention over [..., n, d]."""
    # on CPUs two products take a third to two thirds of the fused kernel's time in bf16, but for AMX without a backward pass
    if q.device.type == "cpu" and (torch.is_grad_enabled() or not AMX):
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Single-head self-attention over the pixels, with 1x1 projections: [b, c, h, w] -> the same."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)   # [b, 1, hw, c]
        h = attend(q, k, v)
        return x + self.out(h.squeeze(1).transpose(1, 2).contiguous().view(x.shape))     # else all that follows is channels-last


class Downsample(nn.Conv2d):
    """Halve the resolution: pad right and below, 3x3 convolution of stride 2."""

    def __init__(self, c):
        super().__init__(c, c, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Double the resolution: nearest neighbour, then a 3x3 convolution. [b, c, h, w] -> [b, c, 2h, 2w].

    Done as one transposed convolution of stride 2, which never makes the large image: of the nine taps several fall on
    the same small pixel, and summed beforehand they are a 4x4 kernel, of which an output meets 2x2. 4/9 of the work.
    """

    def __init__(self, c):
        super().__init__(c, c, 3, padding=1)
        tap_to_taps = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
        self.register_buffer("fold", torch.kron(tap_to_taps, tap_to_taps), persistent=False)        # [3 * 3, 4 * 4]

    def forward(self, x):
        kernel = (self.weight.flatten(2) @ self.fold).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


def recompute(model, *kinds):
    """Have every module of these kinds keep its inputs alone and compute the rest again in the backward pass."""
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def levels(widths, blocks, resample):
    """Residual blocks at each width, a change of resolution between neighbours."""
    layers = [ResBlock(widths[0], widths[0]) for _ in range(blocks)]
    for c, width in zip(widths, widths[1:]):
        layers += [resample(c), ResBlock(c, width), *(ResBlock(width, width) for _ in range(blocks - 1))]
    return layers


def middle(c, attention):
    return [ResBlock(c, c), Attention(c), ResBlock(c, c)] if attention else [ResBlock(c, c), ResBlock(c, c)]


class VAE(nn.Module):
    """KL autoencoder of the published KL-f8 shape: [b, 3, s, s] in [-1, 1] <-> [b, z_channels, s/f, s/f].

    f = 2 ** (len(widths) - 1). With widths (128, 256, 512, 512) and 4 latent channels: 83,653,863
    parameters. Convolutions start by keeping the variance of what they get, but for the zeros at the end of the residual
    blocks. The ends of the two halves are no zeros: the decoder would learn to ignore the latent.
    """

    def __init__(self, widths, blocks=2, z_channels=4, attention=True):
        super().__init__()
        self.factor, self.z_channels, self.wide = 2 ** (len(widths) - 1), z_channels, widths[0] >= 128
        first, last = widths[0], widths[-1]
        encoder = [nn.Conv2d(3, first, 3, padding=1), *levels(widths, blocks, Downsample), *middle(last, attention),
                   norm(last), nn.SiLU(), nn.Conv2d(last, 2 * z_channels, 3, padding=1)]
        decoder = [nn.Conv2d(z_channels, last, 3, padding=1), *middle(last, attention),
                   *levels(widths[::-1], blocks + 1, Upsample), norm(first), nn.SiLU(), nn.Conv2d(first, 3, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.quant = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant = nn.Conv2d(z_channels, z_channels, 1)
        for name, conv in self.named_modules():
            if isinstance(conv, nn.Conv2d) and not name.endswith("conv2"):
                nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)        # PyTorch's start keeps a third of it
        nn.init.constant_(self.quant.bias.data[z_channels:], -4)        # log-variance: little noise at first

    def through(self, layers, x):
        if self.wide and not torch.is_grad_enabled():   # faster, but for GroupNorm's backward pass and small groups on CPUs
            x = x.contiguous(memory_format=torch.channels_last)
        return layers(x)

    def encode(self, x):
        """Images [b, 3, s, s] -> mean and log-variance of q(z|x), float32 [b, z_channels, s/f, s/f] each."""
        mean, logvar = self.quant(self.through(self.encoder, x)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-20, 20)

    def decode(self, z):
        """Latents [b, z_channels, h, w] -> images, float32 [b, 3, f*h, f*w], in [-1, 1] but for overshoot."""
        return self.through(self.decoder, self.post_quant(z)).float()

    def forward(self, x, noise):
        """Images and standard normal noise (0 for the mean) -> reconstruction, mean, log-variance."""
        mean, logvar = self.encode(x)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar


# ---- the discriminator --------------------------------------------------------------------------

class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images [b, 3, s, s] -> a map of logits and the features of every layer.

    Strided 4x4 convolutions, as many (4 at most) as keep a logit's receptive field below the image:
    18, 38, 78 pixels for 2, 3, 4. GroupNorm, because batch statistics break under accumulation.
    """

    def __init__(self, size, width=64):
        super().__init__()
        depth = max([n for n in (2, 3, 4) if 2 ** n * 5 - 2 < size], default=1)
        widths = [3] + [width * 2 ** i for i in range(depth)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c_in, c, 4, stride=2, padding=1), norm(c) if c_in != 3 else nn.Identity(), nn.LeakyReLU(0.2))
            for c_in, c in zip(widths, widths[1:]))
        self.logits = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x):
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.logits(x).float(), features


# ---- losses, all in float32 ---------------------------------------------------------------------

def pixel_loss(recon, x, l1_weight):
    return (1 - l1_weight) * F.mse_loss(recon, x) + l1_weight * F.l1_loss(recon, x)


def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, the mean over latent elements (Kingma and Welling 2014, app. B)."""
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()


def generator_loss(fake, kind):
    """The VAE's adversarial loss on the logits of its reconstructions."""
    return F.softplus(-fake).mean() if kind == "bce" else -fake.mean()


def discriminator_loss(real, fake, kind):
    """Binary cross-entropy (0.69 = ln 2 when confused) or hinge (1 when confused), mean over real and fake."""
    if kind == "bce":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def feature_loss(fake, real):
    """Feature matching (Wang et al. 2018): L1 between two lists of features, mean over layers."""
    return sum(F.l1_loss(f.float(), r.float()) for f, r in zip(fake, real)) / len(fake)


class Perceptual(nn.Module):
    """Distance of unit-normalised VGG16 features at five depths: LPIPS (Zhang et al. 2018) without learned weights."""

    def __init__(self):
        super().__init__()
        from torchvision.models import VGG16_Weights, vgg16
        layers = vgg16(weights=VGG16_Weights.DEFAULT).features.eval().requires_grad_(False)
        self.stages = nn.ModuleList([layers[:4], layers[4:9], layers[9:16], layers[16:23], layers[23:30]])
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))     # ImageNet's, of images in [-1, 1]
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, recon, x):
        a, b, loss = (recon - self.mean) / self.std, (x - self.mean) / self.std, 0.0
        for stage in self.stages:
            a, b = stage(a), stage(b)
            loss += (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
        return loss


# ---- progress and speed -------------------------------------------------------------------------

class Log:
    """A CSV row per logged step, one terminal line that updates, and TensorBoard where it is installed.

    The first process alone writes; nobody does if `path` is empty. Also has updates skipped, and counts them.
    """

    def __init__(self, path, step, total, flops, peak):
        """`flops` is per image, `peak` the FLOP/s of all devices. A resumed run drops what came after its `step`."""
        self.path, self.total, self.flops, self.peak = path, total, flops, peak
        self.values, self.clock, self.shown, self.board = {"step": step}, time.perf_counter(), 0.0, None
        self.skipped = self.in_a_row = self.longest = 0.0   # updates: all, the latest in a row, the most in a row
        self.writes = path and data.RANK == 0
        lines = open(path).readlines() if step and os.path.exists(path) else []
        lines = [line for line in lines if line[-1] == "\n" and (line[:4] == "step" or int(line.split(",")[0]) <= step)]
        self.columns = lines[0].strip().split(",") if lines else []
        if lines[1:]:
            self.skipped = float(lines[-1].split(",")[self.columns.index("skipped")])
        if self.writes:
            data.replace_file(path, lambda f: f.write("".join(lines).encode()))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(os.path.dirname(path), purge_step=step)

    def skip_unsound(self, norms, *optimisers):
        """Have the next step of the optimisers do nothing if a gradient norm is a spike or not finite.

        Decided on the device, without waiting for it, on the norms of the averaged gradients: all processes alike.
        """
        unsound = (~(torch.stack(norms) < SPIKE).all()).float()         # a NaN is not below
        for optimiser in optimisers:
            optimiser.found_inf = unsound                               # what a fused AdamW looks at
        self.skipped = self.skipped + unsound
        self.in_a_row = (self.in_a_row + unsound) * unsound
        self.longest = self.in_a_row.clamp(min=self.longest)

    def row(self, step, batch, show, **values):
        """Log `values` after `step` updates of `batch` images; the terminal line shows the columns in `show`."""
        if self.longest >= 10:
            raise SystemExit(f"error: ten updates in a row had gradients not finite or of a norm above {SPIKE:g} and were skipped; "
                             f"go on from the checkpoint with --resume and a lower --lr, or --no-bf16")
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / (step - self.values["step"]), now
        self.values |= {"step": step, "images/s": batch / seconds, "mfu": batch * self.flops / seconds / self.peak,
                        "skipped": float(self.skipped), **values}
        if not self.writes:
            return
        with open(self.path, "a") as f:
            if not self.columns:
                self.columns = list(self.values)
                f.write(",".join(self.columns) + "\n")
            f.write(",".join(f"{self.values.get(name, math.nan):.7g}" for name in self.columns) + "\n")
        for name, value in self.values.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        show = [name for name in (*show, "skipped") if self.values.get(name)]
        line = "  ".join([f"step {step:,}/{self.total:,}", f"{(self.total - step) * seconds / 60:.1f} min left",
                          f"{batch / seconds:.0f} images/s", *(f"{name} {self.values[name]:.4g}" for name in show)])
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="" if step < self.total else "\n", flush=True)
        elif now - self.shown > 10 or step == self.total:
            self.shown = now
            print(line)


def count_flops(step):
    """FLOPs of step(), whose modules and tensors are made within it and hold no data: torch.device("meta")."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_flops(device, bf16):
    """FLOP/s that the device can reach: the vendor's dense bf16 figure, else a large matrix product timed here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [peak for gpu, peak in PEAKS.items() if gpu in name and bf16]
    n = 8192 if name else 2048
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return known[0] if known else 2 * n ** 3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=5))


class Bench:
    """The clock of --bench: part(name) ends a part of a step, and with `last` the step. Does nothing unless `on`."""

    def __init__(self, on, device):
        self.on, self.device, self.steps, self.clock = on, device, [{}], None

    def part(self, name, last=False):
        if self.on:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self.steps[-1][name] = self.steps[-1].get(name, 0) + now - (self.clock or now)
            self.clock = now
            if last:
                self.steps.append({})

    def report(self, what, images, flops, peak):
        """Print the medians over all steps but the first three; a step is so many images and FLOPs."""
        steps = self.steps[3:-1]
        seconds = np.median([sum(step.values()) for step in steps])
        parts = ", ".join(f"{name} {np.median([step[name] for step in steps]) / seconds:.0%}" for name in self.steps[0])
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            import resource                             # not on Windows
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"{what}: {seconds:.4g} s for {images} images, {images / seconds:.4g} images/s, {flops / seconds / 1e12:.3g} of "
              f"{peak / 1e12:.3g} TFLOP/s = {flops / seconds / peak:.0%}, peak memory {memory / 1e9:.2f} GB; {parts}")


# ---- training -----------------------------------------------------------------------------------

def micro_step(run_vae, run_disc, disc, perceptual, x, noise, weights, cfg, steps, autocast, part=lambda name: None):
    """Add the gradients of both players on images x [b, 3, s, s], 1/steps of each, from one forward of the VAE.

    The discriminator sees a detached reconstruction and is frozen in the VAE's pass, so neither loss
    reaches the other's weights. `run_*` are the compiled or distributed modules -> names and values [n].
    """
    with autocast:
        recon, mean, logvar = run_vae(x, noise)
        part("VAE forward")
        logits, features = run_disc(torch.cat([x, recon.detach()]))
        real, fake = logits.chunk(2)
        disc_loss = discriminator_loss(real, fake, cfg.gan_loss)
    (disc_loss / steps).backward()
    part("discriminator")

    disc.requires_grad_(False)
    with autocast:
        fake_logits, fake_features = disc(recon)
        terms = {"pixel": pixel_loss(recon, x, cfg.l1_weight), "kl": kl_loss(mean, logvar),
                 "adv": generator_loss(fake_logits, cfg.gan_loss),
                 "fm": feature_loss(fake_features, [f[:len(x)].detach() for f in features])}
        if perceptual:
            terms["perceptual"] = perceptual(recon, x)
        loss = sum(weights[name] * value for name, value in terms.items())
    (loss / steps).backward()
    disc.requires_grad_(True)
    part("VAE backward, through the discriminator")
    values = {**terms, "loss": loss, "disc": disc_loss, "real": real.mean(), "fake": fake.mean()}
    return list(values), torch.stack(list(values.values())).detach()


def cosine(start, end, progress):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def build(cfg):
    return VAE(cfg.widths, cfg.blocks, cfg.z_channels, cfg.attention)


def flops_per_image(cfg):
    """Of both players' forward and backward passes, without what --grad-checkpoint computes again."""
    def step():
        vae, disc, x = build(cfg), Discriminator(cfg.size, cfg.disc_width), torch.empty(1, 3, cfg.size, cfg.size)
        weights = dict.fromkeys(("pixel", "kl", "adv", "fm"), 1.0)
        micro_step(vae, disc, disc, None, x, torch.zeros(()), weights, cfg, 1, contextlib.nullcontext())
    return count_flops(step)


def load_vae(path, device="cpu"):
    """A trained VAE, frozen -> (VAE, its checkpoint)."""
    state = data.load_checkpoint(path, "vae.py")
    vae = build(SimpleNamespace(**state["config"]))
    vae.load_state_dict(state["vae"])
    return vae.to(device).eval().requires_grad_(False), state


@torch.no_grad()
def evaluate(vae, val, cfg, step, device, autocast):
    """Validation figures of the reconstructions from the mean; the first 8 go to recon_<step>.png, below their images."""
    rows, sums = data.order(len(val), 0, min(len(val), cfg.eval_images), seed=0), torch.zeros(5)
    for k, some in enumerate(rows.split(max(8, cfg.batch_size))):
        x = data.to_float(val.__getitems__(some)[0].to(device))
        with autocast:
            recon, mean, logvar = vae.forward(x, torch.zeros((), device=device))      # uncompiled: another shape
        recon = recon.clamp(-1, 1)
        mse = (recon - x).square().mean((1, 2, 3))
        psnr = 10 * torch.log10(4 / mse)                                # images span 2, hence 2 ** 2
        second = mean.square() + logvar.exp()                           # moment of z, over the noise too
        sums += len(x) * torch.stack([mse.mean(), psnr.mean(), kl_loss(mean, logvar), mean.mean(), second.mean()]).cpu()
        if k == 0:
            picture = data.to_uint8(torch.cat([x[:8], recon[:8]]))
            data.save_grid(os.path.join(cfg.out, f"recon_{step:06d}.png"), picture, columns=8)
    mse, psnr, kl, mean, second = (sums / len(rows)).tolist()
    return {"val_mse": mse, "val_psnr": psnr, "val_kl": kl, "z_mean": mean, "z_std": math.sqrt(second - mean ** 2)}


def main(argv=None):
    given = data.flags(globals(), argv)
    cfg = data.settings(globals(), given, given.get("data", DATA))
    cfg.out = cfg.out or data.folder_of(cfg.data)
    state = None if cfg.bench else data.begin(cfg, given, "vae.pt", "vae.py")
    rank, world, device, autocast = data.start(cfg)
    micro, steps = data.share(cfg, world)
    batch, factor = micro * steps * world, 2 ** (len(cfg.widths) - 1)
    if cfg.size % factor:
        raise SystemExit(f"error: --size {cfg.size} is no multiple of {factor}, by which {len(cfg.widths)} --widths downsample")
    if cfg.bench:
        pixels = torch.randint(256, (256, 3, cfg.size, cfg.size), dtype=torch.uint8)
        train, cfg.max_steps = data.Images(range(1000), torch.arange(256), cfg.size, pixels), given.get("max_steps", 20)
    else:
        train, val = data.load(cfg.data, cfg.data_dir, cfg.size, cfg.out)
        data.note(cfg, state, train)

    torch.manual_seed(cfg.seed)
    vae, disc = build(cfg).to(device), Discriminator(cfg.size, cfg.disc_width).to(device)
    if cfg.grad_checkpoint:
        recompute(vae, ResBlock)
    perceptual = Perceptual().to(device) if cfg.perceptual_weight else None
    vae_opt = torch.optim.AdamW(vae.parameters(), cfg.lr, BETAS, weight_decay=0.0, fused=True)
    disc_opt = torch.optim.AdamW(disc.parameters(), cfg.disc_lr, BETAS, weight_decay=0.0, fused=True)
    trained = {"vae": vae, "disc": disc, "vae_opt": vae_opt, "disc_opt": disc_opt}
    for name in trained if state else ():
        trained[name].load_state_dict(state[name])
    start = state["step"] if state else 0
    z_shape = (batch, cfg.z_channels, cfg.size // factor, cfg.size // factor)
    print(f"{cfg.data}: {len(train):,} images of {cfg.size}x{cfg.size} -> latents {list(z_shape[1:])}; VAE "
          f"{sum(p.numel() for p in vae.parameters()):,} and discriminator {sum(p.numel() for p in disc.parameters()):,} "
          f"parameters; {cfg.max_steps:,} updates of {world} x {steps} x {micro} images on {device}"
          f"{' in bf16' if cfg.bf16 else ''}")
    print(f"KL weight {cfg.kl_weight:g} per latent element = {cfg.kl_weight * 3 * factor ** 2 / cfg.z_channels:.3g} "
          f"x the KL summed against the pixel loss summed")

    if cfg.compile:
        vae.compile(dynamic=False), disc.compile(dynamic=False)         # in place: the names of the weights stay
    run_vae, run_disc = (DDP(vae), DDP(disc)) if world > 1 else (vae, disc)

    def save(step):
        if rank == 0:
            data.replace_file(os.path.join(cfg.out, "vae.pt"), lambda f: torch.save(
                {"made_by": "vae.py", "config": vars(cfg), "step": step,
                 **{name: part.state_dict() for name, part in trained.items()}}, f))

    flops, peak = flops_per_image(cfg), peak_flops(device, cfg.bf16) * world
    log = Log("" if cfg.bench else os.path.join(cfg.out, "vae.csv"), start, cfg.max_steps, flops, peak)
    if rank == 0 and not cfg.bench:             # where it starts from, and the names of the log's columns
        log.values |= evaluate(vae, val, cfg, start, device, autocast)
    signals, bench = data.Signals(not cfg.bench), Bench(cfg.bench, device)
    plan = data.schedule(len(train), micro, steps, start, cfg.max_steps, rank, world, cfg.seed)
    batches = data.feed(train, plan, device, cfg.workers)
    for step in range(start, cfg.max_steps):
        signals.check(step, save)

        # learning rates and warmups
        progress = step / cfg.max_steps
        vae_opt.param_groups[0]["lr"] = cosine(cfg.lr, cfg.lr_min, progress)
        disc_opt.param_groups[0]["lr"] = cosine(cfg.disc_lr, cfg.disc_lr_min, progress)
        weights = {"pixel": 1.0, "kl": cfg.kl_weight * min(1, progress / max(cfg.kl_warmup, 1e-9)),
                   "adv": cfg.adv_weight * min(1, progress / max(cfg.adv_warmup, 1e-9)),
                   "fm": cfg.fm_weight, "perceptual": cfg.perceptual_weight}

        # micro-steps: one forward of the VAE serves both players
        # all noise of the update at once, by row: the same for any number of processes and micro-steps
        source = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + step)
        flips = torch.rand(batch, 1, 1, 1, device=device, generator=source) < 0.5 * train.flip
        noise = torch.randn(z_shape, device=device, generator=source)
        sums = 0
        bench.part("log")
        for k in range(steps):
            rows = slice((k * world + rank) * micro, (k * world + rank + 1) * micro)
            x = data.to_float(next(batches)[0])
            x = torch.where(flips[rows], x.flip(3), x)
            bench.part("data")
            for module in (run_vae, run_disc):
                module.require_backward_grad_sync = k == steps - 1      # DDP averages at the last micro-step only
            names, values = micro_step(run_vae, run_disc, disc, perceptual, x, noise[rows], weights, cfg, steps, autocast,
                                       bench.part)
            sums = sums + values / steps

        # clip, step
        vae_norm = nn.utils.clip_grad_norm_(vae.parameters(), cfg.clip)
        disc_norm = nn.utils.clip_grad_norm_(disc.parameters(), cfg.clip)
        log.skip_unsound([vae_norm, disc_norm], vae_opt, disc_opt)
        vae_opt.step(), disc_opt.step()
        vae_opt.zero_grad(), disc_opt.zero_grad()
        bench.part("optimisers", last=True)

        # evaluate, picture, checkpoint
        step, last = step + 1, step + 1 == cfg.max_steps        # updates done
        if not cfg.bench and (step % cfg.eval_every == 0 or last):
            if rank == 0:
                log.values |= evaluate(vae, val, cfg, step, device, autocast)
            save(step)

        # log
        if not cfg.bench and (step % cfg.log_every == 0 or last):
            train.check()
            values = dict(zip(names, sums.tolist()))
            shares = {f"{name}_share": weights[name] * values[name] / values["loss"] for name in weights if name in values}
            log.row(step, batch, ("pixel", "kl", "adv", "fm", "disc", "val_psnr"), **values, **shares,
                    vae_norm=vae_norm.item(), disc_norm=disc_norm.item(), lr=vae_opt.param_groups[0]["lr"])
    if cfg.bench:
        return bench.report("update", batch, flops * batch, peak)
    print(f"{cfg.out}/vae.pt: " + ", ".join(f"{key} {value:.4g}" for key, value in log.values.items()
                                            if key.startswith(("val_", "z_"))))


if __name__ == "__main__":
    data.guard(main)
