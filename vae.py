"""Stage one: a KL-VAE trained against a PatchGAN (Rombach et al. 2022, arXiv:2112.10752).

    python vae.py                           # shapes
    python vae.py --data imagenet           # data/imagenet/train/<wnid>/*.JPEG
    torchrun --nproc-per-node 8 vae.py --data imagenet

Writes out/<data>/: vae.pt, vae.csv (every loss and its share) and recon_*.png (images above, reconstructions
below). On two CPU cores the default takes 152 seconds and ends at a val_psnr of 34.5 dB.
"""
import argparse, collections, contextlib, functools, json, math, os, pathlib, re, sys, time, timeit

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VGG16_Weights, vgg16

import data

# ------------------------------------------------------------------------------------------------------------
# run
DATA = "shapes"             # shapes, cifar10, imagenet, or a folder of images
DATA_DIR = ""               # where a named dataset lies; empty: data/<name>
PRESET = ""                 # one of shapes, cifar10, cifar10-small, imagenet; the row below, empty: by --data
SIZE = 32                   # from 1; pixels a side
OUT = ""                    # the run's folder; empty: out/<data>
MAX_STEPS = 1800            # from 1; updates of the VAE, and of the discriminator
BATCH_SIZE = 8              # from 1; images per micro-step, over all processes
ACCUM = 1                   # from 1; micro-steps per update
EVAL_EVERY = 900            # from 1; updates between validations, pictures and checkpoints
EVAL_IMAGES = 1000          # from 1; validation images used, the same ones each time
LOG_EVERY = 10              # from 1; updates between rows of the log
SEED = 0                    # from 0; of the weights, the order of the images and all noise
RESUME = False              # go on from the run's checkpoint
OVERWRITE = False           # start again on top of a run
INIT = ""                   # a vae.pt or published weights to start from, which also decide the shape
TRAIN_ONLY = ""             # one of decoder; leave the rest of the VAE, and so all latents, as they are
# model
WIDTHS = (32, 64, 64)       # from 1; channels at each resolution, one halving between neighbours
BLOCKS = 1                  # from 1; residual blocks at each resolution (the decoder has one more)
Z_CHANNELS = 6              # from 1; of the latent
ATTENTION = False           # self-attention at the lowest resolution
BOTTLENECK = "kl"           # one of kl, vq, fsq; noise and a KL loss, or codes: see the section below the VAE
CODES = 512                 # from 2; vq: codes in the book
CODE_WIDTH = 2              # from 1; vq: channels of a code, so that a place has z_channels / this of them
LEVELS = 16                 # from 2; fsq: values that a channel can take
DISC_WIDTH = 32             # from 4; channels of the discriminator's first layer
# loss
L1_WEIGHT = 0.0             # from 0 to 1; pixel loss = (1 - this) * mse + this * l1
KL_WEIGHT = 2e-3            # from 0; on the KL per latent element, after the warmup
KL_WARMUP = 0.2             # from 0 to 1; share of the updates over which the KL's weight grows from 0
ADV_WEIGHT = 0.02           # from 0; on the adversarial loss, after the warmup
ADV_WARMUP = 0.4            # from 0 to 1; share of the updates over which the adversarial weight grows from 0
FM_WEIGHT = 0.1             # from 0; on feature matching
GAN_LOSS = "bce"            # one of bce, hinge
PERCEPTUAL_WEIGHT = 0.0     # from 0; on VGG16 features, whose 528 MB torchvision downloads
# optimiser
LR = 1e-3                   # from 0; VAE: AdamW, cosine decay
LR_MIN = 1e-7               # from 0; where the cosine ends
DISC_LR = 1e-3              # from 0; discriminator
DISC_LR_MIN = 1e-7          # from 0; where its cosine ends
CLIP = 1.0                  # from 1e-6; gradient norm of either player
# system
DEVICE = ""                 # cuda, cpu, mps; empty: cuda where there is one
BF16 = None                 # bfloat16 autocast; unset: where it is faster
COMPILE = False             # torch.compile; unset, as in the other presets: on a GPU
GRAD_CHECKPOINT = False     # recompute residual blocks in the backward pass: a fifth of the memory, slower
WORKERS = 8                 # from 1; threads that read images
BENCH = False               # time twenty updates on random images and stop; writes nothing
# instead of training
EVAL = False                # PSNR, SSIM, the latents' figures over all of val, perceptual if it has a weight
PNG = ""                    # the same, and a folder for the images (real/) and reconstructions (recon/)
EXPORT = ""                 # folder for the weights and a config.json, as diffusers reads them
# ------------------------------------------------------------------------------------------------------------
PRESETS = {"shapes": {},
    "cifar10": dict(SIZE=64, MAX_STEPS=117_000, BATCH_SIZE=128, EVAL_EVERY=2000, WIDTHS=(64, 128, 256),
                    BLOCKS=2, Z_CHANNELS=4, ATTENTION=True, DISC_WIDTH=64, L1_WEIGHT=0.8, KL_WEIGHT=2e-2,
                    LR=8e-4, DISC_LR=2.4e-3, DISC_LR_MIN=1e-6, COMPILE=None),
    "cifar10-small": dict(MAX_STEPS=4800, BATCH_SIZE=16, EVAL_EVERY=1600, Z_CHANNELS=16, L1_WEIGHT=0.8,
                          KL_WEIGHT=5e-3, LR=8e-4),
    "imagenet": dict(SIZE=256, MAX_STEPS=130_110, ACCUM=16, EVAL_EVERY=1000, WIDTHS=(128, 256, 512, 512),
                     BLOCKS=2, Z_CHANNELS=4, ATTENTION=True, DISC_WIDTH=64, L1_WEIGHT=0.8, KL_WEIGHT=1e-2,
                     LR=1e-4, DISC_LR=3e-4, COMPILE=None),
}
BETAS = (0.5, 0.9)          # of both AdamWs: a short memory suits a moving target
SPIKE, RESTART = 1000.0, 100        # a gradient norm to skip; updates until an idle code starts again
AMX = torch.cpu._is_amx_tile_supported()        # a CPU with matrix units

