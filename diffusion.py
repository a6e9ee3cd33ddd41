"""Stage two: a denoiser, by class or caption, on the latents of the frozen VAE of stage one.

    python diffusion.py                                         # on the newest out/*/vae.pt
    python diffusion.py --objective v --model dit --out out/v-dit
    python diffusion.py --condition text --out out/words
    torchrun --nproc-per-node 8 diffusion.py

Encodes every image once, into latents_*.npy beside the VAE, then trains. Writes diffusion.pt, which
carries the VAE along, diffusion.csv and samples_*.png, drawn with the averaged weights, to --out.
"""
import argparse
import collections
import copy
import functools
import hashlib
import math
import os
import re
import shutil
import sys
import time
import unicodedata
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights

import data
from vae import (CALL, Attention, Downsample, Log, ResBlock, Upsample, attend,
                 average_gradients, catch_signals, cosine, generator, groups_for, load_checkpoint,
                 load_vae, newest, norm, read_weights, recompute, save_checkpoint,
                 setup, share_out, total, wait, zeroed)

# ---- settings: the defaults are those of `shapes`; over them goes a preset, then flags ----------
PRESETS = {
    "shapes": {},
    "cifar10": dict(
        max_steps=292_968, batch_size=128, eval_every=5000, widths=[128, 256, 256], blocks=2,
        dit="S/2", objective="v", times="uniform", lr=2e-4, lr_warmup=1000, ema=0.9999, cfg=5.0,
        sample_steps=25, churn=0.0, compile=None),
    "cifar10-small": dict(
        max_steps=26_400, batch_size=32, eval_every=3300, widths=[128, 128], pointwise=True,
        lr=1e-3, lr_warmup=200, ema=0.999, cfg=1.75, sample_steps=12, churn=0.0, times_shift=2.0),
    "imagenet": dict(
        max_steps=400_000, batch_size=256, micro_batch=64, eval_every=5000, model="dit", dit="B/2",
        widths=[192, 384, 384], blocks=2, lr=1e-4, lr_end=1e-4, lr_warmup=0, ema=0.9999, cfg=5.0,
        sample_steps=25, churn=0.0, samples=20, compile=None)
}
PUBLISHED = ("ddpm", "sit")
DIT_SIZES = {               # width, depth, heads
    "XS": (192, 6, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16)
}

