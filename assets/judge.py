"""Makes the figures of README anew: how good are a run's pictures, and what was its pace?

    python assets/judge.py shapes                       # of out/shapes; --run names another folder
    python assets/judge.py words --cfg 3 --seed 1       # flags unknown here are sample.py's
    python assets/judge.py cifar10 --count 5000
    python assets/judge.py cifar10 --npz samples.npz    # of images that are there; or --png FOLDER
    python assets/judge.py speed --run out/imagenet     # by its logs

The first three train a classifier, the judge, and keep it beside the run's folder. They print, for
validation images, reconstructions and samples, the share that the judge finds right, the Frechet
distance of its features to those of 10,000 real images (Heusel et al. 2017), and the sliced
Wasserstein distance of patches to those of as many real images, times 1000: its mean and those of a
Laplacian pyramid's levels, finest first (Karras et al. 2018). Only compare equal numbers of images.
"""
import argparse
import sys
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import RandomCrop

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import diffusion
import sample
import vae

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = DEVICE.type == "cuda" or torch.cpu._is_avx512_bf16_supported()

def conv(c_in, c_out, stride=1):
    layer = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())

def build(photos, answers):
    """-> a classifier at 32x32 of two layers: images to 512 features, and these to logits"""
    torch.manual_seed(0)
    if photos:
        body = ResNet(BasicBlock, [1, 1, 1, 1])
        body.conv1 = nn.Conv2d(3, 64, 3, 2, padding=1)      # the images are small
        body.maxpool = nn.Identity()
        body.fc = nn.Identity()
    else:
        body = nn.Sequential(conv(3, 32), conv(32, 64, 2), conv(64, 64), conv(64, 128, 2),
                             conv(128, 128, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(body, nn.Linear(512, answers)).to(DEVICE)

def to_32(pixels):
    x = data.to_float(pixels.to(DEVICE))
    return F.avg_pool2d(x, x.shape[-1] // 32)

def fit(judge, photos, sizes, pixels, labels):
    """labels [n, questions]; question k has sizes[k] answers, and -100 is none"""
    steps = (5 if photos else 6) * len(pixels) // 128
    opt = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    shift = RandomCrop(32, 4, padding_mode="reflect")
    batches = data.micro_batches(len(pixels), 128, 0, 0, 1, 1)
    for step, rows in zip(range(1, steps + 1), batches):
        x = to_32(pixels[rows])
        if photos:
            x = shift(x.flip(3) if step % 2 else x)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=photos and BF16):
            logits = judge(x).float().split(sizes, 1)
        answers = labels[rows].to(DEVICE).unbind(1)
        loss = sum(map(F.cross_entropy, logits, answers))
        loss.backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
        if step % 100 == 0:
            print(f"judge: step {step:,}/{steps:,}, loss {loss.item():.3f}", flush=True)

def look(judge, sizes, pixels):
    """-> features [n, 512], answers [n, questions]"""
    features = torch.cat([judge[0](to_32(part)) for part in pixels.split(500)])
    logits = judge[1](features).split(sizes, 1)
    answers = torch.stack([part.argmax(1) for part in logits], 1)
    return features.double().cpu(), answers.cpu()

def frechet(a, b):
    """Of features [n, width] as Gaussians: |mean - mean|^2 + tr(S + T - 2 (S T)^(1/2))"""
    s = torch.cov(a.T)
    t = torch.cov(b.T)
    root = torch.linalg.eigvals(s @ t).real.clamp(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * root).item()

def blur(x):
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(line, line).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), kernel, groups=3)

def patches(pixels):
    """For each level 128 patches of 7x7 of every image [128 n, 147], mean 0 and std 1 by channel"""
    x = pixels.float()
    while x.shape[-1] >= 16:
        small = blur(x)[:, :, ::2, ::2]
        if x.shape[-1] >= 32:                   # the last level is what is left
            spread = torch.zeros_like(x)
            spread[:, :, ::2, ::2] = 4 * small
            x = x - blur(spread)
        image = torch.arange(len(x)).repeat_interleave(128)
        top, left = torch.randint(x.shape[-1] - 6, (2, len(image)))
        found = x.unfold(2, 7, 1).unfold(3, 7, 1)[image, :, top, left]
        std, mean = torch.std_mean(found, (0, 2, 3), keepdim=True)
        yield ((found - mean) / std).flatten(1)
        x = small

def sliced_wasserstein(a, b):
    """In order along a random line, how far apart are the patches of as many images each?"""
    torch.manual_seed(0)
    for pair in zip(patches(a[:len(b)]), patches(b[:len(a)])):
        both = torch.stack(pair)
        distances = []
        for lines in F.normalize(torch.randn(4, 128, 147), 2):
            along_a, along_b = np.sort((lines @ both.mT).numpy())       # faster than torch's
            distances.append(np.abs(along_a - along_b).mean())
        yield 1000 * np.mean(distances)

def read(dataset, rows):
    """-> uint8 [n, 3, s, s]"""
    parts = [rows[k:k + 500] for k in range(0, len(rows), 500)]
    return torch.cat([pixels for pixels, _ in data.prefetch(dataset.__getitem__, parts, 8)])

def read_drawn(path):
    """What sample.py drew, a file or a folder of ten classes -> uint8 [n, 3, s, s], labels [n]"""
    if path.endswith(".npz"):
        images, labels = np.load(path).values()
    else:
        files = sorted(Path(path).glob("*.png"))
        images = np.stack([data.read_image(file) for file in files])
        labels = np.arange(len(images)) % 10
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels

