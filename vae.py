"""Stage one: a KL-VAE trained against a PatchGAN (Rombach et al. 2022, arXiv:2112.10752).

    python vae.py                                   # shapes
    python vae.py --data imagenet                   # data/imagenet/train/<wnid>/*.JPEG
    python vae.py --eval --png scored               # PSNR and SSIM of what was trained

Writes vae.pt, vae.csv and recon_*.png (images above, reconstructions below) to out/<data>/.
"""
import argparse
import csv
import ctypes
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import VGG16_Weights, vgg16
from torchvision.transforms.functional import normalize

import data

# ---- settings: the defaults are those of `shapes`; over them goes a preset, then flags ----------
PRESETS = {
    "shapes": {},
    "cifar10": dict(
        size=64, max_steps=117_000, batch_size=128, eval_every=2000, widths=[64, 128, 256],
        blocks=2, z_channels=4, attention=True, disc_width=64, l1_weight=0.8, kl_weight=2e-2,
        lr=8e-4, disc_lr=2.4e-3, compile=None),
    "cifar10-small": dict(max_steps=4800, batch_size=16, eval_every=1600, z_channels=16,
                          l1_weight=0.8, kl_weight=5e-3, lr=8e-4),
    "imagenet": dict(
        size=256, max_steps=130_110, batch_size=128, micro_batch=8, eval_every=1000,
        widths=[128, 256, 512, 512], blocks=2, z_channels=4, attention=True, disc_width=64,
        l1_weight=0.8, kl_weight=1e-2, lr=1e-4, disc_lr=3e-4, compile=None)
}
CALL = ["resume", "overwrite", "out", "init", "eval", "png", "export"]     # not saved with a run
ARCHITECTURE = ["widths", "blocks", "z_channels", "attention", "groups", "quant", "bottleneck",
                "codes", "code_width", "levels"]

def settings(argv=None):
    """-> the settings, and the checkpoint they build on (--resume, --init, --eval), or None"""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    yes_no = argparse.BooleanOptionalAction
    # run
    flag("--data", default="", help="shapes (if empty), cifar10, imagenet, or a folder of images")
    flag("--preset", default="", choices=["", *PRESETS], help="a row of PRESETS; empty: by --data")
    flag("--size", type=int, default=32, help="pixels a side")
    flag("--out", default="", help="the run's folder; empty: out/<data>")
    flag("--max-steps", type=int, default=1800, help="updates; 0: save the weights of --init")
    flag("--batch-size", type=int, default=8, help="images per update, over all processes")
    flag("--micro-batch", type=int, default=0, help="of which in one forward pass; 0: all")
    flag("--eval-every", type=int, default=900, help="updates between validations, checkpoints")
    flag("--log-every", type=int, default=10, help="updates between rows of the log")
    flag("--seed", type=int, default=0, help="of the weights, the images' order and all noise")
    flag("--resume", action="store_true", help="go on with the run in --out, or the newest")
    flag("--overwrite", action="store_true", help="start again on top of a run")
    flag("--init", default="", help="a vae.pt or diffusers' AutoencoderKL to start from")
    flag("--train-only", default="", choices=["", "decoder"], help="leave the latents as they are")
    # model
    flag("--widths", type=int, nargs="+", default=[32, 64, 64], help="channels at each resolution")
    flag("--blocks", type=int, default=1, help="residual blocks at each; the decoder has 1 more")
    flag("--z-channels", type=int, default=6, help="channels of the latent")
    flag("--attention", action=yes_no, default=False, help="at the lowest resolution")
    flag("--bottleneck", default="kl", choices=["kl", "vq", "fsq"], help="noise and KL, or codes")
    flag("--codes", type=int, default=512, help="vq: codes in the book")
    flag("--code-width", type=int, default=2, help="vq: channels of a code")
    flag("--levels", type=int, default=16, help="fsq: values that a channel can take")
    flag("--disc-width", type=int, default=32, help="channels of the discriminator's first layer")
    # loss
    flag("--l1-weight", type=float, default=0.0, help="pixel loss: (1 - this) * mse + this * l1")
    flag("--kl-weight", type=float, default=2e-3, help="on the KL per latent element, in the end")
    flag("--kl-warmup", type=float, default=0.2, help="share of the updates")
    flag("--adv-weight", type=float, default=0.02, help="on the adversarial loss, in the end")
    flag("--adv-warmup", type=float, default=0.4, help="share of the updates")
    flag("--fm-weight", type=float, default=0.1, help="on feature matching")
    flag("--gan-loss", default="bce", choices=["bce", "hinge"], help="of both players")
    flag("--perceptual-weight", type=float, default=0.0, help="on VGG16's features (528 MB)")
    # optimiser
    flag("--lr", type=float, default=1e-3, help="of the VAE: AdamW, cosine decay to zero")
    flag("--disc-lr", type=float, default=1e-3, help="of the discriminator, likewise")
    flag("--clip", type=float, default=1.0, help="gradient norm of either player")
    # system: what is not given, each machine decides for itself
    flag("--device", help="cuda, cpu, mps; by default cuda where there is one")
    flag("--bf16", action=yes_no, help="bfloat16 autocast; by default where it is faster")
    flag("--compile", action=yes_no, default=False, help="in cifar10, imagenet: on GPUs")
    flag("--grad-checkpoint", action="store_true", help="a fifth of the memory, slower")
    flag("--workers", type=int, default=8, help="threads that read images")
    # instead of training
    flag("--eval", action="store_true", help="PSNR and SSIM over all validation images")
    flag("--png", default="", help="with --eval: a new folder for images (real/, recon/)")
    flag("--export", default="", help="a new folder for the weights, as diffusers reads them")

    # defaults < preset < what the run saved, or the shape of --init < flags
    cfg = parser.parse_args(argv)
    from_run = cfg.resume or cfg.eval or cfg.export
    out = cfg.out or f"out/{os.path.basename(os.path.abspath(cfg.data or 'shapes'))}"
    if from_run and not cfg.init and not cfg.out and not cfg.data:
        out = os.path.dirname(newest("vae.pt"))
    preset = cfg.preset or cfg.data or "shapes"
    preset = preset if preset in PRESETS else "imagenet"
    parser.set_defaults(**PRESETS[preset], data="shapes", preset=preset, out=out, groups=0,
                        quant=True)                 # only published weights change the last two
    state = None
    if not from_run and not cfg.overwrite and os.path.exists(f"{out}/vae.pt"):
        sys.exit(f"error: {out}/vae.pt exists: give --resume, --overwrite, or another --out")
    if cfg.init and not cfg.resume:
        state = read_vae(cfg.init)
        parser.set_defaults(**{name: state["config"][name] for name in ARCHITECTURE})
    elif from_run:
        state = load_checkpoint(f"{out}/vae.pt")
        parser.set_defaults(**state["config"])
    elif cfg.max_steps == 0 or cfg.train_only:
        sys.exit("error: --max-steps 0 and --train-only take --init")
    cfg = parser.parse_args(argv)
    factor = 2 ** (len(cfg.widths) - 1)
    if cfg.size % factor > 0:
        sys.exit(f"error: --size must be a multiple of {factor}: --widths halve it so often")
    if cfg.bottleneck == "vq" and cfg.z_channels % cfg.code_width > 0:
        sys.exit("error: --z-channels must be a multiple of --code-width")
    if cfg.png and (not cfg.eval or os.path.exists(cfg.png)):
        sys.exit("error: --png takes --eval and a new folder")
    return cfg, state

