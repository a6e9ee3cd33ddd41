"""Stage three: draw images of given classes or captions from a trained denoiser.

    python sample.py                                        # a grid, ten classes, the newest run
    python sample.py --class 207 --cfg 5
    python sample.py --class "golden retriever" tench --steps 50 --interval 0.1 0.8
    python sample.py --prompt "a small blue ring" "a red cross"
    python sample.py --gif denoising.gif
    torchrun --nproc-per-node 8 sample.py --count 50000 --npz samples.npz       # for FID

Uses the averaged weights. Image i depends on (seed, i) and its label, not on the batch size or the
number of processes. All go into the run's folder, under names that tell one setting from another.
"""
import argparse
import os
import re
import sys
import unicodedata
import zlib

import numpy as np
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

import data
import diffusion
from vae import load_checkpoint, load_vae, newest, setup, wait

def settings(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--out", default="", help="the run's folder; empty: of the newest out/*/diffusion.pt")
    flag("--vae", default="", help="a vae.pt to decode with; empty: the run's")
    flag("--class", dest="named", nargs="+", default=[], help="by name or index; empty: ten or all")
    flag("--prompt", nargs="+", default=[], help="captions, for a run with --condition text")
    flag("--cfg", type=float, help="guidance scale, 1: none; by default as in the run's pictures")
    flag("--steps", type=int, help="of the sampler; likewise")
    flag("--churn", type=float, help="noise drawn anew in a step; likewise")
    flag("--interval", type=float, nargs=2, default=[0.0, 1.0], help="guide only while t is within")
    flag("--seed", type=int, default=0, help="image i is a function of (seed, i)")
    flag("--count", type=int, default=0, help="numbered files instead of a grid, by class in turn")
    flag("--npz", default="", help="with --count: a file of all, arr_0 [n, h, w, 3] and arr_1 [n]")
    flag("--gif", default="", help="a file for the denoising of the grid as an animation")
    flag("--batch-size", type=int, default=64, help="images that a process draws at a time")
    flag("--device", help="cuda, cpu, mps; by default cuda where there is one")
    flag("--bf16", action=argparse.BooleanOptionalAction, help="by default where it is faster")
    flag("--compile", action="store_true", help="pays from about a thousand images")
    cfg = parser.parse_args(argv)
    if (cfg.npz and not cfg.count) or (cfg.gif and cfg.count):
        sys.exit("error: --npz takes --count, and --gif a grid")
    for file in (cfg.npz, cfg.gif):
        if os.path.exists(file):
            sys.exit(f"error: {file} exists: remove it, or name another")
    return cfg

def find_class(word, classes):
    """A class by its name, as typed or else without regard to case, or by its index; ImageNet's
    also by their English names. If several classes have the name, they are listed, and it ends."""
    english = classes
    if len(classes) == 1000 and classes[0] == "n01440764":
        english = ResNet50_Weights.DEFAULT.meta["categories"]
    for spelled in (str, str.casefold):             # as typed, then without regard to case
        typed = spelled(unicodedata.normalize("NFC", word))
        found = [k for k, names in enumerate(zip(classes, english))
                 if typed in [spelled(unicodedata.normalize("NFC", name)) for name in names]]
        if len(found) > 1:
            both = ", ".join(f"{k} ({classes[k]}, {english[k]})" for k in found)
            sys.exit(f"error: --class {word} may be {both}: give the number")
        if found:
            return found[0]
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    sys.exit(f"error: no class {word}: expected a number up to {len(classes) - 1}, or a name like "
             f"{', '.join(classes[:10])}")

def pack(folder, labels, file):
    """Numbered images -> arr_0 uint8 [n, h, w, 3] and arr_1, their labels, as evaluators read"""
    images = [np.asarray(Image.open(f"{folder}/{i:06d}.png")) for i in range(len(labels))]
    with open(file, "wb") as whole:                 # savez would add .npz to a name without it
        np.savez(whole, arr_0=np.stack(images), arr_1=np.array(labels))

def main(argv=None):
    cfg = settings(argv)
    rank, world, device, autocast, compiled = setup(cfg)
    file = f"{cfg.out}/diffusion.pt" if cfg.out else newest("diffusion.pt")
    model, vae, state = diffusion.load_run(file, device)
    if cfg.vae:
        vae = load_vae(load_checkpoint(cfg.vae)).to(device)
    if compiled:
        model.compile(dynamic=False)
        vae.decode = torch.compile(vae.decode, dynamic=False)
    run = argparse.Namespace(**state["config"])
    guidance = run.cfg if cfg.cfg is None else cfg.cfg
    steps = cfg.steps or run.sample_steps
    churn = run.churn if cfg.churn is None else cfg.churn
    print(f"taking {file}: {run.model}, {run.objective}, {state['step']:,} updates")

    # what to draw
    classes = state["classes"]
    chosen = [find_class(word, classes) for word in cfg.named]
    if run.condition == "text":
        names = cfg.prompt + [classes[k] for k in chosen]
        names = names or state["prompts"][:None if cfg.count else 10]
        for name in cfg.prompt:
            if not 0 < len(diffusion.words_of(name)) <= diffusion.WORDS:
                sys.exit(f"error: the prompt {name!r} has not 1 to {diffusion.WORDS} words")
        y = diffusion.tokenize(names)
        null = diffusion.tokenize([""]).to(device)
    else:
        if cfg.prompt:
            sys.exit(f"error: {file} was not trained with --condition text: give --class")
        every = 1 if cfg.count else max(1, len(classes) // 10)
        chosen = chosen or list(range(0, len(classes), every))[:None if cfg.count else 10]
        names = [classes[k] for k in chosen]
        y = torch.tensor(chosen)
        null = torch.tensor([len(classes)], device=device)
    count = cfg.count or 8 * len(names)
    turns = [i % len(names) for i in range(count)]

    # where to: the name has a hash of all that decides on an image
    recipe = [names, guidance, steps, churn, cfg.interval, cfg.seed, cfg.bf16]
    some = re.sub(r"\W+", "-", "-".join(names))[:40] if cfg.prompt or cfg.named else "all"
    code = zlib.crc32(f"{recipe}".encode())
    for weights in [*state["ema"].values(), *vae.decoder.parameters()]:
        code = zlib.crc32(weights.cpu().numpy().tobytes(), code)
    some += f"_{state['step']}_cfg{guidance:g}_steps{steps}_seed{cfg.seed}_{code:08x}"
    made = f"{os.path.dirname(file) or '.'}/{'samples' if cfg.count else 'grid'}_{some}"

    @torch.no_grad()
    def draw(rows):
        """-> images uint8 [n, 3, h, w] of the last step, or for --gif of every step"""
        noise = diffusion.noise_by_row(rows, state["shape"], cfg.seed, device)
        labels = y[[turns[i] for i in rows]].to(device)
        states = []
        with autocast:
            for z in diffusion.sample(model, run.objective, noise, labels, null, steps, guidance,
                                      churn, cfg.interval):
                states = (states if cfg.gif else []) + [z]
        return [diffusion.decode(vae, z, state["scale"], state["shift"]).cpu() for z in states]

    if cfg.count:
        # numbered files: each process draws its own, but none that is there
        os.makedirs(made, exist_ok=True)
        todo = [i for i in range(rank, count, world) if not os.path.exists(f"{made}/{i:06d}.png")]
        for k in range(0, len(todo), cfg.batch_size):
            rows = todo[k:k + cfg.batch_size]
            for i, pixels in zip(rows, draw(rows)[-1]):
                png = f"{made}/{i:06d}.png"
                data.to_image(pixels).save(f"{png}.part", "png")
                os.replace(f"{png}.part", png)                      # what has its name is whole
            print(f"{k + len(rows):,}/{len(todo):,} images")
        wait()
        if cfg.npz and rank == 0:
            # the labels; of captions their numbers
            pack(made, turns if run.condition == "text" else y[turns].tolist(), cfg.npz)
    else:
        # a grid, one column a class
        batches = torch.arange(count).split(cfg.batch_size)
        drawn = [draw(rows.tolist()) for rows in batches]
        frames = [torch.cat(parts) for parts in zip(*drawn)]        # one a step
        columns = len(names) if len(names) > 1 else 8
        pictures = [data.grid(pixels, columns) for pixels in frames]
        made += ".png"
        pictures[-1].save(made)
        if cfg.gif:
            pictures[0].save(cfg.gif, "gif", save_all=True, append_images=pictures[1:], duration=60,
                             loop=0)

    print(f"{', '.join(names[:10])}, cfg {guidance:g}, {steps} steps, churn {churn:g}: "
          f"{made} {cfg.npz}{cfg.gif}")

if __name__ == "__main__":
    main()