# ---- layers, named as in diffusers' AutoencoderKL: its state dicts are ours --------------------------------
def named(**layers):
    return nn.Sequential(collections.OrderedDict(layers))
def norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)
def groups_for(*widths):
    """One number of norm groups for a whole model: 32, fewer where one would have less than 4 channels."""
    return math.gcd(*widths, min(32, min(widths) // 4 or 1))

class ResBlock(nn.Module):
    """Pre-activation residual block: [b, c_in, h, w] -> [b, c_out, h, w]."""
    def __init__(self, c_in, c_out, groups, kernel=3):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm2, self.conv2 = norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)      # starts as its shortcut
    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

def attend(q, k, v, mask=None):
    """Softmax attention of q [..., n, d] over k, v [..., m, d], where `mask` [..., m] is true."""
    # on CPUs two products take a third to two thirds of the fused kernel's time, but with AMX, forward only
    if q.device.type == "cpu" and (torch.is_grad_enabled() or not AMX):
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask)

class Attention(nn.Module):
    """Single-head self-attention over the pixels: [b, c, h, w] -> the same."""
    def __init__(self, c, groups):
        super().__init__()
        self.group_norm, self.to_out = norm(c, groups), nn.Sequential(nn.Linear(c, c))
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)                               # [b, hw, c]
        h = self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.transpose(1, 2).reshape(x.shape)       # copied: else all that follows is channels-last

