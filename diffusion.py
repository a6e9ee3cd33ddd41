"""Stage two: a denoiser, by class or caption, on the latents of the frozen VAE of stage one.

    python diffusion.py                                         # on the newest out/*/vae.pt
    python diffusion.py --objective v --model dit --out out/v-dit
    python diffusion.py --condition text --out out/words
    torchrun --nproc-per-node 8 diffusion.py --data imagenet

Encodes every image once (latents_*.npy), then trains. Writes to the run's folder: diffusion.pt, which carries
the VAE along, diffusion.csv and samples_*.png, drawn from the averaged weights. On two CPU cores the default
takes 277 seconds and ends at a loss of 0.5; 1,000 of 1,000 samples are of their class.
"""
import argparse, contextlib, copy, functools, glob, hashlib, io, math, os, pathlib, re, shutil, time, zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights

import data, vae
from vae import (Attention, Log, ResBlock, Upsample, attend, cosine, downsample, groups_for, load_vae, named,
                 norm, open_vae, read_weights, recompute)

# ------------------------------------------------------------------------------------------------------------
# run
DATA = ""                   # dataset; empty: the VAE's
DATA_DIR = ""               # where it lies; empty: where the VAE found it
PRESET = ""                 # one of shapes, cifar10, cifar10-small, imagenet; the row below, empty: the VAE's
SIZE = 0                    # from 0; pixels a side, 0: the VAE's
VAE = ""                    # a vae.pt or published weights; empty: of --out, of out/<data>, else the newest
SCALE = 0.0                 # from 0; of the latents; 0: beside published weights, else 1 / std of all
SHIFT = 0.0                 # from -1e6; taken off the latents before they are scaled
INIT = ""                   # published weights to start from, which also decide the DiT's shape
OUT = ""                    # the run's folder; empty: the VAE's
MAX_STEPS = 3200            # from 1; updates
BATCH_SIZE = 16             # from 1; latents per micro-step, over all processes
ACCUM = 1                   # from 1; micro-steps per update
EVAL_EVERY = 1600           # from 1; updates between pictures and checkpoints
LOG_EVERY = 10              # from 1; updates between rows of the log
SEED = 0                    # from 0; of the weights, the order of the latents and all noise
RESUME = False              # go on from the run's checkpoint
OVERWRITE = False           # start again on top of a run
# model
CONDITION = "class"         # one of class, text; what an image is drawn from: its class, or its caption
MODEL = "unet"              # one of unet, dit
WIDTHS = (128,)             # from 4; unet: channels at each resolution
BLOCKS = 1                  # from 1; unet: residual blocks at each resolution
ATTENTION_AT = 8            # from 0; unet: self-attention where the side is at most this
POINTWISE = False           # unet: 1x1 first convolutions, a third cheaper on CPUs; for CIFAR-10, not shapes
DIT = "XS/1"                # dit: size XS, S, B, L, XL / patch
# loss
OBJECTIVE = "flow"          # one of flow, v, eps, ddpm, sit; the last two are the published DiT's and SiT's
TIMES = "logit-normal"      # one of uniform, logit-normal; density of t in training
TIMES_SHIFT = 0.0           # from 0; odds of t times this: noisy times decide; 0: 2 with words, else 1
LABEL_DROPOUT = 0.1         # from 0 to 1; share of labels replaced by the null class, for guidance
# optimiser
LR = 2.2e-3                 # from 0; AdamW
LR_MIN = 1e-5               # from 0; where the cosine ends; equal to LR: constant
LR_WARMUP = 100             # from 0; updates of linear warmup
CLIP = 1.0                  # from 1e-6; gradient norm
EMA = 0.998                 # from 0 to 1; decay of the averaged weights
# pictures
CFG = 1.2                   # from 0; guidance scale, here and sample.py's default
SAMPLE_STEPS = 25           # from 1; sampler steps, here and sample.py's default
CHURN = 2.0                 # from 0; noise drawn anew in a step, 0: none, 1: ancestral sampling; likewise
SAMPLES = 80                # from 0; images in a picture, of ten classes at most; 0: no pictures
# system
DEVICE = ""                 # cuda, cpu, mps; empty: cuda where there is one
BF16 = None                 # bfloat16 autocast; unset: where it is faster
COMPILE = False             # torch.compile; unset, as in the other presets: on a GPU
GRAD_CHECKPOINT = False     # save memory: recompute the blocks in the backward pass
EMA_ON_CPU = False          # save memory: average on the CPU, every tenth update
WORKERS = 8                 # from 1; threads that read images or latents
BENCH = False               # time twenty updates on random latents and stop; writes nothing
# ------------------------------------------------------------------------------------------------------------
PRESETS = {"shapes": {},
    "cifar10": dict(MAX_STEPS=292_968, BATCH_SIZE=128, EVAL_EVERY=5000, WIDTHS=(128, 256, 256), BLOCKS=2,
                    DIT="S/2", OBJECTIVE="v", TIMES="uniform", LR=2e-4, LR_WARMUP=1000, EMA=0.9999, CFG=5.0,
                    SAMPLE_STEPS=50, CHURN=0.0, COMPILE=None),
    "cifar10-small": dict(MAX_STEPS=36_000, BATCH_SIZE=32, EVAL_EVERY=4000, WIDTHS=(128, 128), POINTWISE=True,
                          LR=1e-3, LR_WARMUP=200, EMA=0.999, CFG=3.0, CHURN=0.0, TIMES_SHIFT=2.0),
    "imagenet": dict(MAX_STEPS=400_000, BATCH_SIZE=64, ACCUM=4, EVAL_EVERY=5000, MODEL="dit",
                     WIDTHS=(192, 384, 384), BLOCKS=2, DIT="B/2", LR=1e-4, LR_MIN=1e-4, LR_WARMUP=0,
                     EMA=0.9999, CFG=5.0, SAMPLE_STEPS=50, CHURN=0.0, SAMPLES=20, COMPILE=None)}