def settings(argv=None):
    """-> the settings, and the checkpoint of the run that goes on, or else of the VAE"""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    yes_no = argparse.BooleanOptionalAction
    # run
    flag("--vae", default="", help="a vae.pt; empty: of --out, or the newest")
    flag("--data", default="", help="as for vae.py; empty: what the VAE learned from")
    flag("--size", type=int, default=0, help="pixels a side; 0: the VAE's")
    flag("--preset", default="", choices=["", *PRESETS], help="a row of PRESETS; empty: the VAE's")
    flag("--out", default="", help="the run's folder; empty: the VAE's")
    flag("--max-steps", type=int, default=3200, help="updates")
    flag("--batch-size", type=int, default=16, help="latents per update, over all processes")
    flag("--micro-batch", type=int, default=0, help="of these a process takes at a time; 0: all")
    flag("--eval-every", type=int, default=1600, help="updates between pictures, checkpoints")
    flag("--log-every", type=int, default=10, help="updates between rows of the log")
    flag("--seed", type=int, default=0, help="of the weights, the latents' order and all noise")
    flag("--resume", action="store_true", help="go on with the run in --out, or the newest")
    flag("--overwrite", action="store_true", help="start again on top of a run")
    flag("--init", default="", help="published weights of a DiT or SiT to start from")
    # model
    flag("--condition", default="class", choices=["class", "text"], help="text: captions")
    flag("--model", default="unet", choices=["unet", "dit"], help="the denoiser")
    flag("--widths", type=int, nargs="+", default=[128], help="unet: channels at each resolution")
    flag("--blocks", type=int, default=1, help="unet: residual blocks at each resolution")
    flag("--attention-at", type=int, default=8, help="unet: self-attention up to this side")
    flag("--pointwise", action=yes_no, default=False, help="unet: first convolutions of 1x1")
    flag("--dit", default="XS/1", help="dit: size XS, S, B, L, XL / patch")
    # loss
    flag("--objective", default="flow", choices=["flow", "v", "eps", "ddpm", "sit"],
         help="the last two are the published DiT's and SiT's")
    flag("--times", default="logit-normal", choices=["uniform", "logit-normal"],
         help="density of t; ddpm and sit: uniform")
    flag("--times-shift", type=float, default=0.0, help="of the odds of t; 0: with text 2, else 1")
    flag("--label-dropout", type=float, default=0.1, help="share of null labels, for guidance")
    # optimiser
    flag("--lr", type=float, default=2.2e-3, help="AdamW")
    flag("--lr-end", type=float, default=1e-5, help="where the cosine ends")
    flag("--lr-warmup", type=int, default=100, help="updates")
    flag("--clip", type=float, default=1.0, help="gradient norm")
    flag("--ema", type=float, default=0.998, help="decay of the averaged weights")
    # pictures, and sample.py's defaults
    flag("--cfg", type=float, default=1.2, help="guidance scale; 1: none")
    flag("--sample-steps", type=int, default=25, help="steps of the sampler")
    flag("--churn", type=float, default=2.0, help="noise drawn anew: 0 none, 1 DDPM's, 2 more")
    flag("--samples", type=int, default=80, help="images in a picture")
    # system: what is not given, each machine decides for itself
    flag("--device", help="cuda, cpu, mps; by default cuda where there is one")
    flag("--bf16", action=yes_no, help="bfloat16 autocast; by default where it is faster")
    flag("--compile", action=yes_no, default=False, help="in cifar10, imagenet: on GPUs")
    flag("--grad-checkpoint", action="store_true", help="save memory, slower")
    flag("--workers", type=int, default=8, help="threads that read images or latents")

    # defaults < preset < what the run saved < flags
    cfg = parser.parse_args(argv)
    if cfg.resume:
        found = f"{cfg.out}/diffusion.pt" if cfg.out else newest("diffusion.pt")
        state = load_checkpoint(found)
        saved = state["config"]
    else:
        found = cfg.vae or f"{cfg.out}/vae.pt"
        if not os.path.exists(found) and not cfg.vae:
            found = newest("vae.pt")
        state = load_checkpoint(found)
        saved = {name: state["config"][name] for name in ("data", "size", "preset")}
        print(f"taking the VAE of {found}")
    folder = os.path.dirname(found) or "."
    parser.set_defaults(**PRESETS[cfg.preset or saved["preset"]])
    if cfg.objective in PUBLISHED:
        parser.set_defaults(times="uniform")
    # latents is no flag: all runs on a VAE share those beside it
    parser.set_defaults(**{"latents": folder, **saved})
    cfg = parser.parse_args(argv)
    cfg.out = cfg.out or folder
    if not os.path.isdir(cfg.latents):              # the run has moved
        cfg.latents = folder
    cfg.times_shift = cfg.times_shift or (2.0 if cfg.condition == "text" else 1.0)
    if not cfg.resume and not cfg.overwrite and os.path.exists(f"{cfg.out}/diffusion.pt"):
        sys.exit(f"error: {cfg.out}/diffusion.pt exists: --resume, --overwrite, or another --out")
    if cfg.init and cfg.objective not in PUBLISHED:
        sys.exit("error: --init takes --objective ddpm, for a DiT, or sit, for a SiT")
    if cfg.max_steps == 0 and (not cfg.init or state["scale"] is None):
        sys.exit("error: --max-steps 0 takes a published --init and --vae")
    return cfg, state

# ---- the method: path, loss, guidance, sampler -------------------------------------------------
def path(objective, t):
    """x_t = a x0 + b e, from data (t=0) to noise (t=1) -> a, b and their derivatives da, db.

    flow, sit: a straight line (Lipman et al. 2023; Liu et al. 2023). v, eps: a quarter circle, by
    its angle (Salimans and Ho 2022); ddpm: that circle in the thousand steps of Ho et al. (2020).
    On both a db - da b = 1, so that of v = da x0 + db e: x0 = db x - b v and e = a v - da x.
    """
    if objective in ("flow", "sit"):
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if objective == "ddpm":
        angle = ddpm_angles(t.device)[(1000 * t).round().long()]
    else:
        angle = t * (math.pi / 2)
    return angle.cos(), angle.sin(), -angle.sin(), angle.cos()