def downsample(c):
    """Halve the resolution: pad right and below, 3x3 convolution of stride 2."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))

class Upsample(nn.Conv2d):
    """Double the resolution: nearest neighbour, then a 3x3 convolution, in one transposed convolution without
    the large image: of nine taps some meet the same small pixel; summed, they are a 4x4 kernel."""
    def __init__(self, c):
        super().__init__(c, c, 3, padding=1)
        taps = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
        self.register_buffer("fold", torch.kron(taps, taps), persistent=False)          # [3 * 3, 4 * 4]
    def forward(self, x):
        kernel = (self.weight.flatten(2) @ self.fold).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)

def recompute(model, *kinds):
    """Have modules of these kinds keep their inputs alone and compute the rest again in the backward pass."""
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False,
                                               preserve_rng_state=False)

# ---- the autoencoder ---------------------------------------------------------------------------------------
def levels(widths, blocks, groups, resample, name):
    """Residual blocks at each width; all but the last end with a change of resolution, under its `name`."""
    stack = []
    for c_in, c in zip((widths[0], *widths), widths):
        resnets = [ResBlock(c if k else c_in, c, groups) for k in range(blocks)]
        change = {name: nn.Sequential(resample(c))} if len(stack) < len(widths) - 1 else {}
        stack.append(named(resnets=nn.Sequential(*resnets), **change))
    return nn.Sequential(*stack)

class Middle(nn.Module):
    """Two residual blocks and, between them, perhaps attention."""
    def __init__(self, c, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, c, groups), ResBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)] if attention else [nn.Identity()])
    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))

class VAE(nn.Module):
    """KL autoencoder of the published KL-f8 shape: [b, 3, s, s] in [-1, 1] <-> [b, z_channels, s/f, s/f].
    `codes`, a VQ or FSQ, takes the place of noise and KL. Layers start by keeping variance, residual blocks
    as their shortcuts; the two halves do not end at zero: the decoder would learn to ignore the latent."""
    def __init__(self, widths, blocks=2, z_channels=4, attention=True, groups=0, quant=True, codes=None):
        super().__init__()
        self.factor, self.z_channels, self.codes = 2 ** (len(widths) - 1), z_channels, codes
        first, last, groups = widths[0], widths[-1], groups or groups_for(*widths)
        upsample = lambda c: named(conv=Upsample(c))
        self.encoder = named(conv_in=nn.Conv2d(3, first, 3, padding=1),
                             down_blocks=levels(widths, blocks, groups, downsample, "downsamplers"),
                             mid_block=Middle(last, groups, attention), conv_norm_out=norm(last, groups),
                             conv_act=nn.SiLU(), conv_out=nn.Conv2d(last, 2 * z_channels, 3, padding=1))
        self.decoder = named(conv_in=nn.Conv2d(z_channels, last, 3, padding=1),
                             mid_block=Middle(last, groups, attention),
                             up_blocks=levels(widths[::-1], blocks + 1, groups, upsample, "upsamplers"),
                             conv_norm_out=norm(first, groups), conv_act=nn.SiLU(),
                             conv_out=nn.Conv2d(first, 3, 3, padding=1))
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1) if quant else nn.Identity()
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.endswith("conv2"):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)  # PyTorch's keeps a third
        moments = self.quant_conv if quant else self.encoder.conv_out
        nn.init.constant_(moments.bias.data[z_channels:], -4)           # log-variance: little noise at first
    def through(self, half, x):
        # faster on CPUs, but for GroupNorm's backward pass and small groups
        if self.encoder.conv_in.out_channels >= 128 and x.is_cpu and not torch.is_grad_enabled():
            x = x.contiguous(memory_format=torch.channels_last)
        return half(x)
    def encode(self, x):
        """Images [b, 3, s, s] -> mean and log-variance of q(z|x), float32 [b, z_channels, s/f, s/f] each."""
        mean, logvar = self.quant_conv(self.through(self.encoder, x)).float().chunk(2, dim=1)
        if self.codes:
            return mean.tanh() if isinstance(self.codes, FSQ) else mean, torch.full_like(mean, -20)
        return mean, logvar.clamp(-20, 20)
    def decode(self, z):
        """Latents [b, z_channels, h, w] -> images, float32 [b, 3, fh, fw], in [-1, 1] but for overshoot."""
        if self.codes:
            z = z + (self.codes(z) - z).detach()        # the codes, but the gradient goes straight through
        return self.through(self.decoder, self.post_quant_conv(z)).float()
    def forward(self, x, noise):
        """Images, normal noise or 0 -> reconstruction, mean, log-variance; with `codes` its values too."""
        mean, logvar = self.encode(x)
        recon = self.decode(mean + (logvar / 2).exp() * noise)
        return (recon, mean, logvar, self.codes(mean)) if self.codes else (recon, mean, logvar)

# ---- codebooks: --bottleneck vq, fsq. The denoiser learns what `encode` gives; `decode` takes the codes ----
class VQ(nn.Module):
    """Vector quantisation (van den Oord et al. 2017): [b, c, h, w] -> nearest codes, c / width a place."""
    def __init__(self, codes, width):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, width))
        self.register_buffer("idle", torch.zeros(codes))                        # updates since it was taken
        self.register_buffer("counts", torch.zeros(1, codes, dtype=torch.long), persistent=False)
    def forward(self, z):
        places = z.unflatten(1, (-1, self.codebook.shape[1])).movedim(2, -1)    # [b, c / width, h, w, width]
        k = torch.cdist(places.detach().flatten(0, -2), self.codebook.detach()).argmin(1)
        self.counts.scatter_add_(1, k[None], torch.ones_like(k[None]))
        return self.codebook[k].view(places.shape).movedim(-1, 2).reshape(z.shape)
    @torch.no_grad()
    def restart(self, source):
        """After an update: a code that none took for RESTART updates becomes a used one, and noise."""
        taken = data.total(self.counts)[0]
        self.idle.add_(1).mul_(taken == 0)
        like = torch.multinomial(taken + 1e-9, len(taken), replacement=True, generator=source)
        noise = torch.randn(self.codebook.shape, device=like.device, generator=source)
        old, new = self.codebook, self.codebook[like] + 0.01 * noise
        old.copy_(torch.where((self.idle >= RESTART)[:, None], new, old))
        self.idle.mul_(self.idle < RESTART), self.counts.zero_()

class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2024): each channel -> the nearest level on [-1, 1]."""
    def __init__(self, channels, levels):
        super().__init__()
        self.levels = levels
        self.register_buffer("counts", torch.zeros(channels, levels, dtype=torch.long), persistent=False)
    def forward(self, z):
        k = ((z.clamp(-1, 1) + 1) / 2 * (self.levels - 1)).round()
        row = k.transpose(0, 1).flatten(1).long()                               # [c, b * h * w]
        self.counts.scatter_add_(1, row, torch.ones_like(row))
        return k * 2 / (self.levels - 1) - 1

def vq_loss(mean, q):
    """The codebook moves to the latents, and a quarter as much the latents to the codebook."""
    return F.mse_loss(q, mean.detach()) + 0.25 * F.mse_loss(mean, q.detach())
def usage(counts):
    """Counts [channels, n] -> how many of the n are used, and their perplexity, on average."""
    p = counts / counts.sum(1, keepdim=True)
    return (counts > 0).sum(1).float().mean().item(), torch.special.entr(p).sum(1).exp().mean().item()

