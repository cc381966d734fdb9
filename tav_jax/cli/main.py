"""The command `tav`: its parser and its error messages. An internal error has a traceback and exit status 1."""

import argparse
import errno
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tav_jax import __version__
from tav_jax.cli import terminal
from tav_jax.distributed import processes
from tav_jax.errors import TavError
from tav_jax.evaluation import CAPTION_MODEL, CLIP_MODEL, PICK_MODEL
from tav_jax.training import environment

DESCRIPTION = "One-shot video tuning on JAX: from one clip and one sentence to edited clips."
SETTINGS = """\
settings:
  --config=NAME                a config that comes with the package, such as man_skiing; the default is the paper's
                               settings
  --config=FILE                a file with a get_config(), a run's config.json, to repeat it in another --workdir, or a
                               YAML config of the official code
  --config.NAME=VALUE          one setting, such as --config.clip.path=man.mp4 --config.clip.prompt="a man is skiing"
                               --config.train.steps=300 --config.edit.prompts="('spider man is skiing',)"
"""
STATUS = """
exit status:
  0    finished
  2    an error that you can fix; the message says how
  75   stopped by SIGTERM or Ctrl-C after the current step, with a checkpoint: run the same command to continue
  130  stopped immediately by a second Ctrl-C; finished checkpoints are kept
"""
EXAMPLES = """\
examples:
  tav demo   --out=demo
  tav train  --config=man_skiing --workdir=runs/ski
  tav edit   --workdir=runs/ski --prompt="spider man is skiing on the beach, cartoon style"
  tav web    --workdir=runs
  tav score  --workdir=runs/ski --clip
  tav export --workdir=runs/ski --out=spider-ski --push=user/spider-ski
  tav plan   --config=man_skiing --topology=v5e-8
"""
SCORE = """\
Score edits: all edits of a run, one video, or a submission to the LOVEU-TGVE 2023 challenge. flicker, and the PSNR of
the background outside of a mask, need no weights; --clip adds clip_text, clip_frame, temporal_consistency and
frame_accuracy, --pick PickScore. The scores of a run are added to its index.html, and written to scores.json beside
the videos.
"""
PLAN = """\
Compile the programs of a run with the TPU compiler, without a TPU. Reports the memory of each program, the shortest
possible time of a step and the communication between chips. Needs neither weights nor a clip. Compiling a program at
full size takes minutes; reports are cached.
"""
WEB = """\
Serve a page on which you upload a clip, tune on it, watch the loss and previews, edit, compare and download.

It runs `tav train` and `tav edit` for you, one at a time, and shows their command lines: use it to try prompts and
options, and the commands for scripts, several hosts, buckets and settings that the page does not have. A job goes on
if the page is closed or the server ends. Only this machine can reach the page, unless --host or --share say otherwise;
then a password is needed, and one is made if none is given.
"""