@functools.cache
def ddpm_angles(device):
    """The angle after 0 to 1000 steps of betas from 1e-4 to 0.02: cos(angle)^2 = prod(1 - beta)."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.double)
    cosines = (1 - betas).cumprod(0).sqrt()
    return F.pad(cosines.arccos(), (1, 0)).float().to(device)

def first_time(objective):
    """Where sampling starts; at t = 1 eps would divide by a = 0."""
    return 0.96 if objective == "eps" else 1.0

def velocity(model, objective, x, t, y):
    """The model's estimate of v = da x0 + db e at x [b, c, h, w], t [b], labels y [b]; float32."""
    if objective in ("flow", "v"):
        return model(x, t, y).float()
    if objective == "sit":                          # its time runs from noise (0) to data (1)
        return -model(x, (1 - t) / 1000, y).float()         # our embedder multiplies by 1000
    if objective == "ddpm":                         # it counts its steps from 0
        e = model(x, t - 0.001, y).float()
    else:
        e = model(x, t, y).float()
    a, _, da, _ = path(objective, t.view(-1, 1, 1, 1))
    return (da * x + e) / a                         # at x0 = (x - b e) / a, by a db - da b = 1

def diffusion_loss(model, objective, x0, e, t, y):
    """Squared error of the velocity per image [b]. For eps that is the noise's error over a^2: the
    error of the noise itself hardly sees the noisy times, which decide an image's layout."""
    a, b, da, db = path(objective, t.view(-1, 1, 1, 1))
    v = velocity(model, objective, a * x0 + b * e, t, y)
    error = v - (da * x0 + db * e)
    if objective == "ddpm":
        error = a * error                           # of the noise, as published
    return error.square().mean(dim=(1, 2, 3))

def guided_velocity(model, objective, x, t, y, null, w):
    """Classifier-free guidance (Ho and Salimans 2022), both halves in one batch."""
    if w == 1:
        return velocity(model, objective, x, t, y)
    both = torch.cat([y, null.expand_as(y)])
    v = velocity(model, objective, torch.cat([x, x]), torch.cat([t, t]), both)
    v_y, v_null = v.chunk(2)
    return v_null + w * (v_y - v_null)

@torch.no_grad()
def sample(model, objective, noise, y, null, steps, guidance, churn=0.0, interval=(0, 1),
           extrapolate=True):
    """From noise() [b, c, h, w] to data: yields x after each step, the last is the sample.

    A step from t to s estimates x0 and e, and moves to the point with the same x0 and e at s: that
    is Euler's method on the line, DDIM (Song et al. 2021) on the circle. With x0 extrapolated to
    the middle of the step, by the step before, a third as many steps are enough. With churn a part
    of e is drawn anew instead, and later steps mend what earlier ones got wrong; 1 is DDPM (Ho et
    al. 2020). Guidance acts while t is in the interval (Kynkaanniemi et al. 2024)."""
    times = torch.linspace(first_time(objective), 0.0, steps + 1)
    x = noise()
    before = None
    for t, s in zip(times[:-1], times[1:]):
        a, b, da, db = path(objective, t)
        a_s, b_s, _, _ = path(objective, s)
        w = guidance if interval[0] <= t <= interval[1] else 1.0
        v = guided_velocity(model, objective, x, t.expand(len(x)).to(x.device), y, null, w)
        x0 = db * x - b * v
        e = a * v - da * x
        if churn > 0:
            # DDPM keeps a / b at t over a / b at s; cos(pi / 2) is a little below 0
            kept = (a * b_s / (a_s * b)).clamp_min(0) ** churn
            e = kept * e + (1 - kept ** 2).sqrt() * noise()
        elif extrapolate:
            now = x0
            if before is not None:
                x0 = 1.5 * now - 0.5 * before
            e = (x - a * x0) / b
            before = now
        x = a_s * x0 + b_s * e
        yield x

# ---- conditions: time, and a class or a caption ------------------------------------------------
class TimestepEmbedder(nn.Module):
    """Time [b] -> [b, d]: sines and cosines of 1000 t, then two layers."""
    def __init__(self, d):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)
        frequencies = 1000 * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angles = t[:, None] * self.frequencies              # float32: bf16 has no t = 0.997
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

class LabelEmbedder(nn.Module):
    """Classes [b] -> [b, d], and None for words. Class `num_classes` is the null class."""
    def __init__(self, num_classes, d):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, d)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y):
        return self.embedding_table(y), None

WORDS = 24              # of a caption, at most
VOCABULARY = 8192       # words are told apart by a hash
WORD_WIDTH = 128

def words_of(caption):
    """Without regard to case, and to how a letter with its accent is written (NFC, NFD)."""
    return re.findall(r"\w+", unicodedata.normalize("NFC", caption).casefold())

def tokenize(captions):
    """Captions -> ids of their words, then zeros: int64 [n, WORDS]. The null caption: all zeros."""
    ids = torch.zeros(len(captions), WORDS, dtype=torch.long)
    for i, caption in enumerate(captions):
        for k, word in enumerate(words_of(caption)[:WORDS]):
            ids[i, k] = 1 + zlib.crc32(word.encode()) % (VOCABULARY - 1)
    return ids