# ---- the discriminator -------------------------------------------------------------------------------------
class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images [b, 3, s, s] -> a map of logits and the features of every layer.
    A logit sees less than the image. GroupNorm, because batch statistics break under accumulation."""
    def __init__(self, size, width=64):
        super().__init__()
        depth = max([n for n in (2, 3, 4) if 2 ** n * 5 - 2 < size], default=1)         # 18, 38, 78 pixels
        self.layers, c_in = nn.ModuleList(), 3
        for c in [width * 2 ** i for i in range(depth)]:
            normed = norm(c, math.gcd(c, min(32, c // 4))) if self.layers else nn.Identity()
            conv, c_in = nn.Conv2d(c_in, c, 4, stride=2, padding=1), c
            self.layers.append(nn.Sequential(conv, normed, nn.LeakyReLU(0.2)))
        self.logits = nn.Conv2d(c, 1, 3, padding=1)
    def forward(self, x):
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.logits(x).float(), features

# ---- losses, all in float32 --------------------------------------------------------------------------------
def pixel_loss(recon, x, l1_weight):
    return (1 - l1_weight) * F.mse_loss(recon, x) + l1_weight * F.l1_loss(recon, x)
def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, mean over elements (Kingma and Welling 2014, app. B)."""
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
def generator_loss(fake, kind):
    """The VAE's adversarial loss on the logits of its reconstructions."""
    return F.softplus(-fake).mean() if kind == "bce" else -fake.mean()
def discriminator_loss(real, fake, kind):
    """Binary cross-entropy (ln 2 = 0.69 when confused) or hinge (1 when confused), mean of real and fake."""
    if kind == "bce":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
def feature_loss(fake, real):
    """Feature matching (Wang et al. 2018): L1 between two lists of features, mean over layers."""
    return sum(F.l1_loss(f.float(), r.float()) for f, r in zip(fake, real)) / len(fake)

class Perceptual(nn.Module):
    """Distance of normalised VGG16 features at five depths: LPIPS (Zhang et al. 2018), no learned weights."""
    def __init__(self):
        super().__init__()
        try:
            layers = vgg16(weights=VGG16_Weights.DEFAULT).features.eval().requires_grad_(False)
        except OSError as error:
            raise SystemExit(f"error: --perceptual-weight takes VGG16, which cannot be downloaded: {error}")
        self.stages = nn.ModuleList([layers[:4], layers[4:9], layers[9:16], layers[16:23], layers[23:30]])
        mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
        self.register_buffer("mean", mean), self.register_buffer("std", std)        # ImageNet's, in [-1, 1]
    def forward(self, recon, x):
        a, b, loss = (recon - self.mean) / self.std, (x - self.mean) / self.std, 0.0
        for stage in self.stages:
            a, b = stage(a), stage(b)
            loss += (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
        return loss

def micro_step(vae, disc, perceptual, x, noise, weights, cfg, steps, autocast):
    """Add both players' gradients on images x [b, 3, s, s], 1/steps of each -> losses' names and values [n].
    The discriminator sees a detached reconstruction, and is frozen in the VAE's pass: no loss moves both."""
    with autocast:
        recon, mean, logvar, *codes = vae(x, noise)
        logits, features = disc(torch.cat([x, recon.detach()]))
        real, fake = logits.chunk(2)
        disc_loss = discriminator_loss(real, fake, cfg.gan_loss)
    (disc_loss / steps).backward()
    disc.requires_grad_(False)
    with autocast:
        logits, fakes = disc(recon)
        terms = {"pixel": pixel_loss(recon, x, cfg.l1_weight), "adv": generator_loss(logits, cfg.gan_loss),
                 "fm": feature_loss(fakes, [f[:len(x)].detach() for f in features])}
        if cfg.bottleneck != "fsq":
            terms[cfg.bottleneck] = vq_loss(mean, *codes) if codes else kl_loss(mean, logvar)
        if perceptual:
            terms["perceptual"] = perceptual(recon, x)
        loss = sum(weights[name] * value for name, value in terms.items())
    (loss / steps).backward()
    disc.requires_grad_(True)
    values = {**terms, "loss": loss, "disc": disc_loss, "real": real.mean(), "fake": fake.mean()}
    return list(values), torch.stack(list(values.values())).detach()

def update(players, clip):
    """Average the gradients over the processes, clip and step, for pairs of module and optimiser. If a norm
    is not finite, or a spike, all skip, without waiting for the GPU -> norms [n], and 1 if skipped, else 0"""
    norms = []
    for module, _ in players:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        if data.WORLD > 1:                                              # in one message
            flat = data.total(torch.cat([grad.flatten() for grad in grads])) / data.WORLD
            nn.utils.vector_to_parameters(flat, grads)
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip))
    norms = torch.stack(norms)
    unsound = (~(norms < SPIKE).all()).float()                          # a NaN is not below
    for _, opt in players:
        if norms.device.type != "mps":
            opt.found_inf = unsound                                     # what a fused AdamW looks at
        if norms.device.type != "mps" or not unsound:
            opt.step()
        opt.zero_grad()
    return norms, unsound