class HelpConfig(argparse.Action):
    """Prints all settings and exits, whatever else is on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from tav_jax.cli.settings import list_settings

        print(list_settings())
        parser.exit()


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="tav", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"tav_jax {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="run the whole method on a small embedded model, without downloads",
        description="Run the whole method on a small embedded model, without downloads: draw a clip, tune on it, "
        "invert it, sample edits, and write a page with the results. Takes a few minutes on two cores.",
    )
    demo.add_argument("--out", default="tav-demo", help="a new or empty directory (default: %(default)s)")
    demo.add_argument("--prompt", action="append", default=[], help="a prompt of your own; may be repeated")
    demo.add_argument("--clip", type=int, help="number of the clip to draw")
    demo.add_argument("--steps", type=int, help="tuning steps")
    demo.add_argument("--seed", type=int, help="random seed (default: 0)")

    summary = "tune on a clip; the same command continues a run"
    train = commands.add_parser(
        "train", help=summary, description=f"{summary.capitalize()}.", epilog=SETTINGS + STATUS, formatter_class=raw
    )
    help_config = {"action": HelpConfig, "nargs": 0, "help": "list all settings with defaults and meanings, and exit"}
    train.add_argument("--help-config", **help_config)
    train.add_argument("--workdir", required=True, help="the directory of the run, local or in a bucket (gs://…)")
    debug_nans = "run with jax_debug_nans, which is slow, and name the first operation that gives a NaN"
    train.add_argument("--debug-nans", action="store_true", help=debug_nans)

    summary = "sample edited clips from a tuned run"
    details = "All prompts share one inversion and one compilation."
    edit = commands.add_parser("edit", help=summary, description=f"{summary.capitalize()}. {details}")
    edit.add_argument("--workdir", required=True, help="the directory of a `tav train` run")
    edit.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    edit.add_argument("--step", type=int, help="use the checkpoint of this step (default: the newest)")
    edit.add_argument("--clip", help="the clip of the run, if its file has moved (default: where it was)")
    edit.add_argument("--out", help="directory for the videos (default: WORKDIR/edits)")
    edit.add_argument("--negative-prompt", help="what to avoid (default: the config's)")
    edit.add_argument("--sampler", help="ddim, or dpm++2m, which needs 20 to 25 steps (default: the config's)")
    edit.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: the config's, 12.5)")
    strength = "share of the sampling steps that use the prompt; a smaller one changes less (default: the config's, 1)"
    edit.add_argument("--strength", type=float, help=strength)
    edit.add_argument("--steps", type=int, help="sampling steps, at most the inversion's (default: the config's, 50)")
    edit.add_argument("--inversion-steps", type=int, help="inversion steps (default: the config's, 50)")
    edit.add_argument("--inversion-prompt", metavar="TEXT", help="prompt of the inversion (default: the config's, '')")
    iterations = "fixed-point iterations of an inversion step; 3 to 5 reconstruct better (default: the config's, 1)"
    edit.add_argument("--inversion-iterations", type=int, metavar="N", help=iterations)
    window = "for long clips: sample overlapping windows of so many frames, in the memory of one; 16 4 is usual"
    edit.add_argument("--window", type=int, nargs=2, metavar=("FRAMES", "STRIDE"), help=window)
    reuse = "compute the whole UNet only every K steps: 2 is faster, at a loss of quality (default: the config's, 1)"
    edit.add_argument("--feature-reuse", type=int, metavar="K", help=reuse)
    edit.add_argument("--no-inversion", action="store_true", help="start from random noise, not from the inverted clip")
    seed = "seed of the random noise, with --no-inversion; may be repeated (default: 0)"
    edit.add_argument("--seed", type=int, action="append", default=[], help=seed)
    edit.add_argument("--gif", action="store_true", help="write GIFs, not MP4s")
    edit.add_argument("--force", action="store_true", help="overwrite existing videos")

    source = edit.add_argument_group(
        "keep more of the source",
        "Off by default. The source is denoised beside the edits, which costs half as much as a prompt.",
    )
    first = "share of the steps, the first ones, in which edits use the source's"
    share = {"type": float, "metavar": "SHARE"}
    spatial = f"{first} spatial attention: keeps the layout and the motion; 0.5 is usual"
    source.add_argument("--self-attention-steps", **share, help=spatial)
    source.add_argument("--feature-steps", **share, help=f"{first} features: keeps shapes too; 0.8 is usual")
    cross = f"{first} attention to the words that the prompts share: changes only what other words say; 0.2 to 0.8"
    source.add_argument("--cross-attention-steps", **share, help=cross)
    equalizer = "factor on the attention to a word, with --cross-attention-steps: 2 shows more of it; may be repeated"
    source.add_argument("--equalizer", action="append", metavar="WORD=FACTOR", help=equalizer)
    blend = "a word of the clip's prompt or of an edit: change only where it is shown; may be repeated"
    source.add_argument(
        "--blend-word", "--blend-words", action="append", dest="blend_words", metavar="WORD", help=blend
    )
    source.add_argument(
        "--mask", metavar="FILE", help="an image or a video, white where the edit may change the source"
    )
    start = "share of the steps after which --blend-word and --mask begin to act (default: the config's, 0.2)"
    source.add_argument("--blend-start", **share, help=start)

    summary = "score edits: CLIP, PickScore, flicker, background PSNR"
    score = commands.add_parser("score", help=summary, description=SCORE, formatter_class=raw)
    what = score.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", help="the directory of a `tav train` run with edits")
    what.add_argument("--video", metavar="FILE", help="one edited clip: a video, or a directory of images")
    what.add_argument(
        "--loveu", metavar="DIR", help="a submission, with frames in DIR/DAVIS_480p/VIDEO/style/00000.jpg …"
    )
    model = "directory or hub id of a CLIP model; without a value: %(const)s, a download of 1.7 GB"
    score.add_argument("--clip", nargs="?", const=CLIP_MODEL, metavar="MODEL", help=model)
    model = "the same for PickScore; without a value: %(const)s, a download of 4 GB"
    score.add_argument("--pick", nargs="?", const=PICK_MODEL, metavar="MODEL", help=model)
    score.add_argument("--prompt", help="with --video: the prompt of the edit")
    score.add_argument("--source-prompt", metavar="PROMPT", help="with --video: the prompt of the source")
    source = "with --video: the clip that was edited, for the background; with --workdir: the run's clip, if it moved"
    score.add_argument("--source", metavar="FILE", help=source)
    mask = "with --video and --source: an image or a video, white where the edit may differ from the source"
    score.add_argument("--mask", metavar="FILE", help=mask)
    score.add_argument(
        "--edits", metavar="DIR", help="with --workdir: the --out of `tav edit` (default: WORKDIR/edits)"
    )
    score.add_argument("--csv", metavar="FILE", help="with --loveu: LOVEU-TGVE-2023_Dataset.csv (default: that in DIR)")
    score.add_argument("--partial", action="store_true", help="with --loveu: score the clips that are there")
    score.add_argument("--json", action="store_true", help="print one line of JSON")

    summary = "suggest a prompt for a clip"
    details = "An image captioning model describes the middle frame, on the CPU. Needs the extra caption."
    caption = commands.add_parser("caption", help=summary, description=f"{summary.capitalize()}. {details}")
    caption.add_argument("path", metavar="CLIP", help="a video or a directory of images")
    model = (
        "directory or hub id of a BLIP or BLIP-2 model (default: %(default)s, 1.9 GB; the larger "
        "Salesforce/blip2-opt-2.7b is a download of 15 GB)"
    )
    caption.add_argument("--model", default=CAPTION_MODEL, help=model)

    summary = "write a tuned run in the Diffusers layout"
    export = commands.add_parser("export", help=summary, description=f"{summary.capitalize()}, with the 3D UNet.")
    export.add_argument("--workdir", required=True, help="the directory of a `tav train` run")
    export.add_argument("--out", required=True, help="the directory to write, new or empty")
    export.add_argument("--step", type=int, help="use the checkpoint of this step (default: the newest)")
    two_d = "write a plain Stable Diffusion that Diffusers opens: without the temporal layers, it generates images"
    export.add_argument("--two-d", action="store_true", help=two_d)
    push = "also upload it to this repository of the Hugging Face hub, which is made if it does not exist"
    export.add_argument("--push", metavar="USER/NAME", help=push)
    export.add_argument("--private", action="store_true", help="make a private repository, with --push")

    summary = "report whether a run fits a TPU, without having one"
    settings = SETTINGS + "  --config.model.path=sd1      or sd2, a directory, or a hub id that contains either"
    plan = commands.add_parser("plan", help=summary, description=PLAN, epilog=settings, formatter_class=raw)
    plan.add_argument("--help-config", **help_config)
    plan.add_argument("--topology", required=True, help="such as v5e-8 or v5e:2x4")
    functions = "tune, invert, sample, encode or decode; may be repeated (default: all)"
    plan.add_argument("--function", action="append", default=[], help=functions)
    plan.add_argument("--json", action="store_true", help="print one line of JSON")
    plan.add_argument("--no-search", action="store_true", help="do not search for a change with which the run fits")
    plan.add_argument("--cache", help="directory of the report cache (default: in the user's cache directory)")

    summary = "serve a page to tune, edit and compare in; needs the extra `web`"
    web = commands.add_parser("web", help=summary, description=WEB, formatter_class=raw)
    web.add_argument("--workdir", default="runs", help="a directory of runs, or a run (default: %(default)s)")
    web.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    web.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    web.add_argument("--share", action="store_true", help="also make a public link, through Gradio's servers")
    password = "file with a password, or the environment variable TAV_WEB_PASSWORD; the user is `tav`"
    web.add_argument("--password-file", metavar="FILE", help=password)
    upload = "largest clip that can be uploaded (default: %(default)s)"
    web.add_argument("--max-upload", type=int, default=512, metavar="MB", help=upload)

    commands.add_parser("doctor", help="report versions, devices, what is missing and how to fix it")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments, arguments.settings = parser().parse_known_args(argv)
    if arguments.settings and arguments.command not in ("train", "plan"):
        words = list(sys.argv[1:] if argv is None else argv)
        return fail(_unknown_word(arguments.command, words, arguments.settings[0]), TavError.exit_code)
    environment.skip_absent_tpu()
    if arguments.command != "train":  # which saves a checkpoint
        terminal.interrupt_on_signals()
    try:
        os.getcwd()
        # Imports the module of this command only, so that `tav --help` does not import JAX.
        return importlib.import_module(f"tav_jax.cli.{arguments.command}").run(arguments)
    except TavError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return fail("stopped", *(error.args or (130,)))
    except Exception as error:
        if isinstance(error, OSError) and (message := _sentence(error)):
            return fail(message, TavError.exit_code)
        if "RESOURCE_EXHAUSTED" in str(error):  # from code that does not suggest a size
            return fail("the device's memory ran out; use fewer frames or a smaller size", TavError.exit_code)
        processes.wait_for_abort(error)
        raise


def _sentence(error: OSError) -> str | None:
    """What to do about an error of a disk, a network or permissions that has no more specific message."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; finished files are intact. Free some space and run the same command again."
    if isinstance(error, FileNotFoundError) and not error.filename:
        return "the current directory has been removed; change to another one."
    if error.errno is None or error.filename is None:
        return None
    reason = (error.strerror or "").lower()
    return f"{error.filename}: {reason}; check the path, its permissions and its disk, and run the same command again."


