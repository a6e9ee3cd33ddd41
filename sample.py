"""Stage three: draw images of given classes or captions from a trained denoiser.

    python sample.py                                        # every class (10 at most), newest run
    python sample.py --class 207 --cfg 5
    python sample.py --class "golden retriever" 980 --sampler heun --steps 25 --interval 0.1 0.8
    python sample.py --prompt "a small blue ring" "a red cross"
    python sample.py --count 50000 --npz samples.npz        # arr_0, arr_1: what FID evaluators read
    torchrun --nproc-per-node 8 sample.py --count 50000 --png samples
    python sample.py --weights DiT-XL-2-256x256.pt --objective ddpm --vae VAE_FILE --class 207 --cfg 4

Uses the averaged weights and decodes in float32. The noise of image i is seeded by (seed, i) alone:
it depends neither on the batch nor on the number of processes.
"""
import argparse, os, pathlib, re, time, zlib

import numpy as np
import torch
from torchvision.models import ResNet50_Weights

import data, diffusion

# ------------------------------------------------------------------------------------------------------------
OUT = ""                    # the run's folder; empty: that of the newest out/*/diffusion.pt
WEIGHTS = ""                # instead of a run: published weights of a DiT or SiT
OBJECTIVE = ""              # one of ddpm, sit; what those weights learned
VAE = ""                    # a vae.pt or published weights to decode with; empty: the run's
SCALE = 0.0                 # from 0; of the latents; 0: the run's, or in the config.json beside --vae
SHIFT = 0.0                 # from -1e6; of the latents
CLASS = ()                  # classes, by index or name; empty: all (10 of them for a grid)
PROMPT = ()                 # captions, of a run with --condition text; empty: those of its validation images
COUNT = 0                   # from 0; images, spread evenly over the classes, 0: 8 of each
CFG = -1.0                  # from -1; guidance scale, 1: none, below 0: as in the run's pictures
STEPS = 0                   # from 0; sampler steps, 0: as in the run's pictures
CHURN = -1.0                # from -1; noise drawn anew in a step, below 0: as in the run's pictures
SAMPLER = "euler"           # one of euler, heun; euler is DDIM on the cosine path, heun twice the work a step
INTERVAL = (0.0, 1.0)       # from 0 to 1; guide only while t, from 1 (noise) to 0 (data), lies within
SEED = 0                    # from 0; image i is a function of (seed, i)
BATCH_SIZE = 64             # from 1; images at a time, at most
PNG = ""                    # folder for numbered files 000000.png instead of the grid; what is there is kept
NPZ = ""                    # file for arr_0 uint8 [n, h, w, 3] and arr_1 int64 [n] instead of the grid
GIF = ""                    # file for the denoising of the grid as an animation
DEVICE = ""                 # cuda, cpu, mps; empty: cuda where there is one
BF16 = None                 # bfloat16 autocast in the denoiser; unset: where it is faster
COMPILE = False             # torch.compile of denoiser and decoder: pays from about a thousand images
# ------------------------------------------------------------------------------------------------------------

def find_class(word, classes):
    """A class's folder name, an index, or one of ImageNet's English names -> the index."""
    names = [name.lower() for name in classes]
    if word.lower() in names:
        return names.index(word.lower())
    if word.isdigit() and int(word) < len(classes):
        return int(word)
    if len(classes) == 1000 and classes[0] == "n01440764":
        names = [name.lower() for name in ResNet50_Weights.DEFAULT.meta["categories"]]
    if word.lower() not in names:
        raise SystemExit(f"error: no class {word!r}: expected an index up to {len(classes) - 1} or a name, "
                         f"{', '.join(classes[:10])}{', ...' * (len(classes) > 10)}")
    return names.index(word.lower())