# ---- the log, and the bench --------------------------------------------------------------------------------
class Log:
    """Rows of a CSV file and lines on the terminal, from the first process. A resumed run keeps the rows up
    to its `step`. The open file keeps a second run out of the folder."""
    def __init__(self, path, step, total):
        self.total, self.values, self.clock = total, {"step": step}, time.perf_counter()
        self.columns, self.seconds, self.file, self.skipped, self.streak = [], [], None, 0, 0
        if path and data.RANK == 0:
            self.file = open(path, "ab+")
            data.lock(self.file), self.file.seek(0)
            head, *rows = (self.file.readlines() if step else []) or [b""]
            kept = [row for row in rows if re.match(rb"\d+,.*\n", row) and int(row.split(b",")[0]) <= step]
            self.columns = head.decode().split()[0].split(",") if head else []
            self.file.truncate(len(head) + sum(map(len, kept)))
    @contextlib.contextmanager
    def pause(self):
        """What is done meanwhile counts neither in images/s nor in the time left."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began
    def row(self, step, batch, show, **values):
        """Log `values` after `step` updates of `batch` images; the terminal shows the columns in `show`."""
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / (step - self.values["step"]), now
        self.seconds.append(seconds)
        self.values |= {"step": step, "images/s": batch / seconds, **values, "skipped": float(self.skipped),
                        "streak": float(self.streak)}
        self.skipped = 0
        if self.streak >= 10:
            raise SystemExit("error: ten updates not finite, or huge: --resume, lower --lr or --no-bf16")
        if not self.file:
            return
        head = "" if self.columns else ",".join(self.values) + "\n"
        self.columns = self.columns or list(self.values)
        line = ",".join(f"{self.values.get(name, math.nan):.7g}" for name in self.columns) + "\n"
        self.file.write((head + line).encode()), self.file.flush()
        shown = [f"{name} {self.values[name]:.4g}" for name in (*show, "skipped") if self.values.get(name)]
        left = f"{(self.total - step) * seconds / 60:.1f} min left  {batch / seconds:.0f} images/s"
        data.say("  ".join([f"step {step:,}/{self.total:,}", left, *shown]), last=step == self.total)

def report(seconds, batch, one_image, cfg, device):
    """What --bench prints: the median update, FLOPs by one_image(cfg), next to a large product's speed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        one_image(cfg)
    seconds, n = np.median(seconds[3:]), 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cfg.bf16 else torch.float32)
    product = 2 * n ** 3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=5))
    reached = counter.get_total_flops() * batch / seconds / data.WORLD
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    if not memory:
        import resource                                 # not on Windows; macOS counts bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
    print(f"update: {seconds:.4g} s for {batch} images, {batch / seconds:.4g} images/s, {reached / 1e12:.3g} "
          f"TFLOP/s = {reached / product:.0%} of a large product's {product / 1e12:.3g}, peak memory "
          f"{memory / 1e9:.2f} GB")