# ---- processes, signals, files: what both loops need -------------------------------------------
def newest(name):
    found = sorted(Path("out").glob(f"*/{name}"), key=os.path.getmtime)
    if not found:
        sys.exit(f"error: no out/*/{name} here: train one first, or name its folder with --out")
    return found[-1]

def setup(cfg):
    """-> this process's rank, how many there are, its device, autocast, and whether to compile"""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= cfg.seed < 2 ** 64:
        sys.exit("error: --seed must be from 0 to 2^64 - 1")
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # folders have any name
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu" and sys.platform == "linux":
        # keep freed memory: new pages from the system took up to half of a step
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                         # M_MMAP_MAX: no mappings of its own
        libc.mallopt(-1, -1)                        # M_TRIM_THRESHOLD: never give back
    on_gpu = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    on_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    bf16 = (on_gpu or on_cpu) if cfg.bf16 is None else cfg.bf16
    # no cache: under --grad-checkpoint it would hold a second copy of the weights
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    if compiled and not any(map(shutil.which, ["cc", "gcc", "clang"])):
        sys.exit("error: torch.compile needs a C compiler: install gcc, or give --no-compile")
    return rank, world, device, autocast, compiled

def share_out(cfg, world):
    """An update's batch -> images that a process takes at a time, and how many times it does."""
    share = cfg.batch_size // world
    micro = max(1, min(cfg.micro_batch or share, share))
    if cfg.batch_size % (world * micro) > 0:
        sys.exit(f"error: --batch-size must be a multiple of {world} processes x {micro} images")
    return micro, share // micro

def generator(device, seed, step):
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2 ** 64)

def average_gradients(model):
    """Over all processes, in one message an update; DDP would send them in each backward pass."""
    if dist.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = total(torch.cat([grad.flatten() for grad in grads])) / dist.get_world_size()
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))