def main(argv=None):
    cfg = data.settings(globals(), data.flags(globals(), argv))
    device, autocast = data.start(cfg)
    if bool(cfg.weights) != bool(cfg.objective) or (cfg.weights and not cfg.vae):
        raise SystemExit("error: --weights, --objective ddpm or sit, and --vae belong together")
    file = cfg.weights or cfg.out and f"{cfg.out}/diffusion.pt" or data.newest("diffusion.pt", "diffusion.py")
    model, coder, state = diffusion.load(file, device, cfg.objective, cfg.vae)
    run = argparse.Namespace(**state["config"])
    scale, shift = cfg.scale or state["scale"], cfg.shift or state["shift"]
    if not scale:
        raise SystemExit(f"error: no config.json beside {cfg.vae} says the latents' scale: give --scale")
    print(f"taking {file}: {run.model}, {run.objective}, {run.data}, {state['step']:,} updates")

    # what to draw
    if cfg.interval[0] > cfg.interval[1]:
        raise SystemExit("error: --interval takes the lower bound first")
    text, null, as_grid = run.condition == "text", len(run.classes), not (cfg.png or cfg.npz)
    guidance, steps = run.cfg if cfg.cfg < 0 else cfg.cfg, cfg.steps or run.sample_steps
    churn = run.churn if cfg.churn < 0 else cfg.churn
    chosen = [find_class(word, run.classes) for word in getattr(cfg, "class")]
    if text:
        null, chosen = 0, [*cfg.prompt, *(run.classes[k] for k in chosen)]
    for prompt in cfg.prompt:
        if not text or not 0 < len(diffusion.words_of(prompt)) <= diffusion.WORDS:
            raise SystemExit(f"error: --prompt {prompt!r}: 1 to {diffusion.WORDS} words, of a run with text")
    asked, some = bool(chosen), slice(10) if text else slice(None, None, -(-null // 10))
    every = run.prompts if text else list(range(null))
    chosen = chosen or every[some if as_grid else slice(None)]
    count = cfg.count or 8 * len(chosen)
    spread = [i * len(chosen) // count if count < len(chosen) else i % len(chosen) for i in range(count)]
    labels = torch.tensor(range(len(chosen)) if text else chosen)[spread]
    y = diffusion.tokens(chosen)[labels] if text else labels
    shape = run.z_channels, run.side, run.side

    # into which files; a folder of images drawn with the same settings is gone on with
    tag = f"cfg{guidance:g}_{cfg.sampler}{steps}_seed{cfg.seed}"
    tag += "_interval{:g}-{:g}".format(*cfg.interval) if cfg.interval != INTERVAL else ""
    tag += f"_churn{churn:g}" if churn != run.churn else ""
    tag += f"_count{count}" if cfg.count else ""
    name = re.sub(r"\W+", "-", "-".join(map(str, chosen))) if asked else "all"
    name = name if len(name) <= 60 else f"{name[:51]}-{zlib.crc32(name.encode()):08x}"
    grid_file = f"{cfg.out or os.path.dirname(file) or '.'}/grid_{name}_{tag}.png"
    record = pathlib.Path(cfg.png, "settings.txt")
    last = [*state["ema"].values()][-1].sum().item()
    settings = f"{count} of classes {chosen}, {tag}, {state['step']} updates, {last}, {scale:g}, {cfg.vae}\n"
    exist, todo = [made for made in (cfg.png, cfg.npz, cfg.gif) if os.path.exists(made)], list(range(count))
    if cfg.png in exist and record.exists() and record.read_text() == settings:
        exist.remove(cfg.png)
        todo = [i for i in todo if cfg.npz or cfg.gif or not os.path.exists(f"{cfg.png}/{i:06d}.png")]
    exist, todo = data.from_first((exist, todo))
    if exist:
        raise SystemExit(f"error: {exist[0]} exists, perhaps of other settings: name another, or remove it")
    for folder in (cfg.out, cfg.png, os.path.dirname(cfg.npz), os.path.dirname(cfg.gif)):
        os.makedirs(folder or ".", exist_ok=True)
    first_process, frames = data.RANK == 0, steps + 1 if cfg.gif else 1
    if cfg.png and first_process:
        data.replace_file(record, lambda f: f.write(settings.encode()))

    # draw: each round one batch a process, gathered by the first
    if cfg.compile:
        model.compile(dynamic=False)
        coder.decode = torch.compile(coder.decode, dynamic=False)
    kept = count if first_process and (as_grid or cfg.npz or cfg.gif) else 0
    pixels = torch.empty(frames, kept, 3, run.size, run.size, dtype=torch.uint8)
    rounds = -(-len(todo) // (cfg.batch_size * data.WORLD))             # of equal batches, as few as it takes
    batch, began, written = -(-len(todo) // max(1, rounds * data.WORLD)) or 1, time.perf_counter(), []
    with data.threads(os.cpu_count()) as pool:
        for first in range(0, len(todo), batch * data.WORLD):
            places = torch.arange(batch).add(first + data.RANK * batch).clamp(max=len(todo) - 1)
            rows = torch.tensor(todo)[places]
            noise = diffusion.noise_of(rows.tolist(), shape, cfg.seed, device)
            with autocast:
                states = [*diffusion.sample(model, run.objective, noise, y[rows].to(device), null, steps,
                                            guidance, cfg.sampler, cfg.interval, churn)]
            for frame, z in enumerate(states[-frames:]):
                drawn = data.gather(diffusion.decode(coder, z, scale, shift))[:len(todo) - first]
                if kept:
                    pixels[frame, first:first + len(drawn)] = drawn
            if cfg.png and first_process:
                names = [f"{cfg.png}/{i:06d}.png" for i in todo[first:first + len(drawn)]]
                written += [pool.submit(data.write_png, name, image) for name, image in zip(names, drawn)]
            done = min(first + batch * data.WORLD, len(todo))
            rate = done / (time.perf_counter() - began)
            data.say(f"{done:,}/{len(todo):,} images  {rate:.1f} images/s", done == len(todo))
    [image.result() for image in written]       # which raises what went wrong
    if not first_process:
        return

    # write
    columns = len(chosen) if 1 < len(chosen) <= 20 else 8
    if cfg.npz:
        arrays = {"arr_0": pixels[-1].permute(0, 2, 3, 1).numpy(), "arr_1": labels.numpy()}
        data.replace_file(cfg.npz, lambda f: np.savez(f, **arrays))
    if as_grid:
        data.replace_file(grid_file, lambda f: data.grid(pixels[-1], columns).save(f, "png"))
    if cfg.gif:
        pages, times = [data.grid(page, columns) for page in pixels], [60] * steps + [2000]     # milliseconds
        data.replace_file(cfg.gif, lambda f: pages[0].save(f, "gif", save_all=True, append_images=pages[1:],
                                                           duration=times, loop=0))
    made = ", ".join(filter(None, (cfg.png, cfg.npz, as_grid and grid_file, cfg.gif)))
    names = ", ".join(chosen[:10] if text else (run.classes[k] for k in chosen[:10]))
    print(f"{names}, cfg {guidance:g}, {steps} {cfg.sampler} steps, churn {churn:g}: {made}")

if __name__ == "__main__":
    data.guard(main)