DIT_SIZES = {                # width, depth, heads
    "XS": (192, 6, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
WORDS, VOCABULARY, WORD = 24, 2 ** 13, 128      # of a caption; of all, by their hash; the width of one
WORDS_LR = 3e-4             # at most, of the transformer over words: at 2e-3 it learns little of places
PIXELS = 2 ** 18            # encoded or decoded at once: 4 images of 256x256, a gigabyte or two; on a GPU 32

# ---- the method: path, loss, guidance, sampler -------------------------------------------------------------
def path(objective, t):
    """x_t = a x0 + b e, from data (t=0) to noise (t=1) -> a, b and their derivatives da, db.
    flow, sit: the straight line (Lipman et al. 2023; Liu et al. 2023). v, eps: a quarter circle by its angle
    (Salimans and Ho 2022, app. D); ddpm: the same circle in the thousand steps of Ho et al. (2020). On both,
    a db - da b = 1, so that with the velocity v = da x0 + db e: x0 = db x - b v and e = a v - da x, without
    a division."""
    if objective in ("flow", "sit"):
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    angle = ddpm_angles(t.device)[(1000 * t).round().long()] if objective == "ddpm" else t * (math.pi / 2)
    return angle.cos(), angle.sin(), -angle.sin(), angle.cos()
@functools.cache
def ddpm_angles(device):
    """The angle after 0 ... 1000 steps of betas from 1e-4 to 0.02, by cos(angle)^2 = prod (1 - beta)."""
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.double)).cumprod(0)
    return F.pad(kept.sqrt().arccos(), (1, 0)).float().to(device)
def first_time(objective):
    """Where the path's noisy end lies. At t=1 the noise says nothing about x0, and eps divides by a. At
    0.96 a is 0.063, near where Stable Diffusion's schedule ends; from 0.99 errors grow up to 64 times."""
    return 0.96 if objective == "eps" else 1.0

def velocity(model, objective, x, t, y):
    """The model's estimate of v at x [b, c, h, w], t [b] in [0, 1], classes y [b], float32. SiT's time and
    velocity run from noise to data, its time unscaled; DDPM counts its steps from 0."""
    if objective == "sit":
        return -model(x, (1 - t) / 1000, y).float()
    out = model(x, t - 1e-3 if objective == "ddpm" else t, y).float()
    if objective in ("flow", "v"):
        return out
    a, _, da, _ = path(objective, t.view(-1, 1, 1, 1))
    return (da * x + out) / a

def diffusion_loss(model, objective, x0, e, t, y):
    """Mean squared error of the velocity per image [b], at x_t. x0, e [b, c, h, w]; t, y [b]. For eps this
    is the noise's error over a^2, the "SNR+1" weighting of Salimans and Ho (2022): without it a short run
    learns little of the shape, which the noisy times decide. For ddpm it is the noise's, as published."""
    a, b, da, db = path(objective, t.view(-1, 1, 1, 1))
    v = velocity(model, objective, a * x0 + b * e, t, y)
    weight = a if objective == "ddpm" else 1
    return (weight * (v - (da * x0 + db * e))).square().mean((1, 2, 3))

def guided(model, objective, x, t, y, cfg, null):
    """Classifier-free guidance (Ho and Salimans 2022): v_u + cfg (v_c - v_u), both halves in one batch."""
    if cfg == 1:
        return velocity(model, objective, x, t, y)
    y = torch.cat([y, torch.full_like(y, null)])
    v_c, v_u = velocity(model, objective, x.repeat(2, 1, 1, 1), t.repeat(2), y).chunk(2)
    return v_u + cfg * (v_c - v_u)

@torch.no_grad()
def sample(model, objective, noise, y, null, steps=50, cfg=1.0, sampler="euler", interval=(0, 1), churn=0):
    """Integrate from noise() [b, c, h, w] to data, in float32 -> yields x at first and after every step.
    Holding (x0, e) over a step is Euler on the straight line and DDIM (Song et al. 2021) on the circle; heun
    averages v with that at the step's end. Guidance acts in `interval` (Kynkaanniemi et al. 2024). With churn
    some of e is new in each step, which mends what earlier ones got wrong; 1 is as in Ho et al. (2020)."""
    x, times = noise(), [first_time(objective) * (1 - k / steps) for k in range(steps + 1)]
    yield x
    def v_at(x, t):
        scale = cfg if interval[0] <= t <= interval[1] else 1
        return guided(model, objective, x, torch.full((len(x),), t, device=x.device), y, scale, null)
    for t, s in zip(times, times[1:]):
        (a, b, da, db), (a_s, b_s, da_s, db_s) = (path(objective, torch.tensor(at)) for at in (t, s))
        v = v_at(x, t)
        if sampler == "heun" and s > 0:
            x_s = a_s * (db * x - b * v) + b_s * (a * v - da * x)
            v_s = v_at(x_s, s)
            v = (v + da * (db_s * x_s - b_s * v_s) + db * (a_s * v_s - da_s * x_s)) / 2
        kept = (a * b_s / (a_s * b)).clamp_min(0) ** churn
        e = kept * (a * v - da * x) + (1 - kept ** 2).sqrt() * (noise() if churn else 0)
        x = a_s * (db * x - b * v) + b_s * e
        yield x