def total(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x

def wait():
    total(torch.zeros(1))                           # until all processes are here

def catch_signals():
    """-> a list of the signals that come, for the run to end after the update in progress"""
    caught = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)        # Windows has no SIGHUP, nohup ignores it
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: caught.append(number))
    return caught

def recompute(model, kind):
    """Have blocks of a kind keep only their inputs, and compute the rest anew when going back."""
    for block in model.modules():
        if isinstance(block, kind):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

def load_checkpoint(path):
    """To the CPU, and without running code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # a damaged file may raise anything
        sys.exit(f"error: {path} is not there, or damaged: {type(error).__name__}")

def save_checkpoint(path, state):
    """Written beside and renamed: a kill or a full disk leaves the old one whole."""
    try:
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:        # torch.save makes a RuntimeError of a full disk
        Path(f"{path}.part").unlink(missing_ok=True)
        sys.exit(f"error: can't write {path} ({error}); what was saved before is whole")

class Log:
    """A CSV, and a line on the terminal every five seconds."""
    def __init__(self, path, start, max_steps):
        self.path = path
        self.max_steps = max_steps
        self.printed = 0.0
        lines = []
        if start > 0 and os.path.exists(path):      # a resumed run keeps what came before it
            lines = Path(path).read_text("utf-8").splitlines()
        self.names = lines[0].split(",") if lines else None
        kept = [line for line in lines if line == lines[0] or int(line.split(",")[0]) <= start]
        Path(path).write_text("".join(line + "\n" for line in kept), "utf-8")

    def write(self, row, shown):
        """`row`: values by name, with step and seconds per update; `shown`: names to print"""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.names or list(row), extrasaction="ignore")
            if self.names is None:
                writer.writeheader()
                self.names = list(row)
            writer.writerow({name: f"{value:.7g}" for name, value in row.items()})
        if time.time() - self.printed > 5 or row["step"] == self.max_steps:
            self.printed = time.time()
            left = (self.max_steps - row["step"]) * row["seconds"] / 60
            print(f"step {row['step']:,}/{self.max_steps:,}", f"{left:.1f} min left",
                  *(f"{name} {row[name]:.4g}" for name in shown if name in row), sep="  ")

# ---- layers, named as in diffusers' AutoencoderKL, so that its state dicts are ours ------------
def norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)

def groups_for(widths):
    """Norm groups that divide all widths: up to 32, with at least four channels in each."""
    return math.gcd(*widths, min(32, min(widths) // 4 or 1))

def zeroed(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class ResBlock(nn.Module):
    """Pre-activation residual block; starts as its shortcut. [b, c_in, h, w] -> [b, c_out, h, w]"""
    def __init__(self, c_in, c_out, groups, kernel=3):
        super().__init__()
        self.norm1 = norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm2 = norm(c_out, groups)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h

def attend(q, k, v, mask=None):
    """Softmax attention of q [..., n, d] over k, v [..., m, d], where `mask` [..., m] is true."""
    if q.is_cpu and torch.is_grad_enabled():        # half the fused kernel's time, in training
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask)

class Attention(nn.Module):
    """Single-head self-attention over the pixels of [b, c, h, w]."""
    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = norm(c, groups)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)           # [b, h * w, c]
        h = self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.transpose(1, 2).reshape(x.shape)

class Downsample(nn.Module):
    """Half the resolution: pad right and below, 3x3 convolution of stride 2."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))

class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution. Both at once, for less work:
    a transposed convolution, in whose 4x4 kernel taps that meet the same small pixel are added."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        taps = F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1))     # flipped, as it is transposed
        rows = taps[:, :, :4] + taps[:, :, 1:]
        kernel = rows[:, :, :, :4] + rows[:, :, :, 1:]              # [c_out, c_in, 4, 4]
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)

class Level(nn.Module):
    """Residual blocks at one width, then perhaps a change of resolution."""
    def __init__(self, c_in, c_out, groups, blocks):
        super().__init__()
        inputs = [c_in] + [c_out] * (blocks - 1)
        self.resnets = nn.ModuleList(ResBlock(c, c_out, groups) for c in inputs)

    def forward(self, x):
        for layers in self.children():              # resnets, then downsamplers or upsamplers
            for layer in layers:
                x = layer(x)
        return x

def make_levels(widths, blocks, groups, change, name):
    """A Level for each width; all but the last end with a change of resolution."""
    levels = nn.ModuleList()
    for c_in, c_out in zip(widths[:1] + widths, widths):            # the first keeps its width
        levels.append(Level(c_in, c_out, groups, blocks))
    for level, width in zip(levels[:-1], widths):
        level.add_module(name, nn.ModuleList([change(width)]))
    return levels

class MidBlock(nn.Module):
    def __init__(self, c, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, c, groups), ResBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)] if attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)