class TextEmbedder(nn.Module):
    """A transformer over ids y [b, n] -> their mean [b, d], and for cross-attention the words
    [b, 1 + n, WORD_WIDTH] with a mask of those that are there."""
    def __init__(self, d):
        super().__init__()
        self.embedding_table = nn.Embedding(VOCABULARY, WORD_WIDTH)
        self.begin = nn.Parameter(torch.zeros(1, 1, WORD_WIDTH))    # never masked: no row is NaN
        self.positions = nn.Parameter(0.02 * torch.randn(1 + WORDS, WORD_WIDTH))
        layer = nn.TransformerEncoderLayer(
            WORD_WIDTH, nhead=4, dim_feedforward=4 * WORD_WIDTH, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(
            layer, num_layers=2, norm=nn.LayerNorm(WORD_WIDTH), enable_nested_tensor=False)
        self.mean = nn.Linear(WORD_WIDTH, d)

    def forward(self, y):
        there = F.pad(y > 0, (1, 0), value=True)
        begin = self.begin.expand(len(y), 1, WORD_WIDTH)
        words = torch.cat([begin, self.embedding_table(y)], dim=1) + self.positions
        words = self.layers(words, src_key_padding_mask=~there)
        mean = (words * there[:, :, None]).sum(dim=1) / there.sum(dim=1, keepdim=True)
        return self.mean(mean), (words, there)

class CrossAttention(nn.Module):
    """Places x [b, n, c] look at a caption's words (Rombach et al. 2022). Starts as nothing."""
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(c)
        self.to_q = nn.Linear(c, c)
        self.to_kv = nn.Linear(WORD_WIDTH, 2 * c)
        self.to_out = zeroed(nn.Linear(c, c))

    def forward(self, x, words, there):
        q = self.to_q(self.norm(x))
        k, v = self.to_kv(words).chunk(2, dim=2)
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        h = attend(q, k, v, there[:, None, None, :])
        return x + self.to_out(h.transpose(1, 2).flatten(2))

# ---- the UNet ----------------------------------------------------------------------------------
class CondBlock(nn.Module):
    """The VAE's residual block, its second norm scaled and shifted by c [b, d] (Dhariwal and Nichol
    2021), then perhaps self-attention and cross-attention."""
    def __init__(self, c_in, c_out, d, groups, kernel, attention, text):
        super().__init__()
        self.res = ResBlock(c_in, c_out, groups, kernel)
        self.condition = nn.Linear(d, 2 * c_out)
        self.attention = Attention(c_out, groups) if attention else None
        self.cross = CrossAttention(c_out, heads=4) if attention and text else None

    def forward(self, x, c, words):
        scale, shift = self.condition(F.silu(c))[:, :, None, None].chunk(2, dim=1)
        h = self.res.conv1(F.silu(self.res.norm1(x)))
        h = self.res.norm2(h) * (1 + scale) + shift
        x = self.res.conv_shortcut(x) + self.res.conv2(F.silu(h))
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None:
            places = self.cross(x.flatten(2).transpose(1, 2), *words)
            x = places.transpose(1, 2).reshape(x.shape)
        return x

class UNet(nn.Module):
    """Blocks down and up with skip connections, attention at low resolutions (Ho et al. 2020)."""
    def __init__(self, channels, side, num_classes, cfg):
        super().__init__()
        if side % 2 ** (len(cfg.widths) - 1) > 0:
            sys.exit(f"error: latents of side {side} can't be halved as --widths ask: give fewer")
        text = cfg.condition == "text"
        groups = groups_for(cfg.widths)
        c = cfg.widths[0]
        d = 4 * c
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = TextEmbedder(d) if text else LabelEmbedder(num_classes, d)

        def block(c_in, c_out, level):
            attention = side // 2 ** level <= cfg.attention_at
            return CondBlock(c_in, c_out, d, groups, 1 if cfg.pointwise else 3, attention, text)

        skips = [c]
        self.first = nn.Conv2d(channels, c, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(cfg.widths):
            if level > 0:
                self.down.append(Downsample(c))
                skips.append(c)
            for _ in range(cfg.blocks):
                self.down.append(block(c, width, level))
                skips.append(width)
                c = width
        self.middle = nn.ModuleList([block(c, c, level), block(c, c, level)])
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(cfg.widths))):
            for _ in range(cfg.blocks + 1):
                self.up.append(block(c + skips.pop(), width, level))
                c = width
            if level > 0:
                self.up.append(Upsample(c))
        self.norm = norm(c, groups)
        self.last = zeroed(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x, t, y):
        label, words = self.y_embedder(y)
        c = self.t_embedder(t) + label
        x = self.first(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, c, words) if isinstance(layer, CondBlock) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, c, words)
        for layer in self.up:
            if isinstance(layer, CondBlock):
                x = layer(torch.cat([x, skips.pop()], dim=1), c, words)
            else:
                x = layer(x)
        return self.last(F.silu(self.norm(x)))