def normalise(z, scale, shift=0.0):
    """Latents as the VAE gives them -> unit standard deviation; `denormalise` is its inverse."""
    return (z - shift) * scale
def denormalise(z, scale, shift=0.0):
    return z / scale + shift

# ---- denoisers: (x [b, c, h, w], t [b] in [0, 1], y [b]) -> [b, c, h, w] -----------------------------------
class TimestepEmbedder(nn.Module):
    """Time [b] -> [b, d]: sines and cosines of 1000 t, then two layers."""
    def __init__(self, d):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        frequencies = 1000 * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        self.register_buffer("frequencies", frequencies, persistent=False)
    def forward(self, t):
        angles = t[:, None].float() * self.frequencies      # float32: bf16 cannot tell t=0.996 from 1
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

def embedders(d, num_classes, text):
    """For time, and for class or caption, to be added up. Class `num_classes` is the null class."""
    t_embedder = TimestepEmbedder(d)
    y_embedder = TextEmbedder(d) if text else named(embedding_table=nn.Embedding(num_classes + 1, d))
    table = [] if text else [y_embedder.embedding_table.weight]         # words so small were hardly learned
    for weight in (t_embedder.mlp[0].weight, t_embedder.mlp[2].weight, *table):
        nn.init.normal_(weight, std=0.02)
    return t_embedder, y_embedder

# ---- words: --condition text. y is a caption's ids [b, n] instead of a class [b], the null all zeros -------
COLOURS = "red", "gold", "lime", "green", "cyan", "blue", "purple", "pink"        # 45 degrees of hue apart
PLACES = ("at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right",
          "at the bottom left", "at the bottom", "at the bottom right")

def describe_shape(split, row):
    """The caption of a drawn shape: "a small red star at the top left". One attribute in ten is left out,
    and any that lies near the border between two names."""
    u = np.random.default_rng((split == "val", row)).random(12)         # the first eight as in draw_shapes
    def name(position, names, chance):
        near = abs(position - round(position)) < 0.12 and 0 < round(position) < len(names)
        return "" if near or chance < 0.1 else names[int(position)]
    size, colour = name(2 * u[0], ("small", "large"), u[8]), name(8 * u[4] + 0.5, COLOURS + COLOURS[:1], u[9])
    shape = "shape" if u[10] < 0.1 else list(data.SHAPES)[row % len(data.SHAPES)]
    across, down = (name(3 * u[axis], range(3), u[11]) for axis in (2, 3))
    place = "" if "" in (across, down) else PLACES[3 * down + across]
    return " ".join(filter(None, ("a", size, colour, shape, place)))

def words_of(caption):
    return re.findall(r"\w+", caption.lower())
def tokens(captions):
    """Captions -> ids of their words, places in a table given by a hash, then zeros: int64 [n, WORDS]."""
    ids = [[1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words_of(caption)[:WORDS]]
           for caption in captions]
    return torch.tensor([row + [0] * (WORDS - len(row)) for row in ids])

class Captions:
    """Images with the ids of captions int64 [n, WORDS] instead of classes. A caption is a drawn shape's
    description, or the first line of the .txt beside an image, or the name of its class."""
    def __init__(self, images):
        self.images, self.said = images, False
    def __getitem__(self, rows):
        return self.images[rows][0], tokens([self.caption(row) for row in rows.tolist()])
    def caption(self, row):
        images = self.images
        while row in images.bad:                                # once read, a stand-in brings its own
            row = images.bad[row]
        if images.classes == list(data.SHAPES) and not images.files:
            return describe_shape(images.folder, row)
        name, text = images.classes[images.labels[row]], ""
        file = images.files and pathlib.Path(images.folder, images.files[row]).with_suffix(".txt")
        if not (file and file.exists()):
            return name
        with contextlib.suppress(OSError, UnicodeDecodeError), file.open(encoding="utf-8-sig") as f:
            text = f.readline(10_000).strip()
        if not self.said and not 0 < len(words_of(text)) <= WORDS:
            self.said = True
            print(f"caption {file}, perhaps others: not 1 to {WORDS} words in UTF-8; cut, or the class taken")
        return text or name