# ---- the autoencoder ---------------------------------------------------------------------------
class Encoder(nn.Module):
    """Images [b, 3, s, s] -> moments of the latent [b, 2 * z_channels, s / f, s / f]."""
    def __init__(self, widths, blocks, z_channels, attention, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = make_levels(widths, blocks, groups, Downsample, "downsamplers")
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        for block in [self.conv_in, *self.down_blocks, self.mid_block]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

class Decoder(nn.Module):
    """Latents [b, z_channels, h, w] -> images [b, 3, f * h, f * w]."""
    def __init__(self, widths, blocks, z_channels, attention, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.up_blocks = make_levels(widths[::-1], blocks + 1, groups, Upsample, "upsamplers")
        self.conv_norm_out = norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        for block in [self.conv_in, self.mid_block, *self.up_blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

class VAE(nn.Module):
    """KL autoencoder of the published KL-f8 shape, images in [-1, 1]. With `codes`, a VQ or FSQ,
    there is neither noise nor KL: `decode` takes the code nearest to what `encode` gives."""
    def __init__(self, widths, blocks, z_channels, attention, groups=0, quant=True, codes=None):
        super().__init__()
        groups = groups or groups_for(widths)
        self.factor = 2 ** (len(widths) - 1)
        self.z_channels = z_channels
        self.encoder = Encoder(widths, blocks, z_channels, attention, groups)
        self.decoder = Decoder(widths, blocks, z_channels, attention, groups)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1) if quant else nn.Identity()
        self.codes = codes
        # layers keep the variance of their input (PyTorch's start: a third of it), blocks start as
        # their shortcut (conv2 is 0), and latents with little noise, or they would be ignored
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.endswith("conv2"):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        moments = self.quant_conv if quant else self.encoder.conv_out
        nn.init.constant_(moments.bias[z_channels:], -4)            # of the log-variance

    def encode(self, x):
        """-> mean and log-variance of q(z|x), float32 [b, z_channels, s / f, s / f] each"""
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        if self.codes is None:
            return mean, logvar.clamp(-20.0, 20.0)
        bounded = mean.tanh() if isinstance(self.codes, FSQ) else mean
        return bounded, torch.full_like(mean, -20.0)                # next to no noise

    def decode(self, z):
        """Latents [b, z_channels, h, w] -> images, float32 [b, 3, f * h, f * w]"""
        if self.codes is not None:
            code = self.codes(z)
            z = z + (code - z).detach()             # the code, but the gradient goes to z
        return self.decoder(self.post_quant_conv(z)).float()

    def forward(self, x, noise):
        mean, logvar = self.encode(x)
        z = mean + (0.5 * logvar).exp() * noise
        return self.decode(z), mean, logvar

# ---- codebooks: --bottleneck vq, fsq -----------------------------------------------------------
class VQ(nn.Module):
    """Vector quantisation (van den Oord et al. 2017): c / width codes at each place."""
    def __init__(self, codes, width):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, width))
        self.register_buffer("idle", torch.zeros(codes))            # updates since a code was taken

    def indices(self, z):
        """[b, c, h, w] -> indices of the nearest codes [b, c / width, h, w]"""
        places = z.detach().unflatten(1, (-1, self.codebook.shape[1])).movedim(2, -1)
        distances = torch.cdist(places.flatten(0, -2), self.codebook.detach())
        return distances.argmin(dim=1).view(places.shape[:-1])

    def forward(self, z):
        return self.codebook[self.indices(z)].movedim(-1, 2).flatten(1, 2)

    def loss(self, mean):
        """The codebook moves to the latents, and a quarter as much the latents to the codebook."""
        code = self(mean)
        return F.mse_loss(code, mean.detach()) + 0.25 * F.mse_loss(mean, code.detach())

    @torch.no_grad()
    def restart(self, taken, source):
        """A code that nothing took for a hundred updates becomes a used one, slightly moved. All
        processes do the same: `taken` [codes] is their sum, `source` is seeded alike."""
        self.idle += 1
        self.idle[taken > 0] = 0
        dead = self.idle >= 100
        used = torch.multinomial(taken.float(), len(taken), replacement=True, generator=source)
        noise = torch.randn(self.codebook.shape, device=taken.device, generator=source)
        self.codebook[dead] = (self.codebook[used] + 0.01 * noise)[dead]
        self.idle[dead] = 0

