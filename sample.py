"""Stage three: draw images of given classes from a trained denoiser and the VAE it belongs to.

    python sample.py                                        # every class (10 at most), newest run
    python sample.py --class 207 --cfg 5
    python sample.py --class "golden retriever" 980 --sampler heun --steps 25 --interval 0.1 0.8
    python sample.py --n 50000 --npz samples.npz            # arr_0, arr_1: what FID evaluators read
    torchrun --nproc-per-node 8 sample.py --n 50000 --png samples

Uses the averaged weights and decodes in float32. Image i starts from noise seeded by (seed, i) alone:
it depends neither on the batch nor on the number of processes.
"""
import os
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
import diffusion
import vae
from diffusion import CODED_PIXELS, denormalise, first_time, path, velocity

# -------------------------------------------------------------------------------------------------
OUT = ""                    # the run's folder; empty: that of the newest out/*/diffusion.pt
CLASS = ()                  # classes, by index or name; empty: all (10 of them for a grid)
N = 0                       # images, spread evenly over the classes; 0: 8 of each
CFG = -1.0                  # guidance scale, 1: none; below 0: as in the run's pictures
STEPS = 0                   # sampler steps; 0: as in the run's pictures
SAMPLER = "euler"           # one of euler, heun; euler is DDIM on the cosine path, heun twice the work a step
INTERVAL = (0.0, 1.0)       # guide only while t, from 1 (noise) to 0 (data), lies within
SEED = 0                    # image i is a function of (seed, i)
BATCH_SIZE = 64             # images at a time
PNG = ""                    # folder for numbered files 000000.png instead of the grid
NPZ = ""                    # file for arr_0 uint8 [n, h, w, 3] and arr_1 int64 [n] instead of the grid
GIF = ""                    # file for the denoising of the grid as an animation
DEVICE = ""                 # cuda, cpu, mps; empty: cuda where there is one
BF16 = None                 # bfloat16 autocast in the denoiser; unset: where it is faster
COMPILE = False             # torch.compile of the denoiser: pays from about a thousand images
PRESET = "shapes"           # one of shapes, cifar10, imagenet; the models that --bench takes, untrained
BENCH = False               # time encoding, decoding and the sampling of a batch, and stop; writes nothing
# -------------------------------------------------------------------------------------------------


# ---- guidance, sampler, decoder -----------------------------------------------------------------

def guided(model, objective, x, t, y, cfg, null):
    """Classifier-free guidance (Ho and Salimans 2022): v_u + cfg (v_c - v_u), both halves in one batch."""
    if cfg == 1:
        return velocity(model, objective, x, t, y)
    both = velocity(model, objective, x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, null)]))
    v_c, v_u = both.chunk(2)
    return v_u + cfg * (v_c - v_u)


@torch.no_grad()
def sample(model, objective, x, y, null, steps=50, cfg=1.0, sampler="euler", interval=(0.0, 1.0)):
    """Integrate from noise x [b, c, h, w] to data -> yields x after every step; the last is the sample.

    Holding (x0, e) over a step is exact Euler on the straight line and DDIM (Song et al. 2021) on the
    circle; heun averages the velocity with that at the step's end. Guidance acts for t in `interval`
    (Kynkaanniemi et al. 2024). The state stays float32.
    """
    times = torch.linspace(first_time(objective), 0, steps + 1, device=x.device)

    def v_at(x, t):
        return guided(model, objective, x, t.expand(len(x)), y, cfg if interval[0] <= t <= interval[1] else 1, null)

    for t, s in zip(times[:-1], times[1:]):
        (a, b, da, db), (a_s, b_s, da_s, db_s) = path(objective, t), path(objective, s)
        v = v_at(x, t)
        if sampler == "heun" and s > 0:
            x_s = a_s * (db * x - b * v) + b_s * (a * v - da * x)
            v_s = v_at(x_s, s)
            x0, e = db_s * x_s - b_s * v_s, a_s * v_s - da_s * x_s
            v = (v + da * x0 + db * e) / 2
        x = a_s * (db * x - b * v) + b_s * (a * v - da * x)
        yield x