class TextEmbedder(nn.Module):
    """A transformer over ids y [b, n] -> [b, d], to be added to the time's; and for cross-attention the words
    [b, 1 + n, WORD] with a mask of those that are there."""
    def __init__(self, d):
        super().__init__()
        self.embedding_table = nn.Embedding(VOCABULARY, WORD)
        self.begin = nn.Parameter(torch.zeros(1, 1, WORD))      # never masked: an empty caption is not NaN
        self.positions = nn.Parameter(0.02 * torch.randn(1 + WORDS, WORD))
        layer = nn.TransformerEncoderLayer(WORD, 4, 4 * WORD, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WORD), enable_nested_tensor=False)
        self.mean = nn.Linear(WORD, d)
    def forward(self, y):
        there = F.pad(y > 0, (1, 0), value=True)
        words = torch.cat([self.begin.expand(len(y), 1, WORD), self.embedding_table(y)], 1) + self.positions
        words = self.layers(words, src_key_padding_mask=~there)
        mean = (words * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return self.mean(mean), (words, there[:, None, None])

class CrossAttention(nn.Module):
    """Places x [b, n, c] look at words [b, m, WORD] (Rombach et al. 2022). Starts as nothing."""
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.norm, self.to_q = heads, nn.LayerNorm(c), nn.Linear(c, c)
        self.to_kv, self.to_out = nn.Linear(WORD, 2 * c), nn.Linear(c, c)
        nn.init.zeros_(self.to_out.weight), nn.init.zeros_(self.to_out.bias)
    def forward(self, x, words, there):
        q = self.to_q(self.norm(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(words).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.to_out(attend(q, k, v, there).transpose(1, 2).flatten(2))

# ---- the UNet ----------------------------------------------------------------------------------------------
class CondBlock(ResBlock):
    """The VAE's residual block, its second norm scaled and shifted by c [b, d] (Dhariwal, Nichol 2021), then
    perhaps self- and cross-attention; `pointwise`: at first 1x1. x [b, c_in, h, w] -> [b, c_out, h, w]."""
    def __init__(self, c_in, c_out, attention, groups, d, text, pointwise):
        super().__init__(c_in, c_out, groups, 1 if pointwise else 3)
        self.condition = nn.Linear(d, 2 * c_out)
        self.attention = Attention(c_out, groups) if attention else nn.Identity()
        self.cross = CrossAttention(c_out, 4) if attention and text else None
    def forward(self, x, c, words):
        scale, shift = self.condition(F.silu(c))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        x = self.attention(self.conv_shortcut(x) + self.conv2(F.silu(h)))
        if self.cross:
            x = self.cross(x.flatten(2).transpose(1, 2), *words).transpose(1, 2).reshape(x.shape)
        return x

class UNet(nn.Module):
    """Residual blocks down and up with skip connections, attention at low resolutions (Ho et al. 2020)."""
    def __init__(self, channels, side, num_classes, widths, blocks, attention_at, text=False,
                 pointwise=False):
        super().__init__()
        if side % 2 ** (len(widths) - 1):
            raise SystemExit(f"error: {side} cannot be halved {len(widths) - 1} times: give fewer --widths")
        c, d, groups, skips = widths[0], 4 * widths[0], groups_for(*widths), [widths[0]]
        self.text, (self.t_embedder, self.y_embedder) = text, embedders(d, num_classes, text)
        block = functools.partial(CondBlock, groups=groups, d=d, text=text, pointwise=pointwise)
        self.first = nn.Conv2d(channels, c, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            if i:
                self.down.append(downsample(c)), skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, width, side >> i <= attention_at)), skips.append(width)
                c = width
        self.middle = nn.ModuleList([block(c, c, at) for at in (True, False)])
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), width, side >> i <= attention_at))
                c = width
            if i:
                self.up.append(Upsample(c))
        self.last = nn.Sequential(norm(c, groups), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))
        nn.init.zeros_(self.last[2].weight), nn.init.zeros_(self.last[2].bias)
    def forward(self, x, t, y):
        c, words = self.y_embedder(y) if self.text else (self.y_embedder(y), None)
        c, x = self.t_embedder(t) + c, self.first(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, c, words) if isinstance(layer, CondBlock) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, c, words)
        for layer in self.up:
            x = layer(x) if isinstance(layer, Upsample) else layer(torch.cat([x, skips.pop()], 1), c, words)
        return self.last(x)

# ---- the DiT -----------------------------------------------------------------------------------------------
def positions(d, side):
    """Fixed sines and cosines on a square grid -> [1, side * side, d]: half of d by column, half by row."""
    angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(d // 4) / (d // 4))
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1)[None]
def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]