# ---- the DiT (Peebles and Xie 2023), with the names of facebookresearch/DiT --------------------
def positions(d, side):
    """Fixed sines and cosines [1, side * side, d]: half of d by column, half by row."""
    frequencies = 10000.0 ** -(torch.arange(d // 4) / (d // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line.repeat(side, 1)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)[None]

def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]

class SelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))         # [b, n, 3, heads, d / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))

class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: tokens x [b, n, d], conditioning c [b, d]."""
    def __init__(self, d, heads, text, gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(d, heads)
        self.cross = CrossAttention(d, heads) if text else None
        self.norm2 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(collections.OrderedDict(
            fc1=nn.Linear(d, 4 * d), act=nn.GELU(gelu), fc2=nn.Linear(4 * d, d)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, c, words):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        if self.cross is not None:
            x = self.cross(x, *words)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

class FinalLayer(nn.Module):
    def __init__(self, d, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.linear = zeroed(nn.Linear(d, out))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(d, 2 * d)))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class DiT(nn.Module):
    def __init__(self, channels, side, num_classes, cfg):
        super().__init__()
        name, _, patch = cfg.dit.partition("/")
        if name not in DIT_SIZES or not patch.isdigit() or side % int(patch) > 0:
            sys.exit(f"error: --dit {cfg.dit}: expected {', '.join(DIT_SIZES)} / divisor of {side}")
        d, depth, heads = DIT_SIZES[name]
        text = cfg.condition == "text"
        self.patch = int(patch)
        patches = nn.Conv2d(channels, d, self.patch, stride=self.patch)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = TextEmbedder(d) if text else LabelEmbedder(num_classes, d)
        self.register_buffer("pos_embed", positions(d, side // self.patch))
        # the published ones have the approximation, which is slower on CPUs
        gelu = "tanh" if cfg.objective in PUBLISHED else "none"
        self.blocks = nn.ModuleList([DiTBlock(d, heads, text, gelu) for _ in range(depth)])
        self.final_layer = FinalLayer(d, self.patch ** 2 * channels)
        self.init_weights()

    def init_weights(self):
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for block in self.blocks:                   # every block starts as the identity
            zeroed(block.adaLN_modulation[1])
            if block.cross is not None:
                zeroed(block.cross.to_out)

    def forward(self, x, t, y):
        b, channels, h, w = x.shape
        label, words = self.y_embedder(y)
        c = self.t_embedder(t) + label
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2)      # [b, n, d], bf16 in autocast
        x = x.contiguous() + self.pos_embed.to(x.dtype)             # all is slower if strided
        for block in self.blocks:
            x = block(x, c, words)
        x = self.final_layer(x, c)                                  # [b, n, patch^2 * channels]
        x = x.view(b, h // self.patch, w // self.patch, self.patch, self.patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, h, w)

# ---- denoisers, in and out ---------------------------------------------------------------------
def build(cfg, channels, side, num_classes):
    """model(x [b, channels, side, side], t [b] in [0, 1], y [b] or [b, WORDS]) -> like x"""
    kind = DiT if cfg.model == "dit" else UNet
    return kind(channels, side, num_classes, cfg)

def read_published(file):
    """A DiT's or SiT's file, whose layers' names are ours -> weights, without those that predict a
    variance; the size as in "XL/2"; the side of its latents; the names of its classes"""
    weights = read_weights(file)
    if "x_embedder.proj.weight" not in weights or "pos_embed" not in weights:
        sys.exit(f"error: {file} holds no DiT: there is no x_embedder.proj.weight or pos_embed")
    d, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = sum(name.endswith("attn.qkv.weight") for name in weights)
    sizes = [name for name in DIT_SIZES if DIT_SIZES[name][:2] == (d, depth)]
    if not sizes:
        sys.exit(f"error: {file} is no DiT of a published size: {depth} blocks of width {d}")
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = weights[name].unflatten(0, (patch ** 2, -1))         # channels of mean, of variance
        weights[name] = rows[:, :channels].flatten(0, 1)
    side = patch * math.isqrt(weights["pos_embed"].shape[1])
    classes = [str(k) for k in range(len(weights["y_embedder.embedding_table.weight"]) - 1)]
    if len(classes) == 1000:
        classes = ResNet50_Weights.DEFAULT.meta["categories"]
    return weights, f"{sizes[0]}/{patch}", side, classes

def load_run(file, device="cpu"):
    """A diffusion.pt -> the denoiser with averaged weights, the VAE, and all that the file holds"""
    state = load_checkpoint(file)
    channels, side, _ = state["shape"]
    cfg = argparse.Namespace(**state["config"])
    model = build(cfg, channels, side, len(state["classes"]))
    model.load_state_dict(state["ema"])
    return model.to(device), load_vae(state).to(device), state

# ---- latents -----------------------------------------------------------------------------------
def latents_file(vae, train, views, cfg):
    """A name by encoder, size, and the images' names and lengths, so that no others are taken."""
    kind = type(vae.codes).__name__                 # the quantiser's: FSQ bounds the latents
    digest = hashlib.sha256(f"{cfg.data} {cfg.size} {views} {kind}".encode(errors="replace"))
    for name, tensor in vae.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(tensor.cpu().numpy().tobytes())
    for file in getattr(train, "paths", []):
        size = os.path.getsize(file) if os.path.exists(file) else 0
        digest.update(f"{file} {size}\n".encode(errors="surrogateescape"))
    return f"latents_{digest.hexdigest()[:12]}.npy"