# ---- weights, in and out -----------------------------------------------------------------------------------
SHAPE = "widths blocks z_channels attention groups quant bottleneck codes code_width levels".split()
RENAMED = [                 # from the original code's names (Rombach et al. 2022), and diffusers' older ones
    (r"^first_stage_model\.", ""), (r"\.down\.(\d)", r".down_blocks.\1"), (r"\.norm_out", ".conv_norm_out"),
    (r"(blocks\.\d)\.block", r"\1.resnets"), (r"\.(up|down)sample\.", r".\1samplers.0."),
    (r"\.nin_shortcut", ".conv_shortcut"), (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"), (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"(attentions\.0)\.norm", r"\1.group_norm"), (r"(attentions\.0)\.proj_(out|attn)", r"\1.to_out.0"),
    (r"(attentions\.0)\.([qkv])(uery|ey|alue)?\.", r"\1.to_\2.")]

def build(config):
    """The VAE of these settings; `groups` and `quant` are there where published weights decide."""
    codes = {"vq": lambda: VQ(config.codes, config.code_width),
             "fsq": lambda: FSQ(config.z_channels, config.levels)}.get(config.bottleneck, lambda: None)()
    return VAE(config.widths, config.blocks, config.z_channels, config.attention,
               vars(config).get("groups", 0), vars(config).get("quant", True), codes)

def load_vae(state, device="cpu"):
    """The VAE of a vae.pt or of a diffusion.pt, which carries it along, frozen."""
    vae = build(argparse.Namespace(**state.get("vae_config", state["config"])))
    data.restore({"vae": vae}, state)
    return vae.to(device).eval().requires_grad_(False)

def read_weights(path):
    """The tensors of a published file by their names; no code in it is run."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):    # DiT's own checkpoints hold one
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = state.get("state_dict", state.get("ema", state))
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:
        raise SystemExit(f"error: cannot read {path}: {str(error).splitlines()[0]:.90} (for .safetensors pip "
                         f"install safetensors; of a pickle that holds more, save the state_dict alone)")

def open_vae(path):
    """A vae.pt, or published weights of a KL autoencoder -> what a vae.pt says. The shape is read from the
    tensors; norm groups, scale and shift from a config.json beside the file, if there is one."""
    weights, state = read_weights(path), {}
    if not weights:                                                     # ours: its tensors lie deeper
        return data.load_checkpoint(path, "vae.py")
    top = max([int(level) for level in re.findall(r"\.up\.(\d)\.", " ".join(weights))], default=0)
    for name, tensor in sorted(weights.items()):
        name = re.sub(r"\.up\.(\d)", lambda level: f".up_blocks.{top - int(level[1])}", name)    # was upwards
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", name):
            linear = ".attentions." in name                             # in the original, 1x1 convolutions
            state[name] = tensor.reshape(tensor.shape[:2]) if linear else tensor
    if "decoder.conv_in.weight" not in state:
        raise SystemExit(f"error: {path} holds no KL autoencoder: there is no decoder.conv_in.weight")
    resnets = [name for name in sorted(state) if re.match(r"encoder\.down_blocks.*\.conv1\.bias", name)]
    file = pathlib.Path(path).with_name("config.json")
    try:
        about = dict(json.loads(file.read_text())) if file.exists() else {}
    except (TypeError, ValueError) as error:
        raise SystemExit(f"error: {file} is no configuration of a VAE: {error}")
    config = {"widths": tuple(len(state[name]) for name in resnets if ".resnets.0." in name),
              "blocks": sum(".down_blocks.0." in name for name in resnets),
              "z_channels": state["decoder.conv_in.weight"].shape[1], "quant": "quant_conv.weight" in state,
              "attention": "decoder.mid_block.attentions.0.to_q.weight" in state, "bottleneck": "kl",
              "groups": about.get("norm_num_groups", 32), "scale": about.get("scaling_factor"),
              "shift": about.get("shift_factor") or 0.0}
    return {"config": config, "step": 0, "vae": state}

def export(cfg, weights, run):
    """Write cfg.export, as diffusers' AutoencoderKL.from_pretrained reads it; the scale is the log's last."""
    if cfg.bottleneck != "kl":
        raise SystemExit(f"error: diffusers' layout has no place for a bottleneck of {cfg.bottleneck}")
    n, std = len(cfg.widths), np.genfromtxt(f"{run}/vae.csv", delimiter=",", names=True)["z_std"].flat[-1]
    about = {"_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
             "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n,
             "block_out_channels": cfg.widths, "layers_per_block": cfg.blocks, "sample_size": cfg.size,
             "latent_channels": cfg.z_channels, "mid_block_add_attention": cfg.attention,
             "norm_num_groups": vars(cfg).get("groups") or groups_for(*cfg.widths), "scaling_factor": 1 / std,
             **dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), "quant_conv.bias" in weights)}
    os.makedirs(cfg.export)
    pathlib.Path(cfg.export, "config.json").write_text(json.dumps(about, indent=2))
    try:
        from safetensors.torch import save_file
        save_file(dict(weights), f"{cfg.export}/diffusion_pytorch_model.safetensors")
    except ImportError:
        torch.save(dict(weights), f"{cfg.export}/diffusion_pytorch_model.bin")
    print(f"{cfg.export}: config.json and weights")

# ---- training ----------------------------------------------------------------------------------------------
def cosine(start, end, progress):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))

def one_image(cfg):
    """Both players' forward and backward passes, for `report`."""
    vae, disc = build(cfg), Discriminator(cfg.size, cfg.disc_width)
    x, weights = torch.empty(1, 3, cfg.size, cfg.size), dict.fromkeys(("pixel", "kl", "adv", "fm"), 1.0)
    micro_step(vae, disc, None, x, torch.zeros(()), weights, cfg, 1, contextlib.nullcontext())

@torch.backends.cudnn.flags(enabled=False)      # whose TF32 is too coarse for differences of means of squares
def ssim(a, b):
    """Structural similarity (Wang et al. 2004), Gaussian window of 11: [n, 3, h, w] in [-1, 1] -> [n]"""
    n = min(11, *a.shape[2:])
    line = torch.exp(-0.5 * ((torch.arange(n, device=a.device) - (n - 1) / 2) / 1.5) ** 2)
    row = (line / line.sum()).expand(3, 1, 1, n)
    local = lambda x: F.conv2d(F.conv2d(x, row, groups=3), row.transpose(2, 3), groups=3)
    a, b, c1, c2 = (a + 1) / 2, (b + 1) / 2, 0.01 ** 2, 0.03 ** 2       # its constants are for [0, 1]
    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a ** 2, local(b * b) - mean_b ** 2
    products = (2 * mean_a * mean_b + c1) * (2 * (local(a * b) - mean_a * mean_b) + c2)
    return (products / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))