class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: tokens x [b, n, d], conditioning c [b, d] -> [b, n, d]."""
    def __init__(self, d, heads, gelu="none", text=False):
        super().__init__()
        self.cross = CrossAttention(d, heads) if text else None
        self.heads, self.attn = heads, nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.mlp = named(fc1=nn.Linear(d, 4 * d), act=nn.GELU(gelu), fc2=nn.Linear(4 * d, d))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
    def attention(self, x):
        qkv = self.attn.qkv(x).unflatten(2, (3, self.heads, -1))                # [b, n, 3, heads, d / heads]
        return self.attn.proj(attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2))
    def forward(self, x, c, words):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        x = self.cross(x, *words) if self.cross else x
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

class DiT(nn.Module):
    """Diffusion transformer (Peebles and Xie 2023, arXiv:2212.09748), with the names of facebookresearch/DiT,
    whose `gelu` is "tanh"."""
    def __init__(self, channels, side, num_classes, size="B/2", gelu="none", text=False):
        super().__init__()
        if size not in [f"{name}/{p}" for name in DIT_SIZES for p in range(1, side + 1) if side % p == 0]:
            raise SystemExit(f"error: --dit {size}: expected {', '.join(DIT_SIZES)} / a divisor of {side}")
        (d, depth, heads), p = DIT_SIZES[size.split("/")[0]], int(size.split("/")[1])
        self.x_embedder = named(proj=nn.Conv2d(channels, d, p, stride=p))
        self.text, (self.t_embedder, self.y_embedder) = text, embedders(d, num_classes, text)
        self.register_buffer("pos_embed", positions(d, side // p))
        self.blocks = nn.ModuleList(DiTBlock(d, heads, gelu, text) for _ in range(depth))
        self.norm_final = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.final_layer = nn.ModuleDict({"adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d)),
                                          "linear": nn.Linear(d, p * p * channels)})
        for module in [*self.blocks.modules(), self.x_embedder.proj]:
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1)), nn.init.zeros_(module.bias)
        for zero in [*(block.adaLN_modulation[1] for block in self.blocks),
                     *(block.cross.to_out for block in self.blocks if text),
                     self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    def forward(self, x, t, y):
        c, words = self.y_embedder(y) if self.text else (self.y_embedder(y), None)
        c, x = self.t_embedder(t) + c, self.x_embedder(x)
        (b, _, h, w), dtype = x.shape, x.dtype                                  # [b, d, h / p, w / p]
        x = x.flatten(2).transpose(1, 2).contiguous()       # else all that follows is strided, and slower
        x = x + self.pos_embed.to(dtype)                                        # [b, n, d], bf16 if autocast
        for block in self.blocks:
            x = block(x, c, words)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        x = self.final_layer.linear(modulate(self.norm_final(x), shift, scale)) # [b, n, p * p * c]
        p = self.x_embedder.proj.stride[0]
        return x.view(b, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * p, w * p)

def build(config):
    shape, text = (config.z_channels, config.side, len(config.classes)), config.condition == "text"
    if config.model == "dit":
        return DiT(*shape, config.dit, "tanh" if config.objective in ("ddpm", "sit") else "none", text)
    return UNet(*shape, config.widths, config.blocks, config.attention_at, text, config.pointwise)

# ---- latents -----------------------------------------------------------------------------------------------
class Latents:
    """A file of records: latents[rows] is float16 [n, 2, c, h, w] and classes int64 [n], every view a row of
    its own. Or ids int64 [n, WORDS] if `text`, without mirror images: words may speak of left and right."""
    def __init__(self, file, labels, text=False):
        try:
            self.records = np.load(file, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise SystemExit(f"error: {file} is truncated or no array ({error}): remove it, to make it again")
        self.labels, self.text, self.views = labels, text, 1 if text else self.records["moments"].shape[1]
    def __len__(self):
        return len(self.records) * self.views
    def __getitem__(self, rows):
        image, view = rows // self.views, (rows % self.views).numpy()
        y = torch.from_numpy(self.records["words"][image.numpy()]).long() if self.text else self.labels[image]
        return torch.from_numpy(self.records["moments"][image.numpy(), view]), y

@torch.no_grad()
def encode(coder, pixels, views, autocast):
    """uint8 images [n, 3, s, s] -> moments of their views, float16 [n, views, 2, c, h, w], in parts."""
    parts = [data.to_float(part) for part in pixels.split(at_once(pixels.device, pixels.shape[-1]))]
    with autocast:
        moments = [torch.stack([torch.stack(coder.encode(x.flip(3) if view else x), 1)
                                for view in range(views)], 1) for x in parts]
    return torch.cat(moments).half()
def at_once(device, size):
    """How many images of that size to encode or decode at once."""
    return max(1, PIXELS * (8 if device.type == "cuda" else 1) // size ** 2)

def measure(moments, device):
    """The scale, 1 / std of z = mean + exp(logvar / 2) noise over all moments [n, views, 2, c, h, w]."""
    sums, rows = torch.zeros(2, dtype=torch.float64), max(1, 2 ** 24 // moments[0].size)
    for first in range(0, len(moments), rows):
        data.say(f"measuring {first:,}/{len(moments):,}")
        mean, logvar = torch.from_numpy(moments[first:first + rows]).to(device).float().unbind(2)
        sums += torch.stack([mean.sum(), (mean.square() + logvar.exp()).sum()]).cpu().double()
    mean, second = (sums / (moments.size / 2)).tolist()
    return 1 / math.sqrt(second - mean ** 2)

def write_latents(coder, train, name, device, autocast, workers):
    """Encode every image and its mirror into one file -> its name: `name` and the scale. Each process makes
    whole blocks, and the first appends them in order: an interrupted run goes on at the file's end."""
    partial, header = f"{name}.npy.part", io.BytesIO()
    side, views = train.size // coder.factor, 1 + train.flip
    kind = np.dtype([("moments", "<f2", (views, 2, coder.z_channels, side, side)),     # mean, log-variance
                     ("words", "<i2", (WORDS,))])
    np.lib.format.write_array_header_1_0(header, {
        "descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (len(train),)})
    block, head, row = min(len(train), 4 * at_once(device, train.size)), len(header.getvalue()), kind.itemsize
    done, file = 0, open(partial, "ab") if data.RANK == 0 else None
    if file:
        data.lock(file)
        if len(train) * row > shutil.disk_usage(os.path.dirname(name)).free:
            raise SystemExit(f"error: {name} takes {len(train) * row / 1e9:.3g} GB, more than is free there")
        done = max(0, file.tell() - head) // (row * block) * block      # whole blocks
        file.truncate(done and head + row * done)
        file.write(b"" if done else header.getvalue())
    firsts, began = range(data.from_first(done), len(train), block * data.WORLD), time.perf_counter()
    plan = (torch.arange(block).add(first + data.RANK * block).clamp(max=len(train) - 1) for first in firsts)
    for first, (pixels, words) in zip(firsts, data.feed(Captions(train), plan, device, workers)):
        moments, words = data.gather(encode(coder, pixels, views, autocast)), data.gather(words)
        if file:
            records = np.empty(min(len(moments), len(train) - first), kind)
            records["moments"], records["words"] = moments[:len(records)], words[:len(records)]
            try:
                file.write(records.tobytes()), file.flush()
            except OSError as error:
                raise SystemExit(f"error: cannot write {partial}: {error.strerror}; what it has is kept")
            done = first + len(records)
            rate = (done - firsts[0]) / (time.perf_counter() - began)
            data.say(f"encoding {done:,}/{len(train):,}  {rate:.1f} images/s", done == len(train))
        if stop := data.stop_asked():
            data.leave(stop, "the latents made so far are kept; run again to go on")
    if file:
        os.fsync(file.fileno()), file.close()
        moments = np.load(partial, mmap_mode="c")["moments"]    # writable, as torch wants it, on no disk
        name = f"{name}_{measure(moments, device):.8g}.npy"
        os.replace(partial, name)
    return data.from_first(name)

def precompute(coder, train, folder, device, autocast, workers):
    """The file of latents in `folder`, made if it is not there -> its name and the scale, its name's end. It
    begins with a hash of VAE, dataset and size: other latents are never found."""
    some = [Captions(train).caption(row) for row in range(0, len(train), -(-len(train) // 100))]
    digest = hashlib.sha256(f"{train.identity()} {train.size} {some}".encode(errors="surrogateescape"))
    for key, tensor in coder.state_dict().items():
        digest.update(key.encode() + tensor.cpu().numpy().tobytes())
    name = f"{folder}/latents_{digest.hexdigest()[:12]}"
    found = glob.glob(glob.escape(name) + "_*.npy")
    name, found = data.from_first((name, found))                        # as the first process sees them
    file = found[0] if found else write_latents(coder, train, name, device, autocast, workers)
    if older := [other for other in glob.glob(f"{glob.escape(folder)}/latents_*") if other != file]:
        print(f"latents of other VAEs or datasets, to be deleted if no run needs them: {', '.join(older)}")
    return file, float(file[len(name) + 1:-len(".npy")])

# ---- training ----------------------------------------------------------------------------------------------
def draw(cfg, step, batch, device):
    """All noise of an update, the same for any number of processes and micro-steps -> of the latents and the
    path [batch, c, h, w]; times, and which labels are dropped [batch]"""
    source = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + step)
    z_noise, e = torch.randn(2, batch, cfg.z_channels, cfg.side, cfg.side, device=device, generator=source)
    offset, dropout = torch.rand(2, batch, device=device, generator=source)
    t = (offset[0] + torch.arange(batch, device=device) / batch) % 1    # evenly spread (Kingma et al. 2021)
    if cfg.times == "logit-normal":                                     # Esser et al. 2024
        t = (math.sqrt(2) * torch.erfinv((2 * t - 1).clamp(-0.999998, 0.999998))).sigmoid()
    odds = cfg.times_shift or (2 if cfg.condition == "text" else 1)     # likewise, eq. 23
    t = odds * t / (1 + (odds - 1) * t)
    if cfg.objective == "ddpm":                                         # steps 1 to 1000
        t = (t * 1000).floor().add(1).clamp(max=1000) / 1000
    return z_noise, e, t * first_time(cfg.objective), dropout < cfg.label_dropout

def update_ema(ema, model, decay, step, every=1):
    """ema = d ema + (1 - d) model, d = min(decay, (1 + step) / (10 + step)) ** every: the start fades."""
    averages = list(ema.parameters())
    weights = [p.detach().to(averages[0].device) for p in model.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)) ** every)

def one_latent(cfg):
    """A forward and backward pass, for `vae.report`."""
    x, t = torch.empty(1, cfg.z_channels, cfg.side, cfg.side), torch.zeros(1)
    y = torch.zeros(1, WORDS) if cfg.condition == "text" else t
    diffusion_loss(build(cfg), cfg.objective, x, x, t, y.long()).mean().backward()

def noise_of(rows, shape, seed, device):
    """-> a function that draws noise [n, *shape]; image i of `rows` has a generator seeded by (seed, i)."""
    generators = [torch.Generator().manual_seed(seed * 10_000_019 + i) for i in rows]
    return lambda: torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)

def decode(coder, z, scale, shift=0.0):
    """Scaled latents [n, c, h, w] -> images uint8 [n, 3, f*h, f*w], decoded in float32, a few at a time."""
    parts = z.split(at_once(z.device, coder.factor * z.shape[-1]))
    return torch.cat([data.to_uint8(coder.decode(denormalise(part, scale, shift))) for part in parts])

def published(path, objective):
    """A DiT's or SiT's weights, whose names are ours -> what a diffusion.pt says of them. Of the last layer's
    outputs (p, q, 2c) the latter c, a learned variance, are left out."""
    weights = read_weights(path)
    if objective not in ("ddpm", "sit"):
        raise SystemExit(f"error: {path} learned --objective ddpm, if it is a DiT, or sit, not {objective}")
    try:
        (d, c, p, _), places = weights["x_embedder.proj.weight"].shape, weights["pos_embed"].shape[1]
        classes = len(weights["y_embedder.embedding_table.weight"]) - 1
        depth = sum(name.endswith("attn.qkv.bias") for name in weights)
        size, = (name for name in DIT_SIZES if DIT_SIZES[name][:2] == (d, depth))
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            weights[name] = weights[name].unflatten(0, (p * p, -1))[:, :c].flatten(0, 1)
    except (KeyError, ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {path} holds no DiT of a published size: {error}")
    names = ResNet50_Weights.DEFAULT.meta["categories"] if classes == 1000 else [*map(str, range(classes))]
    config = dict(preset="imagenet", dit=f"{size}/{p}", objective=objective, z_channels=c, cfg=4.0,
                  side=math.isqrt(places) * p, classes=names, data="published")
    return {"config": config, "step": 0, "ema": weights}

def load(path, device="cpu", objective="", coder=""):
    """A run's, or with `objective` a published denoiser; its VAE, or the file `coder`'s; the checkpoint."""
    state = published(path, objective) if objective else data.load_checkpoint(path, "diffusion.py")
    if coder:
        other = open_vae(coder)
        state = {"scale": other["config"].get("scale"), "shift": other["config"].get("shift", 0.0), **state,
                 "vae": other["vae"], "vae_config": other["config"]}
    run = data.settings(globals(), {}, state=state)             # with what an older one does not say
    state["config"], model, coder = vars(run), build(run), load_vae(state, device)
    data.restore({"ema": model}, state)
    if coder.z_channels != state["config"]["z_channels"]:
        raise SystemExit(f"error: the VAE has {coder.z_channels} latent channels, {path} another number")
    state["config"]["size"] = state["config"]["side"] * coder.factor
    return model.to(device).eval().requires_grad_(False), coder, state

def find(given):
    """What the flags mean -> the run's folder, its checkpoint with --resume, else None, and the VAE's."""
    home = data.folder_of(given["data"]) if "data" in given else ""
    out = given.get("out", home)
    if given.get("resume"):
        path = f"{out}/diffusion.pt" if out else data.newest("diffusion.pt", "diffusion.py")
        state = data.begin(path, given, "diffusion.py")
        return os.path.dirname(path), state, state
    path = given.get("vae") or f"{out}/vae.pt"
    if "vae" not in given and not os.path.exists(path):
        path = f"{home}/vae.pt" if home else data.newest("vae.pt", "vae.py")
    found = open_vae(path) if "vae" in given else data.load_checkpoint(path, "vae.py")
    if "data" not in found["config"]:                   # published
        if not home:
            raise SystemExit(f"error: {path} does not say which images to encode: give --data")
        found["config"] |= {"data": given["data"], "data_dir": "", "size": 256, "preset": given["data"]}
    print(f"taking the VAE of {path}" + f", {found['step']:,} updates" * bool(found["step"]))
    out = out or os.path.dirname(path)
    return out, data.begin(f"{out}/diffusion.pt", given, "diffusion.py"), found

def main(argv=None):
    given, rank, world = data.flags(globals(), argv), data.RANK, data.WORLD

    # the VAE, its own settings and the run's
    if given.get("bench"):
        out, state, coder_cfg = "", None, data.settings(vars(vae), {}, given.get("preset", "shapes"))
        coder = vae.build(coder_cfg)
    else:
        out, state, found = find(given)
        coder, coder_cfg = load_vae(found), argparse.Namespace(**found.get("vae_config", found["config"]))
    cfg = data.settings(globals(), given, coder_cfg.preset, state)
    for key in ("data", "data_dir", "size"):
        setattr(cfg, key, getattr(cfg, key) or getattr(coder_cfg, key))
    device, autocast = data.start(cfg)
    micro, steps = data.share(cfg, world)
    coder, batch, text = coder.to(device), micro * steps * world, cfg.condition == "text"
    cfg.out, cfg.z_channels, cfg.side = out, coder.z_channels, cfg.size // coder.factor
    shape = cfg.z_channels, cfg.side, cfg.side

    # latents
    if cfg.bench:
        moments = torch.randn(256, 2, *shape, dtype=torch.float16)
        y = np.ones((256, WORDS), int) if text else range(256)
        latents, scale = data.Images(range(1000), y, cfg.side, moments), 1.0
        cfg.classes, cfg.max_steps, cfg.log_every = latents.classes, 20, 1
    else:
        data.catch_signals()
        folder, known = data.folder_of(cfg.data), coder_cfg if cfg.data == coder_cfg.data else cfg
        os.makedirs(out, exist_ok=True), os.makedirs(folder, exist_ok=True)
        train, val = data.load(cfg.data, cfg.data_dir, cfg.size, getattr(known, "classes", ()))
        if cfg.compile and device.type == "cuda":
            coder.encode = torch.compile(coder.encode, dynamic=False)   # chooses channels-last by itself
        file, scale = precompute(coder, train, folder, device, autocast, cfg.workers)
        latents, cfg.classes = Latents(file, train.labels, text), train.classes
        cfg.prompts = [Captions(val).caption(row) for row in range(min(1000, len(val)) if text else 0)]
    scale = cfg.scale or vars(coder_cfg).get("scale") or scale
    shift, null = cfg.shift or vars(coder_cfg).get("shift", 0.0), 0 if text else len(cfg.classes)

    # denoiser
    torch.manual_seed(cfg.seed)
    if cfg.init and not state:
        init = published(cfg.init, cfg.objective)
        cfg.model, cfg.dit = "dit", init["config"]["dit"]
    model, (home, every) = build(cfg).to(device), ("cpu", 10) if cfg.ema_on_cpu else (device, 1)
    ema = copy.deepcopy(model).to(home).requires_grad_(False)
    groups = [{"params": [p for name, p in model.named_parameters() if (".layers." in name) == words]}
              for words in (False, True)]                       # the second: the transformer over words
    opt = torch.optim.AdamW(groups, cfg.lr, (0.9, 0.99), weight_decay=0.0, fused=True)
    trained = {"model": model, "ema": ema, "opt": opt, "vae": coder}
    if state:
        data.restore(trained, state)
    elif cfg.init:
        if text or len(init["config"]["classes"]) != null:      # what knows of classes or words starts anew
            init["ema"] |= {name: tensor for name, tensor in model.state_dict().items()
                            if "y_embedder." in name or ".cross." in name}
        data.restore({"model": model, "ema": ema}, init | {"model": init["ema"]})
    start, n = state["step"] if state else 0, sum(p.numel() for p in model.parameters())
    print(f"{cfg.model} {cfg.dit if cfg.model == 'dit' else cfg.widths} of {n:,} parameters, {cfg.objective} "
          f"by {cfg.condition}; {len(latents):,} latents {shape}, scale {scale:.4f}, shift {shift:g}; "
          f"{cfg.max_steps:,} updates of {world} x {steps} x {micro}, {device}{', bf16' * cfg.bf16}")
    if cfg.grad_checkpoint:
        recompute(model, ResBlock, DiTBlock)
    if cfg.compile:
        model.compile(dynamic=False)                            # in place: the names of the weights stay
    def picture(step):
        shown = min(10, len(cfg.prompts) if text else null)
        y = torch.arange(cfg.samples) % shown
        y = (tokens(cfg.prompts)[y] if text else y * (null // shown)).to(device)
        noise = noise_of(range(len(y)), shape, cfg.seed, device)
        ema.to(device)                                          # into the memory of the gradients, none now
        with autocast:
            *_, z = sample(ema, cfg.objective, noise, y, null, cfg.sample_steps, cfg.cfg, churn=cfg.churn)
        ema.to(home)
        drawn = data.grid(decode(coder, z, scale, shift), shown)
        data.replace_file(f"{out}/samples_{step:06d}.png", lambda f: drawn.save(f, "png"))

    log = Log("" if cfg.bench else f"{out}/diffusion.csv", start, cfg.max_steps)
    plan = data.schedule(len(latents), micro, steps, start, cfg.max_steps, rank, world, cfg.seed)
    batches = data.feed(latents, plan, device, cfg.workers)
    for step in range(start, cfg.max_steps):
        # learning rate
        lr = min(1, (step + 1) / max(1, cfg.lr_warmup)) * cosine(cfg.lr, cfg.lr_min, step / cfg.max_steps)
        opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = lr, min(lr, WORDS_LR)

        # micro-steps
        z_noise, e, t, dropped = draw(cfg, step, batch, device)
        losses = torch.zeros(batch, device=device)
        for k in range(steps):
            rows = slice((k * world + rank) * micro, (k * world + rank + 1) * micro)
            moments, y = next(batches)
            mean, logvar = moments.float().unbind(1)
            x0 = normalise(mean + (logvar / 2).exp() * z_noise[rows], scale, shift)
            y = torch.where(dropped[rows].view(-1, *[1] * (y.ndim - 1)), null, y)
            with autocast:
                loss = diffusion_loss(model, cfg.objective, x0, e[rows], t[rows], y)
            (loss.mean() / steps).backward()
            losses[rows] = loss.detach()

        # clip, step, average the weights
        norms, unsound = vae.update([(model, opt)], cfg.clip)
        log.skipped, log.streak = log.skipped + unsound, (log.streak + 1) * unsound
        if rank == 0 and (step + 1) % every == 0:
            update_ema(ema, model, cfg.ema, step, every)

        # checkpoint, picture
        step, stop = step + 1, data.stop_asked()                        # updates done
        due = not cfg.bench and (step % cfg.eval_every == 0 or step == cfg.max_steps)
        with log.pause():
            if due or stop:
                data.save_checkpoint(f"{out}/diffusion.pt", "diffusion.py", cfg, step, trained, scale=scale,
                                     shift=shift, vae_config=vars(coder_cfg))
            if due and rank == 0 and cfg.samples:
                picture(step)

        # log
        if step % cfg.log_every == 0 or step == cfg.max_steps:
            losses = data.total(losses)
            figures = {"loss": losses.mean().item(), "norm": norms.item(), "lr": lr}
            figures |= {f"loss_t{q + 1}/4": losses[(t * 4).long() == q].mean().item() for q in range(4)}
            log.row(step, batch, ("loss", "norm"), **figures)
        if stop:
            data.leave(stop, f"saved at step {step:,}; go on with --resume")
    if cfg.bench:
        return vae.report(log.seconds, batch, one_latent, cfg, device)
    print(f"{out}/diffusion.pt, {os.path.getsize(f'{out}/diffusion.pt') / 1e6:,.0f} MB with the VAE")

if __name__ == "__main__":
    data.guard(main)