@torch.no_grad()
def make_latents(file, shape, encode, dataset, device, autocast, workers, rank, world):
    """Mean and log-variance of every image, and of its mirror image if there are two views, into a
    file of float16 [n, views, 2, c, h, w]. Each process fills blocks of it, except those that an
    earlier, stopped call has filled; it gets its name when it is whole."""
    part = f"{file}.part"
    if rank == 0 and not os.path.exists(part):
        size = 2 * math.prod(shape)
        if size > shutil.disk_usage(os.path.dirname(part)).free:
            sys.exit(f"error: no room for {file} of {size / 1e9:.1f} GB")
        np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
    wait()
    latents = np.lib.format.open_memmap(part, "r+")
    blocks = [range(k, min(k + 32, len(latents))) for k in range(0, len(latents), 32)]
    blocks = [block for block in blocks[rank::world] if not latents[block[-1]].any()]   # still 0
    printed = time.time()
    batches = data.prefetch(dataset.__getitem__, blocks, workers)
    for block, (pixels, _) in zip(blocks, batches):
        x = data.to_float(pixels.to(device))
        with autocast:
            moments = [torch.stack(encode(x), dim=1)]
            if shape[1] == 2:
                moments.append(torch.stack(encode(x.flip(3)), dim=1))
        latents[block[0]:block[-1] + 1] = torch.stack(moments, dim=1).half().cpu().numpy()
        if time.time() - printed > 5:
            printed = time.time()
            print(f"encoding {block[-1] + 1:,}/{len(latents):,} images")
    latents.flush()
    del latents                                     # Windows renames no file that is mapped
    wait()
    if rank == 0 and os.path.exists(part):          # else another run has done it
        os.replace(part, file)
    wait()