class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2024): each channel to the nearest level."""
    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def indices(self, z):
        return ((z.clamp(-1, 1) + 1) / 2 * (self.levels - 1)).round().long()

    def forward(self, z):
        return 2 * self.indices(z) / (self.levels - 1) - 1.0

# ---- the discriminator -------------------------------------------------------------------------
class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images -> a map of logits, and the features of every layer."""
    def __init__(self, size, width):
        super().__init__()
        # one to four layers: a logit sees 8, 18, 38, 78 pixels, less than the image if possible
        depth = 1 + sum(field < size for field in (18, 38, 78))
        self.layers = nn.ModuleList()
        c_in = 3
        for i in range(depth):
            c = width * 2 ** i
            conv = nn.Conv2d(c_in, c, 4, stride=2, padding=1)
            normed = nn.Identity() if i == 0 else norm(c, groups_for([c]))  # no batch statistics
            self.layers.append(nn.Sequential(conv, normed, nn.LeakyReLU(0.2)))
            c_in = c
        self.logits = nn.Conv2d(c_in, 1, 3, padding=1)

    def forward(self, x):
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.logits(x).float(), features

# ---- losses, in float32 ------------------------------------------------------------------------
def pixel_loss(recon, x, l1_weight):
    return (1 - l1_weight) * F.mse_loss(recon, x) + l1_weight * F.l1_loss(recon, x)