@torch.no_grad()
def evaluate(vae, val, cfg, step, device, autocast, perceptual=None):
    """Validation figures of reconstructions from the mean; the first 8 go to recon_<step>.png."""
    rows = data.order(len(val), 0, min(len(val), cfg.eval_images), seed=0)
    mine = rows.split(max(8, cfg.batch_size // data.WORLD))[data.RANK::data.WORLD]
    names = ["val_mse", "val_psnr", "val_ssim", "z_mean", "z_std"]
    names += ["val_perceptual"] * bool(perceptual) + ["val_kl"] * (not vae.codes)
    sums = torch.zeros(len(names), device=device)
    if vae.codes:
        vae.codes.counts.zero_()
    for k, (pixels, _) in enumerate(data.feed(val, mine, device, cfg.workers)):
        x = data.to_float(pixels)
        with autocast:                                                  # uncompiled: another shape
            recon, mean, logvar = vae.forward(x, torch.zeros((), device=device))[:3]
        recon = recon.clamp(-1, 1)
        mse = (recon - x).square().mean((1, 2, 3))
        psnr = 10 * torch.log10(4 / mse)                                # images span 2, hence 2 ** 2
        second = mean.square() + logvar.exp()                           # moment of z, over the noise too
        values = [mse, psnr, ssim(recon, x), mean, second]
        values += [perceptual(recon, x)] if perceptual else []
        values += [] if vae.codes else [kl_loss(mean, logvar)]
        sums += len(x) * torch.stack([value.mean() for value in values])
        drawn = data.to_uint8(recon)
        if k == data.RANK == 0 and cfg.out:
            picture = data.grid(torch.cat([pixels[:8], drawn[:8]]), columns=8)
            data.replace_file(f"{cfg.out}/recon_{step:06d}.png", lambda f: picture.save(f, "png"))
        for row, *pair in zip(mine[k].tolist(), pixels.cpu(), drawn.cpu()) if cfg.png else ():
            for name, image in zip(("real", "recon"), pair):
                data.write_png(f"{cfg.png}/{name}/{row:06d}.png", image)
    figures = dict(zip(names, (data.total(sums) / len(rows)).tolist()))
    figures["z_std"] = math.sqrt(figures["z_std"] - figures["z_mean"] ** 2)
    if vae.codes:
        figures["val_used"], figures["val_perplexity"] = usage(data.total(vae.codes.counts).cpu())
        vae.codes.counts.zero_()
    return figures

def assess(given):
    """--eval, --png, --export: a trained VAE's figures and images, or its weights as diffusers reads them."""
    path = given.get("init") or "out" in given and f"{given['out']}/vae.pt" or data.newest("vae.pt", "vae.py")
    state = open_vae(path)
    cfg = data.settings(globals(), given, given.get("data", DATA), state)
    if cfg.export:
        return export(cfg, state["vae"], os.path.dirname(path))
    cfg.bf16 = given.get("bf16", False)                                 # as published figures are made
    device, autocast = data.start(cfg)
    _, val = data.load(cfg.data, cfg.data_dir, cfg.size, state["config"].get("classes", ()))
    cfg.out, cfg.eval_images = "", len(val)
    [os.makedirs(f"{cfg.png}/{folder}", exist_ok=True) for folder in ("real", "recon") if cfg.png]
    perceptual = Perceptual().to(device) if cfg.perceptual_weight else None
    figures = evaluate(load_vae(state, device), val, cfg, state["step"], device, autocast, perceptual)
    print(f"{path}, {len(val):,} images: " + ", ".join(f"{key} {figures[key]:.4f}" for key in figures))

def main(argv=None):
    given, rank, world = data.flags(globals(), argv), data.RANK, data.WORLD
    if {"eval", "png", "export"} & given.keys():
        return assess(given)
    out = given.setdefault("out", data.folder_of(given.get("data", DATA)))
    state = None if given.get("bench") else data.begin(f"{out}/vae.pt", given, "vae.py")
    init = open_vae(given["init"]) if "init" in given and not state else None
    shape = {"config": {k: v for k, v in init["config"].items() if k in SHAPE}} if init else None
    cfg = data.settings(globals(), given, given.get("data", DATA), state or shape)
    device, autocast = data.start(cfg)
    micro, steps = data.share(cfg, world)
    batch, factor = micro * steps * world, 2 ** (len(cfg.widths) - 1)
    if cfg.size % factor or (cfg.bottleneck == "vq" and cfg.z_channels % cfg.code_width):
        raise SystemExit(f"error: --size must be a multiple of {factor}, and --z-channels of --code-width")

    # images
    if cfg.bench:
        pixels = torch.randint(256, (256, 3, cfg.size, cfg.size), dtype=torch.uint8)
        train, cfg.max_steps, cfg.log_every = data.Images(range(1000), range(256), cfg.size, pixels), 20, 1
    else:
        os.makedirs(out, exist_ok=True)
        train, val = data.load(cfg.data, cfg.data_dir, cfg.size, state and state["config"]["classes"])
        cfg.classes, counts = train.classes, np.bincount(train.labels)
        print(f"{cfg.data}: {len(train):,} training and {len(val):,} validation images, {counts.min():,} to "
              f"{counts.max():,} in each of {len(counts):,} classes, like {', '.join(train.classes[:10])}")

    # both players
    torch.manual_seed(cfg.seed)
    vae, disc = build(cfg).to(device), Discriminator(cfg.size, cfg.disc_width).to(device)
    perceptual = Perceptual().to(device) if cfg.perceptual_weight else None
    vae_opt = torch.optim.AdamW(vae.parameters(), cfg.lr, BETAS, weight_decay=0.0, fused=True)
    disc_opt = torch.optim.AdamW(disc.parameters(), cfg.disc_lr, BETAS, weight_decay=0.0, fused=True)
    trained = {"vae": vae, "disc": disc, "vae_opt": vae_opt, "disc_opt": disc_opt}
    if state or init:
        data.restore(trained if state else {"vae": vae}, state or init)
    if cfg.train_only:
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    start, side = state["step"] if state else 0, cfg.size // factor
    z_shape, summed = (batch, cfg.z_channels, side, side), cfg.kl_weight * 3 * factor ** 2 / cfg.z_channels
    kl = f" of weight {cfg.kl_weight:g} per element ({summed:.3g} of sums)" if cfg.bottleneck == "kl" else ""
    n, m = (sum(p.numel() for p in net.parameters()) for net in (vae, disc))
    print(f"VAE of {n:,} and discriminator of {m:,} parameters, latents {list(z_shape[1:])}, {cfg.bottleneck}"
          f"{kl}; {cfg.max_steps:,} updates of {world} x {steps} x {micro}, {device}{', bf16' * cfg.bf16}")
    if cfg.grad_checkpoint:
        recompute(vae, ResBlock)
    if cfg.compile:
        layout = {"force_layout_optimization": device.type == "cuda"}     # on an H200 123, else 108 images/s
        vae.compile(dynamic=False, options=layout), disc.compile(dynamic=False, options=layout)     # in place

    log = Log("" if cfg.bench else f"{out}/vae.csv", start, cfg.max_steps)
    if not cfg.bench:
        data.catch_signals()
        with log.pause():
            log.values |= evaluate(vae, val, cfg, start, device, autocast, perceptual)      # where it starts
    plan = data.schedule(len(train), micro, steps, start, cfg.max_steps, rank, world, cfg.seed)
    batches = data.feed(train, plan, device, cfg.workers)
    for step in range(start, cfg.max_steps):
        # learning rates and warmups
        progress = step / cfg.max_steps
        vae_opt.param_groups[0]["lr"] = cosine(cfg.lr, cfg.lr_min, progress)
        disc_opt.param_groups[0]["lr"] = cosine(cfg.disc_lr, cfg.disc_lr_min, progress)
        weights = {"pixel": 1.0, "kl": cfg.kl_weight * min(1, progress / max(cfg.kl_warmup, 1e-9)),
                   "adv": cfg.adv_weight * min(1, progress / max(cfg.adv_warmup, 1e-9)),
                   "fm": cfg.fm_weight, "perceptual": cfg.perceptual_weight, "vq": 1.0}

        # all noise of the update at once, by row: the same for any number of processes and micro-steps
        source = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + step)
        flips = torch.rand(batch, 1, 1, 1, device=device, generator=source) < 0.5 * train.flip
        noise = torch.randn(z_shape, device=device, generator=source)

        # micro-steps: one forward of the VAE serves both players
        sums = 0
        for k in range(steps):
            rows = slice((k * world + rank) * micro, (k * world + rank + 1) * micro)
            x = data.to_float(next(batches)[0])
            x = torch.where(flips[rows], x.flip(3), x)
            names, values = micro_step(vae, disc, perceptual, x, noise[rows], weights, cfg, steps, autocast)
            sums = sums + values / steps

        # clip, step
        norms, unsound = update([(vae, vae_opt), (disc, disc_opt)], cfg.clip)
        if cfg.bottleneck == "vq":
            vae.codes.restart(source)
        log.skipped, log.streak = log.skipped + unsound, (log.streak + 1) * unsound

        # checkpoint, validation, picture
        step, stop = step + 1, data.stop_asked()                        # updates done
        due = not cfg.bench and (step % cfg.eval_every == 0 or step == cfg.max_steps)
        with log.pause():
            if due or stop:
                data.save_checkpoint(f"{out}/vae.pt", "vae.py", cfg, step, trained)
            if due:
                log.values |= evaluate(vae, val, cfg, step, device, autocast, perceptual)

        # log
        if step % cfg.log_every == 0 or step == cfg.max_steps:
            terms = dict(zip(names, (data.total(sums) / world).tolist()))
            for name in [name for name in weights if name in terms]:
                terms[f"{name}_share"] = weights[name] * terms[name] / terms["loss"]
            log.row(step, batch, ("pixel", "kl", "vq", "adv", "fm", "disc", "val_psnr"), **terms,
                    vae_norm=norms[0].item(), disc_norm=norms[1].item(), lr=vae_opt.param_groups[0]["lr"])
        if stop:
            data.leave(stop, f"saved at step {step:,}; go on with --resume")
    if cfg.bench:
        return report(log.seconds, batch, one_image, cfg, device)
    print(f"{out}/vae.pt: " + ", ".join(f"{k} {v:.4g}" for k, v in log.values.items() if "val_" in k))

if __name__ == "__main__":
    data.guard(main)