def measure_scale(latents):
    """1 / std of z = mean + exp(logvar / 2) noise, over ten thousand images or all."""
    some = latents[:: max(1, len(latents) // 10_000), 0].astype(np.float32)
    mean = some[:, 0]
    second = mean ** 2 + np.exp(some[:, 1])
    return 1 / math.sqrt(second.mean() - mean.mean() ** 2)

@torch.no_grad()
def decode(vae, z, scale, shift):
    """Scaled latents [n, c, h, w] -> uint8 images, in float32, a million pixels at a time."""
    at_once = max(1, 2 ** 20 // (vae.factor * z.shape[-1]) ** 2)
    with torch.autocast(z.device.type, enabled=False):
        parts = [vae.decode(part / scale + shift) for part in z.split(at_once)]
    return torch.cat([data.to_uint8(part) for part in parts])

# ---- training ----------------------------------------------------------------------------------
def draw_times(n, cfg, source):
    """Times in [0, 1), evenly spread over the batch (Kingma et al. 2021), then shaped."""
    offset = torch.rand(1, device=source.device, generator=source)
    t = (offset + torch.arange(n, device=source.device) / n) % 1
    if cfg.times == "logit-normal":                                 # Esser et al. 2024
        normal = math.sqrt(2) * torch.erfinv(2 * t - 1)
        t = normal.sigmoid()
    t = cfg.times_shift * t / (1 + (cfg.times_shift - 1) * t)       # likewise, eq. 23
    if cfg.objective == "ddpm":                                     # steps 1 to 1000
        t = ((1000 * t).floor() + 1).clamp(max=1000) / 1000
    return t * first_time(cfg.objective)

@torch.no_grad()
def update_ema(ema, model, decay, step):
    """The decay is lower at first, so that the start is soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

def learning_rate(step, cfg):
    warmup = min(1.0, (step + 1) / max(1, cfg.lr_warmup))
    return warmup * (cfg.lr_end + (cfg.lr - cfg.lr_end) * cosine(step / cfg.max_steps))

def noise_by_row(rows, shape, seed, device):
    """-> a function that draws noise [n, *shape]; image i's is a function of (seed, i) alone"""
    sources = [torch.Generator().manual_seed((seed * 10_000_019 + int(i)) % 2 ** 64) for i in rows]

    def noise():
        return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)
    return noise

def main(argv=None):
    cfg, state = settings(argv)
    rank, world, device, autocast, compiled = setup(cfg)
    micro, steps = share_out(cfg, world)
    file = f"{cfg.out}/diffusion.pt"
    text = cfg.condition == "text"
    vae = load_vae(state).to(device)
    scale = state["scale"]                          # None: to be measured
    shift = state["shift"]
    prompts = []
    if cfg.init:
        weights, cfg.dit, side, published = read_published(cfg.init)
        classes = published
        cfg.model = "dit"
        if cfg.max_steps == 0:
            cfg.size = side * vae.factor
    if compiled and cfg.model == "dit" and micro == 1:
        sys.exit("error: torch.compile drops gradients of a DiT with a micro-batch of 1 (pytorch "
                 "#193061): give --micro-batch 2 or --no-compile")
    if cfg.size % vae.factor > 0:
        sys.exit(f"error: --size must be a multiple of {vae.factor}")
    side = cfg.size // vae.factor
    shape = (vae.z_channels, side, side)

    # images and their labels; published weights that are only to be converted take none
    if cfg.max_steps > 0:
        train, val = data.load(cfg.data, cfg.size)
        classes = train.classes
        labels = torch.as_tensor(train.targets)
        if text:
            captions = [train.caption(i) for i in range(len(train))]
            prompts = [val.caption(i) for i in data.shuffled(len(val), 0, 0)[:1000]]
            labels = tokenize(captions)
            beside = sum(caption != classes[y] for caption, y in zip(captions, train.targets))
            print(f"captions beside {beside:,} of {len(train):,} images, else the class's name; "
                  f"{WORDS} words of each are read")
    null = tokenize([""]) if text else torch.tensor([len(classes)])
    null = null.to(device)

    # denoiser
    torch.manual_seed(cfg.seed)
    model = build(cfg, *shape[:2], len(classes)).to(device)
    if cfg.init and not cfg.resume:
        if text or len(published) != len(classes):
            # what knows of classes or words starts anew
            weights |= {name: tensor for name, tensor in model.state_dict().items()
                        if name.startswith("y_embedder.") or ".cross." in name}
        weights["pos_embed"] = model.pos_embed      # of this side
        model.load_state_dict(weights)
    ema = copy.deepcopy(model)
    groups = [{"params": []}, {"params": []}]       # the second: the transformer over words
    for name, p in model.named_parameters():
        groups[name.startswith("y_embedder.layers.")]["params"].append(p)
    opt = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start = 0
    if cfg.resume:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        start = state["step"]
        print(f"going on with {file} from update {start:,}")
    config = {name: value for name, value in vars(cfg).items() if name not in CALL}

    def save(step):
        save_checkpoint(file, {
            "model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
            "step": step, "config": config, "vae": vae.state_dict(),
            "vae_config": state.get("vae_config", state["config"]),         # of a run, of a VAE
            "shape": shape,
            "classes": classes, "prompts": prompts, "scale": scale, "shift": shift})

    def picture(step):
        known = tokenize(prompts) if text else torch.arange(len(classes))
        columns = min(10, len(known))               # evenly spaced, one a column
        y = known[:: len(known) // columns][torch.arange(cfg.samples) % columns]
        noise = noise_by_row(range(cfg.samples), shape, cfg.seed, device)
        with autocast:
            for z in sample(ema, cfg.objective, noise, y.to(device), null, cfg.sample_steps,
                            cfg.cfg, cfg.churn):
                pass
        data.grid(decode(vae, z, scale, shift), columns).save(f"{cfg.out}/samples_{step:06d}.png")

    os.makedirs(cfg.out, exist_ok=True)
    if cfg.max_steps == 0:
        if rank == 0:
            save(0)
        return print(f"{file}: the weights of {cfg.init}")

    # latents
    views = 2 if train.mirror and not text else 1               # captions know left from right
    latents_path = f"{cfg.latents}/{latents_file(vae, train, views, cfg)}"
    if not os.path.exists(latents_path):
        encode = torch.compile(vae.encode, dynamic=False) if compiled else vae.encode
        make_latents(latents_path, (len(train), views, 2, *shape), encode, train, device,
                     autocast, cfg.workers, rank, world)
    latents = np.load(latents_path, mmap_mode="r")
    scale = scale or measure_scale(latents)
    print(f"{cfg.model} of {sum(p.numel() for p in model.parameters()):,} parameters on {device}, "
          f"{len(latents) * views:,} latents {shape}, scale {scale:.4f}, shift {shift:g}; "
          f"{world} x {steps} x {micro} an update")
    if cfg.grad_checkpoint:
        recompute(model, (CondBlock, DiTBlock))
    if compiled:
        model.compile(dynamic=False)                # in place: the names of the weights stay

    def read(row):
        image, view = divmod(int(row), views)
        return np.array(latents[image, view]), labels[image]

    rows = data.micro_batches(len(latents) * views, micro, start * steps, rank, world, cfg.seed)
    batches = data.prefetch(read, rows, cfg.workers)
    if rank == 0:
        log = Log(f"{cfg.out}/diffusion.csv", start, cfg.max_steps)
    caught = catch_signals()
    clock = time.time()
    logged = start
    for step in range(start, cfg.max_steps):
        # learning rate; the transformer over words wants a small one
        lr = learning_rate(step, cfg)
        opt.param_groups[0]["lr"] = lr
        opt.param_groups[1]["lr"] = min(lr, 3e-4)

        # all randomness of an update at once, by (seed, step), and each process takes its rows
        source = generator(device, cfg.seed, step)
        split = (steps, world, micro)
        z_noise, e = torch.randn(2, *split, *shape, device=device, generator=source)[:, :, rank]
        t = draw_times(cfg.batch_size, cfg, source).view(split)[:, rank]
        # of a caption all words are dropped, or none
        chance = torch.rand(split + (1,) * text, device=device, generator=source)[:, rank]

        quarters = torch.zeros(2, 4, device=device)                 # of t: sum of losses, count
        for k in range(steps):
            moments, y = next(batches)
            mean, logvar = moments.to(device).float().unbind(dim=1)
            z = mean + (0.5 * logvar).exp() * z_noise[k]
            x0 = (z - shift) * scale
            y = torch.where(chance[k] < cfg.label_dropout, null, y.to(device))
            with autocast:
                losses = diffusion_loss(model, cfg.objective, x0, e[k], t[k], y)
            (losses.mean() / steps).backward()
            quarter = (4 * t[k]).long().clamp(max=3)
            quarters[0].index_add_(0, quarter, losses.detach())
            quarters[1].index_add_(0, quarter, torch.ones_like(losses))

        # update
        average_gradients(model)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        opt.step()
        opt.zero_grad()
        update_ema(ema, model, cfg.ema, step)

        # what is due: all processes must agree on it
        done = step + 1
        stop = total(torch.tensor(len(caught))) > 0
        log_due = done % cfg.log_every == 0 or done == cfg.max_steps
        save_due = done % cfg.eval_every == 0 or done == cfg.max_steps
        if (log_due or save_due or stop) and not grad_norm.isfinite():
            sys.exit("error: loss not finite: --resume or restart with a lower --lr or --no-bf16")

        # checkpoint and picture
        if rank == 0 and (save_due or stop):
            began = time.time()
            save(done)
            if save_due and cfg.samples > 0:
                picture(done)
            clock += time.time() - began            # does not count in images/s

        # log
        if log_due:
            sums, counts = total(quarters).tolist()
            row = {"step": done, "loss": sum(sums) / sum(counts), "lr": lr,
                   "norm": grad_norm.item()}
            for k in range(4):
                row[f"loss_t{k + 1}/4"] = sums[k] / max(counts[k], 1)
            row["seconds"] = (time.time() - clock) / (done - logged)
            row["images/s"] = cfg.batch_size / row["seconds"]
            clock = time.time()
            logged = done
            if rank == 0:
                log.write(row, ["loss", "norm", "images/s"])
        if stop:
            wait()                                  # the first process may be saving
            sys.exit(f"stopped, and saved update {done:,} to {file}: go on with --resume")

    print(f"{file}: {cfg.max_steps:,} updates")
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
