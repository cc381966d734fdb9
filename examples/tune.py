"""The whole method on one clip: tune, invert, sample.

    python examples/tune.py --model=sd14 --clip=man-skiing.mp4 --prompt="a man is skiing" \
        --edit="spider man is skiing on the beach" --edit="a panda is skiing"
"""

import argparse
from pathlib import Path

from tav_jax import TuneAVideo, load_video


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a pretrained Stable Diffusion on one clip and edit the clip.")
    parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4", help="directory, hub id or bucket path")
    parser.add_argument("--clip", required=True, help="video file")
    parser.add_argument("--prompt", required=True, help="description of the clip")
    parser.add_argument("--edit", action="append", required=True, help="prompt of an edit; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("edits"), help="directory for the videos")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tuning-steps", type=int, default=500)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=12.5)
    args = parser.parse_args()

    tav = TuneAVideo.from_pretrained(args.model, dtype=args.dtype)
    clip = load_video(args.clip, frames=args.frames, stride=args.stride, size=tuple(args.size))
    result = tav.tune(clip, args.prompt, steps=args.tuning_steps)
    print(f"mean loss of the last 10 steps: {result.losses[-10:].mean():.4f}")

    noise = tav.invert(clip, steps=args.sampling_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    for i, edit in enumerate(tav.sample(args.edit, latents=noise, steps=args.sampling_steps, guidance=args.guidance)):
        print("wrote", edit.save(args.out / f"edit-{i}.mp4"))


if __name__ == "__main__":
    main()