def _unknown_word(command: str, words: Sequence[str], unknown: str) -> str:
    """The message for a word that is not an option, perhaps a part of a text that needs quotes."""
    message = f"{unknown!r} is not an option of `tav {command}`"
    index = words.index(unknown)
    options = [i for i, word in enumerate(words) if word.startswith("--")]
    if unknown.startswith("-") or not (before := [i for i in options if i < index]):
        return f"{message}; `tav {command} --help` lists its options"
    text = " ".join(words[before[-1] : min((i for i in options if i > index), default=None)])
    name, _, value = text.partition("=" if "=" in words[before[-1]] else " ")
    return f"{message}; a text with spaces needs quotes: {name}={shlex.quote(value)}"


def fail(message: str, code: int) -> int:
    """Print an error message and, in a multi-process run, end the other processes."""
    print(f"tav: {message}", file=sys.stderr)
    processes.exit_all(message, code)
    return code


def entry() -> None:
    terminal.protect_streams()
    terminal.shorten_warnings()
    code = main()
    if code == 0 and (reason := terminal.lost_output()):
        print(f"tav: standard output could not be written ({reason})", file=sys.stderr)
        code = 1 if sys.argv[1] in ("plan", "doctor", "score", "caption") else 0  # the other commands write files
    sys.exit(code)