def start_noise(count, shape, seed, first=0):
    """Noise [count, *shape] on the CPU; image i has a generator of its own, seeded by (seed, i)."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed * 10_000_019 + i))
                        for i in range(first, first + count)])


def decode(coder, z, scale):
    """The denoiser's latents [n, c, h, w] -> images uint8 [n, 3, f*h, f*w], decoded in float32, a few at a time."""
    few = max(1, CODED_PIXELS // (coder.factor * z.shape[-1]) ** 2)
    return torch.cat([data.to_uint8(coder.decode(denormalise(part, scale))) for part in z.split(few)])


# ---- what to draw with and what to draw ---------------------------------------------------------

def load_denoiser(path, device="cpu"):
    """A trained denoiser with its averaged weights and the VAE it belongs to -> (denoiser, VAE, checkpoint)."""
    state = data.load_checkpoint(path, "diffusion.py")
    model = diffusion.build(SimpleNamespace(**state["config"]))
    model.load_state_dict(state["ema"])
    coder, _ = vae.load_vae(os.path.join(os.path.dirname(path), state["vae"]), device)
    if diffusion.fingerprint(coder) != state["vae_fingerprint"]:
        raise SystemExit(f"error: {path} was trained on another VAE than {os.path.join(os.path.dirname(path), state['vae'])}, "
                         f"whose weights have changed since: train diffusion.py again, or put the old vae.pt back")
    return model.to(device).eval().requires_grad_(False), coder, state


def find_class(word, classes):
    """An index, a class's folder name, or one of ImageNet's English names -> the index."""
    if word.isdigit() and int(word) < len(classes):
        return int(word)
    names = [name.lower() for name in classes]
    if len(classes) == 1000 and classes[0] == "n01440764" and word.lower() not in names:
        from torchvision.models import ResNet50_Weights
        names = [name.lower() for name in ResNet50_Weights.DEFAULT.meta["categories"]]
    if word.lower() not in names:
        listed = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise SystemExit(f"error: no class {word!r}: expected an index from 0 to {len(classes) - 1} or a name among {listed}")
    return names.index(word.lower())


def bench(cfg):
    """Time the encoder and the decoder on 8 images, and the sampling of a batch, with untrained models of the preset."""
    _, _, device, autocast = data.start(cfg)
    run, vae_run = (data.settings(vars(script), {}, cfg.preset) for script in (diffusion, vae))
    coder = vae.build(vae_run).to(device).requires_grad_(False)
    run.classes, run.z_channels, run.side = range(1000), coder.z_channels, vae_run.size // coder.factor
    peak, z_shape = vae.peak_flops(device, cfg.bf16), (run.z_channels, run.side, run.side)

    for name, code, shape in (("encoding", vae.VAE.encode, (8, 3, vae_run.size, vae_run.size)), ("decoding", vae.VAE.decode, (8, *z_shape))):
        clock, given = vae.Bench(True, device), torch.rand(shape, device=device)
        for _ in range(8):
            with autocast, torch.no_grad():
                code(coder, given)
            clock.part(name, last=True)
        clock.report(name, len(given), vae.count_flops(lambda: code(vae.build(vae_run), torch.empty(shape))), peak)

    model, clock = diffusion.build(run).to(device).requires_grad_(False), vae.Bench(True, device)
    denoise = torch.compile(model) if cfg.compile else model
    steps, guidance, n = cfg.steps or run.sample_steps, run.cfg if cfg.cfg < 0 else cfg.cfg, cfg.batch_size
    for _ in range(6):
        x, y = start_noise(n, z_shape, cfg.seed).to(device), torch.arange(n, device=device)
        clock.part("noise")
        with autocast:
            *_, z = sample(denoise, run.objective, x, y, 1000, steps, guidance, cfg.sampler, cfg.interval)
        clock.part("denoiser")
        decode(coder, z, 1.0)
        clock.part("decoder", last=True)
    calls = (2 * steps - 1 if cfg.sampler == "heun" else steps) * (1 + (guidance != 1))
    flops = calls * vae.count_flops(lambda: diffusion.build(run)(torch.empty(x.shape), torch.zeros(n), torch.zeros(n).long()))
    flops += vae.count_flops(lambda: vae.build(vae_run).decode(torch.empty(z.shape)))
    clock.report(f"sampling, {steps} {cfg.sampler} steps at cfg {guidance:g}", n, flops, peak)


def main(argv=None):
    cfg = data.settings(globals(), data.flags(globals(), argv))
    if cfg.bench:
        return bench(cfg)
    rank, world, device, autocast = data.start(cfg)
    checkpoint = os.path.join(cfg.out, "diffusion.pt") if cfg.out else data.newest("diffusion.pt", "diffusion.py")
    model, coder, state = load_denoiser(checkpoint, device)
    run = SimpleNamespace(**state["config"])
    print(f"taking {checkpoint}: {run.model}, {run.objective}, {state['step']:,} updates on {run.data}")
    guidance, steps = run.cfg if cfg.cfg < 0 else cfg.cfg, cfg.steps or run.sample_steps
    null, files = len(run.classes), bool(cfg.png or cfg.npz)
    chosen = [find_class(word, run.classes) for word in getattr(cfg, "class")] or list(range(null))
    if not getattr(cfg, "class") and not files:
        chosen = chosen[::-(-null // 10)]
    n = cfg.n or 8 * len(chosen)
    labels = torch.tensor([chosen[i * len(chosen) // n] if n < len(chosen) else chosen[i % len(chosen)] for i in range(n)])
    if cfg.compile:
        model = torch.compile(model)

    # one file that all processes fill: frames x images (a single frame without --gif)
    name = "all" if not getattr(cfg, "class") else "-".join(str(k) for k in chosen[:5])
    grid_file = os.path.join(os.path.dirname(checkpoint), f"grid_{name}_cfg{guidance:g}_{cfg.sampler}{steps}_seed{cfg.seed}.png")
    for made in (cfg.png, cfg.npz, cfg.gif):
        if made and os.path.exists(made):
            raise SystemExit(f"error: {made} exists: name another, or remove it")
    canvas_file, frames = f"{cfg.npz or grid_file}.part.npy", steps + 1 if cfg.gif else 1
    if rank == 0:
        for folder in (cfg.png, os.path.dirname(cfg.npz), os.path.dirname(cfg.gif)):
            os.makedirs(folder or ".", exist_ok=True)
        data.new_array(canvas_file, np.uint8, (frames, n, run.size, run.size, 3))
    data.barrier()
    try:
        canvas = np.load(canvas_file, mmap_mode="r+")
        for first in range(rank * cfg.batch_size, n, world * cfg.batch_size):
            rows = slice(first, min(first + cfg.batch_size, n))
            x = start_noise(rows.stop - first, (run.z_channels, run.side, run.side), cfg.seed, first).to(device)
            y = labels[rows].to(device)
            with autocast:
                states = [x, *sample(model, run.objective, x, y, null, steps, guidance, cfg.sampler, cfg.interval)]
            for frame, z in enumerate(states[-frames:]):
                canvas[frame, rows] = decode(coder, z, state["scale"]).permute(0, 2, 3, 1).cpu().numpy()
            for i in range(first, rows.stop) if cfg.png else ():
                data.replace_file(os.path.join(cfg.png, f"{i:06d}.png"), lambda f: Image.fromarray(canvas[-1, i]).save(f, "png"))
            print(f"\r{min(first + world * cfg.batch_size, n):,}/{n:,} images", end="")
        data.barrier()
        if rank == 0:
            columns = len(chosen) if 1 < len(chosen) <= 20 else 8
            if cfg.npz:
                data.replace_file(cfg.npz, lambda f: np.savez(f, arr_0=canvas[-1], arr_1=labels.numpy()))
            if not files:
                data.save_grid(grid_file, torch.from_numpy(canvas[-1]).permute(0, 3, 1, 2), columns)
            if cfg.gif:
                pages = [Image.fromarray(data.grid(torch.from_numpy(page).permute(0, 3, 1, 2), columns)) for page in canvas]
                data.replace_file(cfg.gif, lambda f: pages[0].save(f, "gif", save_all=True, append_images=pages[1:],
                                                                   duration=[60] * (frames - 1) + [2000], loop=0))
            print(f"\rclasses {', '.join(run.classes[k] for k in chosen[:10])}, cfg {guidance:g}, {steps} {cfg.sampler} steps: "
                  + ", ".join(made for made in (cfg.png, cfg.npz, "" if files else grid_file, cfg.gif) if made))
    finally:
        if rank == 0:
            os.remove(canvas_file)


if __name__ == "__main__":
    data.guard(main)