def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per element (Kingma and Welling 2014, app. B)."""
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()

def generator_loss(fake, kind):
    return F.softplus(-fake).mean() if kind == "bce" else -fake.mean()

def discriminator_loss(real, fake, kind):
    """ln 2 = 0.69 (bce) or 1 (hinge) when real and fake look the same."""
    if kind == "bce":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

def feature_loss(fakes, reals):
    """Feature matching (Wang et al. 2018): L1 between features, mean over layers."""
    losses = [F.l1_loss(fake.float(), real.float()) for fake, real in zip(fakes, reals)]
    return torch.stack(losses).mean()

class Perceptual(nn.Module):
    """Distance of normalised VGG16 features: LPIPS (Zhang et al. 2018), no learned weights."""
    def __init__(self):
        super().__init__()
        layers = vgg16(weights=VGG16_Weights.DEFAULT).features.eval().requires_grad_(False)
        bounds = [0, 4, 9, 16, 23, 30]
        self.stages = nn.ModuleList(layers[a:b] for a, b in zip(bounds, bounds[1:]))

    def forward(self, recon, x):
        h = (torch.cat([recon, x]) + 1) / 2
        h = normalize(h, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])          # ImageNet's
        loss = 0.0
        for stage in self.stages:
            h = stage(h)
            a, b = F.normalize(h.float(), dim=1).chunk(2)
            loss = loss + (a - b).square().sum(dim=1).mean()
        return loss

# ---- figures of merit --------------------------------------------------------------------------
def psnr(a, b):
    """Images [n, 3, h, w] in [-1, 1] -> decibels [n]"""
    return 10 * torch.log10(2 ** 2 / (a - b).square().mean(dim=(1, 2, 3)))

def ssim(a, b):
    """Structural similarity (Wang et al. 2004): images [n, 3, h, w] in [-1, 1] -> [n]"""
    a = a + 1                                       # its constants, below, are 1% and 3% of [0, 2]
    b = b + 1
    window = min(11, a.shape[2])
    line = torch.arange(window, device=a.device) - (window - 1) / 2
    gauss = torch.exp(-0.5 * (line / 1.5) ** 2)
    gauss = gauss / gauss.sum()

    def blur(x):                                    # no convolution: TF32 is too coarse for it
        x = (x.unfold(2, window, 1) * gauss).sum(dim=-1)
        return (x.unfold(3, window, 1) * gauss).sum(dim=-1)
    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.02 ** 2) / (mean_a ** 2 + mean_b ** 2 + 0.02 ** 2)
    contrast = (2 * covariance + 0.06 ** 2) / (var_a + var_b + 0.06 ** 2)
    return (luminance * contrast).mean(dim=(1, 2, 3))

@torch.no_grad()
def evaluate(vae, val, count, cfg, device, autocast, perceptual=None):
    """Reconstruct images from the mean -> figures, means over images, and a picture of eight"""
    sums = {}
    codes = 0
    drawings = []                                   # images and their reconstructions
    rows = data.shuffled(len(val), 0, 0)[:count]    # the same ones each time
    batches = [rows[k:k + 8] for k in range(0, len(rows), 8)]
    for batch, (pixels, _) in zip(batches, data.prefetch(val.__getitem__, batches, cfg.workers)):
        x = data.to_float(pixels.to(device))
        with autocast:
            mean, logvar = vae.encode(x)
            recon = vae.decode(mean).clamp(-1, 1)
        figures = {"val_psnr": psnr(recon, x), "val_ssim": ssim(recon, x), "z_mean": mean}
        figures["z_square"] = mean ** 2 + logvar.exp()              # of z, which has noise
        if vae.codes is None:
            figures["val_kl"] = kl_loss(mean, logvar)
        else:
            taken = vae.codes.indices(mean).flatten().bincount(minlength=cfg.codes + cfg.levels)
            codes = codes + taken                   # the length is enough for either bottleneck
        if perceptual is not None:
            figures["val_perceptual"] = perceptual(recon, x)
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + len(x) * value.mean().item()
        drawn = data.to_uint8(recon).cpu()
        drawings = drawings or [pixels, drawn]
        for name, images in (("real", pixels), ("recon", drawn)):
            for row, image in zip(batch, images if cfg.png else []):
                data.to_image(image).save(f"{cfg.png}/{name}/{row:06d}.png")

    figures = {name: value / len(rows) for name, value in sums.items()}
    figures["z_std"] = math.sqrt(figures.pop("z_square") - figures["z_mean"] ** 2)
    if vae.codes is not None:
        figures["val_used"] = (codes > 0).sum().item()
        figures["val_perplexity"] = torch.special.entr(codes / codes.sum()).sum().exp().item()
    return figures, data.grid(torch.cat(drawings), columns=len(drawings[0]))

# ---- weights, in and out -----------------------------------------------------------------------
def build(cfg):
    codes = None
    if cfg.bottleneck == "vq":
        codes = VQ(cfg.codes, cfg.code_width)
    elif cfg.bottleneck == "fsq":
        codes = FSQ(cfg.levels)
    return VAE(cfg.widths, cfg.blocks, cfg.z_channels, cfg.attention, cfg.groups, cfg.quant, codes)

def load_vae(state):
    """The VAE of a vae.pt, or of a diffusion.pt, which carries it along, frozen."""
    vae = build(argparse.Namespace(**state.get("vae_config", state["config"])))
    vae.load_state_dict(state["vae"])
    return vae.to(memory_format=torch.channels_last).requires_grad_(False)  # faster on CPUs

def read_weights(path):
    """A published file -> its tensors by name; a checkpoint of ours is returned whole"""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file     # pip install safetensors
        state = load_file(path)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):    # DiT's checkpoints hold one
            state = load_checkpoint(path)
    if "vae" in state:
        return state
    for part in ("state_dict", "ema", "model"):
        if isinstance(state.get(part), dict):
            state = state[part]
    # DistributedDataParallel and torch.compile put a word before every name
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor.float()
            for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}

OLDER = [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."),
         (".proj_attn.", ".to_out.0.")]             # names before diffusers 0.18

def read_vae(path):
    """A vae.pt, or diffusers' AutoencoderKL, a folder or a file beside its config.json -> what a
    vae.pt says. Norm groups, scale and shift are in the config, the shape is in the tensors."""
    if os.path.isdir(path):
        files = [f"{path}/diffusion_pytorch_model.{kind}" for kind in ("bin", "safetensors")]
        path = files[os.path.exists(files[1])]
    weights = read_weights(path)
    if "vae" in weights:
        return weights
    for old, new in OLDER:
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(parts)}
    if "decoder.conv_in.weight" not in weights:
        sys.exit(f"error: {path} holds no KL autoencoder: there is no decoder.conv_in.weight")
    file = Path(path).with_name("config.json")
    if not file.exists():
        sys.exit(f"error: no config.json beside {path}: it alone says the number of norm groups")
    about = json.loads(file.read_text(encoding="utf-8"))
    resnets = [name for name in sorted(weights) if re.match(r"encoder.down.*conv1.bias", name)]
    config = {
        "widths": [len(weights[name]) for name in resnets if ".resnets.0." in name],
        "blocks": sum(".down_blocks.0." in name for name in resnets),
        "z_channels": weights["decoder.conv_in.weight"].shape[1],
        "attention": "encoder.mid_block.attentions.0.to_q.weight" in weights,
        "groups": about.get("norm_num_groups", 32),
        "quant": "quant_conv.weight" in weights,
        "bottleneck": "kl", "codes": 0, "code_width": 1, "levels": 0
    }
    with torch.device("meta"):
        expected = build(argparse.Namespace(**config)).state_dict()
    differing = sorted({*weights} ^ {*expected})
    if differing:
        sys.exit(f"error: {path} is no AutoencoderKL with attention in the middle: {differing[0]}")
    return {"vae": weights, "config": config, "step": 0, "shift": about.get("shift_factor") or 0.0,
            "scale": about.get("scaling_factor") or 0.18215}            # diffusers' default

def export(state, folder):
    """Write a vae.pt's VAE as diffusers' AutoencoderKL.from_pretrained reads it."""
    cfg = argparse.Namespace(**state["config"])
    if cfg.bottleneck != "kl":
        sys.exit(f"error: diffusers' layout has no place for a bottleneck of {cfg.bottleneck}")
    levels = len(cfg.widths)
    config = {
        "_class_name": "AutoencoderKL", "mid_block_add_attention": cfg.attention,
        "block_out_channels": cfg.widths, "layers_per_block": cfg.blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": cfg.z_channels, "norm_num_groups": cfg.groups or groups_for(cfg.widths),
        "use_quant_conv": cfg.quant, "use_post_quant_conv": cfg.quant,
        "scaling_factor": state["scale"] or 1 / state["figures"]["z_std"],
        "shift_factor": state["shift"]
    }
    os.makedirs(folder)
    Path(folder, "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    torch.save(state["vae"], f"{folder}/diffusion_pytorch_model.bin")

# ---- training ----------------------------------------------------------------------------------
def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))

def main(argv=None):
    cfg, state = settings(argv)
    rank, world, device, autocast, compiled = setup(cfg)
    path = f"{cfg.out}/vae.pt"

    # instead of training
    if cfg.export:
        return export(state, cfg.export)
    perceptual = Perceptual().to(device) if cfg.perceptual_weight else None
    if cfg.eval:
        _, val = data.load(cfg.data, cfg.size)
        vae = load_vae(state).to(device)
        for name in ("real", "recon") if cfg.png else ():
            os.makedirs(f"{cfg.png}/{name}")
        autocast = torch.autocast(device.type, enabled=False)       # float32, as in papers
        figures, _ = evaluate(vae, val, len(val), cfg, device, autocast, perceptual)
        figures = [f"{name} {value:.4f}" for name, value in figures.items()]
        return print(f"{cfg.data}, {len(val):,} images:", *figures)

    # images and both players; the betas' short memory suits a moving target
    micro, steps = share_out(cfg, world)
    train, val = data.load(cfg.data, cfg.size) if cfg.max_steps > 0 else (None, None)
    torch.manual_seed(cfg.seed)
    vae = build(cfg).to(device)
    disc = Discriminator(cfg.size, cfg.disc_width).to(device)
    if cfg.train_only == "decoder":
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    adamw = functools.partial(torch.optim.AdamW, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
    vae_opt = adamw(vae.parameters())
    disc_opt = adamw(disc.parameters())

    # where it starts, or goes on
    start = 0
    scaling = {"scale": None, "shift": 0.0}         # None: measured when the latents are made
    if state is not None:
        vae.load_state_dict(state["vae"])
        if cfg.resume or cfg.train_only or cfg.max_steps == 0:      # the latents stay
            scaling = {name: state[name] for name in scaling}
    if cfg.resume:
        disc.load_state_dict(state["disc"])
        vae_opt.load_state_dict(state["vae_opt"])
        disc_opt.load_state_dict(state["disc_opt"])
        start = state["step"]
    os.makedirs(cfg.out, exist_ok=True)
    figures = (state or {}).get("figures", {})
    config = {name: value for name, value in vars(cfg).items() if name not in CALL}

    def save(step):
        save_checkpoint(path, {
            "vae": vae.state_dict(), "disc": disc.state_dict(), "vae_opt": vae_opt.state_dict(),
            "disc_opt": disc_opt.state_dict(), "step": step, "config": config,
            "figures": figures, **scaling})

    if cfg.max_steps == 0:
        if rank == 0:
            save(start)
        return print(f"{path}: the weights of {cfg.init or path}")

    side = cfg.size // vae.factor
    summed = cfg.kl_weight * 3 * vae.factor ** 2 / cfg.z_channels   # x pixels per latent value
    print(f"{cfg.data}: {len(train):,} training and {len(val):,} validation images of "
          f"{len(train.classes):,} classes, like {', '.join(train.classes[:5])}")
    print(f"{path}: {sum(p.numel() for p in vae.parameters()):,} parameters on {device}, latents "
          f"{cfg.z_channels} x {side} x {side}; {world} x {steps} x {micro} images an update; "
          f"KL weight {cfg.kl_weight:g} by element, {summed:.3g} for sums over an image")
    rows = data.micro_batches(len(train), micro, start * steps, rank, world, cfg.seed)
    batches = data.prefetch(train.__getitem__, rows, cfg.workers)
    if cfg.grad_checkpoint:
        recompute(vae, ResBlock)
    if compiled:                                    # in place; on GPUs channels-last (14%)
        vae.compile(dynamic=False, options={"force_layout_optimization": device.type == "cuda"})
        disc.compile(dynamic=False)

    def validate(step):
        figures, picture = evaluate(vae, val, 1000, cfg, device, autocast, perceptual)
        picture.save(f"{cfg.out}/recon_{step:06d}.png")
        return figures

    if rank == 0:
        figures = validate(start)
        log = Log(f"{cfg.out}/vae.csv", start, cfg.max_steps)
    caught = catch_signals()
    clock = time.time()
    logged = start
    for step in range(start, cfg.max_steps):
        # learning rates and warmups
        progress = step / cfg.max_steps
        vae_opt.param_groups[0]["lr"] = cfg.lr * cosine(progress)
        disc_opt.param_groups[0]["lr"] = cfg.disc_lr * cosine(progress)
        kl_warmup = min(1.0, progress / cfg.kl_warmup) if cfg.kl_warmup else 1.0
        adv_warmup = min(1.0, progress / cfg.adv_warmup) if cfg.adv_warmup else 1.0
        weights = {"pixel": 1.0, "kl": cfg.kl_weight * kl_warmup, "vq": 1.0, "fm": cfg.fm_weight,
                   "adv": cfg.adv_weight * adv_warmup, "perceptual": cfg.perceptual_weight}

        # all noise of an update at once, by (seed, step), of which each process takes its rows: the
        # same update for any number of processes and micro-steps, and after resuming
        source = generator(device, cfg.seed, step)
        shape = (steps, world, micro, cfg.z_channels, side, side)
        noise = torch.randn(shape, device=device, generator=source)[:, rank]
        mirrored = torch.rand(shape[:3], device=device, generator=source)[:, rank] < 0.5

        sums = 0.0
        taken = 0                                   # how often each code is
        for k in range(steps):
            pixels, _ = next(batches)
            x = data.to_float(pixels.to(device))
            if train.mirror:
                x = torch.where(mirrored[k, :, None, None, None], x.flip(3), x)

            # the discriminator's turn; one forward pass of the VAE serves both players
            with autocast:
                recon, mean, logvar = vae(x, noise[k])
                logits, features = disc(torch.cat([x, recon.detach()]))
            real, fake = logits.chunk(2)
            disc_loss = discriminator_loss(real, fake, cfg.gan_loss)
            (disc_loss / steps).backward()

            # the VAE's turn: the discriminator is frozen
            disc.requires_grad_(False)
            with autocast:
                logits, fakes = disc(recon)
            reals = [feature[:len(x)].detach() for feature in features]
            losses = {"pixel": pixel_loss(recon, x, cfg.l1_weight),
                      "adv": generator_loss(logits, cfg.gan_loss),
                      "fm": feature_loss(fakes, reals)}
            if cfg.bottleneck == "kl":
                losses["kl"] = kl_loss(mean, logvar)
            elif cfg.bottleneck == "vq":
                losses["vq"] = vae.codes.loss(mean)
                taken = taken + vae.codes.indices(mean).flatten().bincount(minlength=cfg.codes)
            if perceptual is not None:
                with autocast:
                    losses["perceptual"] = perceptual(recon, x)
            loss = sum(weights[name] * losses[name] for name in losses)
            (loss / steps).backward()
            disc.requires_grad_(True)

            scalars = {**losses, "loss": loss, "disc": disc_loss, "real": real.mean(),
                       "fake": fake.mean()}
            sums = sums + torch.stack(list(scalars.values())).detach() / (steps * world)

        # update
        norms = {}
        for name, model, opt in (("vae", vae, vae_opt), ("disc", disc, disc_opt)):
            average_gradients(model)
            norms[name] = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            opt.step()
            opt.zero_grad()
        if cfg.bottleneck == "vq":
            vae.codes.restart(total(taken), source)

        # what is due: all processes must agree on it
        done = step + 1
        stop = total(torch.tensor(len(caught))) > 0
        log_due = done % cfg.log_every == 0 or done == cfg.max_steps
        save_due = done % cfg.eval_every == 0 or done == cfg.max_steps
        if (log_due or save_due or stop) and not sum(norms.values()).isfinite():
            sys.exit("error: loss not finite: --resume or restart with a lower --lr or --no-bf16")

        # validation, picture, checkpoint
        if rank == 0 and (save_due or stop):
            began = time.time()
            if save_due:
                figures = validate(done)
            save(done)
            clock += time.time() - began            # does not count in images/s

        # log
        if log_due:
            means = dict(zip(scalars, total(sums).tolist()))                # named as in the last
            shares = {f"{name}_share": weights[name] * means[name] / means["loss"]
                      for name in losses}
            row = {"step": done, **means, **shares, "lr": cfg.lr * cosine(progress), **figures}
            row |= {f"{name}_norm": value.item() for name, value in norms.items()}
            row["seconds"] = (time.time() - clock) / (done - logged)
            row["images/s"] = cfg.batch_size / row["seconds"]
            clock = time.time()
            logged = done
            if rank == 0:
                log.write(row, ["pixel", "kl", "vq", "adv", "fm", "disc", "val_psnr", "images/s"])
        if stop:
            wait()                                  # the first process may be saving
            sys.exit(f"stopped, and saved update {done:,} to {path}: go on with --resume")

    print(f"{path}:", *(f"{name} {value:.4g}" for name, value in figures.items()))
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