def attributes(dataset, kinds):
    """Which name of each kind the captions of `shapes` have, [n, kinds]; -100 is none"""
    found = torch.full((len(dataset), len(kinds)), -100)
    for i in range(len(dataset)):
        caption = f"{dataset.caption(i)} "
        for k, names in enumerate(kinds):
            for name in sorted(names, key=len):             # the longest that fits is the last
                if f" {name} " in caption:
                    found[i, k] = names.index(name)
    return found

def judge_images(args, flags):
    # what is to be learned, and which images: of ten classes in turns, or of 500 captions
    state = vae.load_checkpoint(f"{args.run}/diffusion.pt")
    run = state["vae_config"]
    train, val = data.load(args.data or run["data"], run["size"])
    kinds = [train.classes]
    learned = torch.as_tensor(train.targets)[:, None]
    known = torch.as_tensor(val.targets)[:, None]
    rows = known[:, 0].argsort(stable=True).view(10, -1).T.flatten()[:args.count].tolist()
    if args.what == "words":
        kinds = [["small", "large"], data.COLOURS, train.classes, data.PLACES]
        learned = attributes(train, kinds)
        known = attributes(val, kinds)
        rows = (known >= 0).all(1).nonzero()[:500, 0].tolist()
        flags = [*flags, "--prompt", *map(val.caption, rows)]
    labels = known[rows]

    # those images, reconstructions, samples
    pixels = read(val, rows)
    model = vae.load_vae(state).to(DEVICE)
    recon = [model(data.to_float(part).to(DEVICE), 0.0)[0] for part in pixels.split(50)]
    recon = data.to_uint8(torch.cat(recon)).cpu()
    file = args.drawn or f"{args.run}/judged.npz"
    if not args.drawn:
        Path(file).unlink(missing_ok=True)
        sample.main(["--out", args.run, "--count", str(len(rows)), "--npz", file, *flags])
    drawn, asked = read_drawn(file)
    images = {"validation images": (pixels, labels), "reconstructions": (recon, labels),
              "samples": (drawn, labels[asked])}

    # the judge
    photos = args.what == "cifar10"
    sizes = [len(names) for names in kinds]
    judge = build(photos, sum(sizes))
    file = Path(args.run).parent / f"judge_{args.what}.pt"
    if not file.exists():
        fit(judge, photos, sizes, read(train, range(len(train))), learned)
        torch.save(judge.state_dict(), file)
    judge.load_state_dict(vae.load_checkpoint(file))
    judge.eval().requires_grad_(False)

    # what to compare with: photographs that it has learned from it knows too well
    real = read(val if photos else train, np.random.default_rng(0).permutation(10_000))
    compared, _ = look(judge, sizes, real)
    for name, (pixels, labels) in images.items():
        features, found = look(judge, sizes, pixels)
        right = (found == labels).all(1).float().mean()
        levels = list(sliced_wasserstein(pixels, real))
        print(f"{len(pixels):,} {name}: {right:.1%} right, "
              f"Frechet {frechet(features, compared):.3f}, "
              f"SWD {np.mean(levels):.2f} ({', '.join(f'{x:.2f}' for x in levels)})")

def vae_update(state, cfg):
    """Both players' passes for one image."""
    model = vae.build(cfg)
    discriminator = vae.Discriminator(cfg.size, cfg.disc_width)
    x = torch.empty(1, 3, cfg.size, cfg.size)
    recon, _, _ = model(x, 0.0)
    discriminator(torch.cat([x, recon.detach()]))[0].sum().backward()
    discriminator.requires_grad_(False)
    (recon.sum() + discriminator(recon)[0].sum()).backward()

def diffusion_update(state, cfg):
    model = diffusion.build(cfg, *state["shape"][:2], len(state["classes"]))
    words = [diffusion.WORDS] if cfg.condition == "text" else []
    y = torch.zeros(1, *words, dtype=torch.long)
    model(torch.empty(1, *state["shape"]), torch.empty(1), y).sum().backward()

def judge_speed(args, _):
    """The median pace of a run on one device; its FLOPs are counted, not done again."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(n, n, device=DEVICE, dtype=dtype)
        seconds += timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=5)
    product = 2 * n ** 3 / min(seconds)
    for file in sorted(Path(args.run).glob("*.csv")):
        log = np.genfromtxt(file, delimiter=",", names=True, deletechars="")
        pace = np.nanmedian(log["images/s"])
        state = vae.load_checkpoint(file.with_suffix(".pt"))
        update = {"vae": vae_update, "diffusion": diffusion_update}[file.stem]
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            update(state, argparse.Namespace(**state["config"]))
        reached = pace * counter.get_total_flops()
        print(f"{file.stem}: {pace:.4g} images/s, {reached / 1e12:.3g} TFLOP/s, "
              f"{reached / product:.0%} of a large product's {product / 1e12:.3g}")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    flag = parser.add_argument
    flag("what", choices=["shapes", "words", "cifar10", "speed"])
    flag("--run", default="", help="a run's folder; empty: out/<what>, for speed out/shapes")
    flag("--count", type=int, default=1000, help="images to judge; of words 500")
    flag("--data", default="", help="the images; empty: where the run had them")
    flag("--npz", "--png", dest="drawn", help="a file or folder of sample.py's to judge instead")
    args, others = parser.parse_known_args()
    args.run = args.run or f"out/{args.what}".replace("speed", "shapes")
    judge = judge_speed if args.what == "speed" else judge_images
    judge(args, others)
