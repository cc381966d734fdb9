"""`tav demo`, the demo model and the benchmark on the demo world. Bounds on quality fail when the method breaks."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import av
import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import demo_world as benchmark
from tav_jax import InputError, TuneAVideo
from tav_jax.cli import main
from tav_jax.demo import report
from tav_jax.demo.edits import EDIT_KINDS, MODEL, Settings, example_edits, source_clip
from tav_jax.demo.evaluation import analyze_frame, evaluate
from tav_jax.demo.run import make_settings, prepare_directory, run_demo
from tav_jax.demo.world import all_scenes
from tav_jax.distributed import compilation_cache
from tav_jax.io.video import Edit

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes

MIN_ACCURACY, MAX_ERROR = 0.85, 2.0  # a quarter of the default steps reaches 0.94 and 1.2 pixels


@pytest.fixture(scope="module")
def tav():
    return TuneAVideo.from_pretrained(MODEL, dtype="float32")


# ------------------------------------------------------------------------------------------------------- demo model


def test_model_size(tav):
    assert sum(file.stat().st_size for file in MODEL.rglob("*")) <= 12e6
    weights = jax.tree.leaves_with_path(nnx.state(tav.components.unet))
    temporal = ("attn_temp", "norm_temp")
    assert sum(x.size for path, x in weights if not any(name in str(path) for name in temporal)) <= 4.5e6


def test_model_generates_held_out_combinations(tav):
    held_out = [scene for scene in all_scenes() if scene.held_out]
    chosen = [held_out[i] for i in np.random.default_rng(1).choice(len(held_out), 32, replace=False)]
    accuracy = benchmark.image_accuracy(tav, chosen, Settings(sampling_steps=25))
    assert accuracy["all"] >= 0.75, accuracy


def test_diffusers_loads_the_model_and_generates_the_same_world():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    chosen = list(all_scenes())[::37][:24]
    images = pipe(
        [scene.caption for scene in chosen],
        num_inference_steps=25,
        guidance_scale=5.0,
        height=64,
        width=64,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    found = [analyze_frame(np.rint(255 * x).astype(np.uint8)).scene for x in images]
    assert np.mean([f == scene for f, scene in zip(found, chosen, strict=True)]) >= 0.75


# -------------------------------------------------------------------------------------------------------- benchmark


def test_table_and_figure_of_given_results(tmp_path):
    for seed, accuracy in ((0, 0.8), (1, 1.0)):
        for clip in range(2):
            one = {"edit_accuracy": accuracy, "trajectory_error_px": 1.5, "frame_consistency": 0.99}
            other = one | {"edit_accuracy": accuracy - 0.4, "trajectory_error_px": 4.5}
            edits = {"style": one, "object": other, "place": one, "several at once": other}
            mean = {"edit_accuracy": accuracy - 0.2, "trajectory_error_px": 3.0, "frame_consistency": 0.99}
            result = {"row": "full", "clip": clip, "seed": seed, "edits": edits} | mean
            benchmark.write_result(tmp_path / f"full/clip{clip}-seed{seed}.json", result)
    row = benchmark.make_table(tmp_path).splitlines()[2]
    kept, replaced = "0.90 ± 0.14, 1.50 ± 0.00 px", "0.50 ± 0.14, 4.50 ± 0.00 px"
    assert row == f"| full method | 0.70 ± 0.14 | 3.00 ± 0.00 | {kept} | {replaced} | 0.990 ± 0.000 | 4 |"
    figure = ElementTree.fromstring(benchmark.make_figure(tmp_path))
    assert len(figure.findall(".//{*}g[@id='cells-full']//{*}use")) == 4
    # A clip with results of one seed only counts in the mean, but not in the standard deviation between seeds.
    extra = json.loads((tmp_path / "full/clip0-seed0.json").read_text()) | {"clip": 2}
    benchmark.write_result(tmp_path / "full/clip2-seed0.json", extra)
    statistic = benchmark.statistic(benchmark.read_results(tmp_path)["full"], "edit_accuracy")
    assert f"{statistic:.2f}" == "0.68 ± 0.14"
    assert statistic.cells == 5


def test_every_row_has_results_early():
    cells = benchmark.all_cells()
    assert len(cells) == len(set(cells)) == 3 * (16 + 7 * 4)
    assert {cell.row.name for cell in cells[:8]} == {row.name for row in benchmark.ROWS}
    assert all(cell.clip < benchmark.FEW for cell in cells[: 3 * 8 * 4])


def test_results_with_other_settings_are_computed_again(tmp_path):
    file = tmp_path / "cell.json"
    assert not benchmark.has_result(file, Settings())
    benchmark.write_result(file, {"settings": asdict(Settings(strength=0.5))})
    assert not benchmark.has_result(file, Settings())
    assert benchmark.has_result(file, Settings(strength=0.5))


@pytest.mark.slow
def test_tuned_edits_are_accurate():
    """The first cell of the benchmark with fewer steps. Tuning, inversion and guidance must all be right."""
    result = benchmark.run_cell(benchmark.all_cells()[0], Settings(steps=100, inversion_steps=25, sampling_steps=25))
    assert result["row"] == "full"
    assert result["edit_accuracy"] >= MIN_ACCURACY, result
    assert result["trajectory_error_px"] <= MAX_ERROR, result
    assert result["reconstruction_psnr_db"] >= 30, result


# ------------------------------------------------------------------------------------------------------------ demo


class ExternalLinks(HTMLParser):
    """Collects everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        names = ("src", "href", "xlink:href", "data-strip")
        self.found += [v for k, v in attrs if k in names and not v.startswith(("data:", "#"))]


def test_report_plots():
    source = source_clip(None, 8)
    expected = list(example_edits(source, 0).values())
    edits = [Edit(clip.frames, 8.0, prompt=clip.scene.caption) for clip in expected]
    evaluations = [evaluate(clip.frames, clip) for clip in expected]
    missing = evaluations[0].centres.copy()
    missing[2] = np.nan  # a frame without an object
    evaluations[0] = evaluations[0]._replace(centres=missing)
    losses = np.linspace(1, 0.5, 40).tolist()
    result = report.DemoResult(Settings(steps=40), 7, source, list(EDIT_KINDS), edits, evaluations, losses)
    page = report.render_report(result)
    assert page.count("<svg") == 2
    assert report.GREY not in page[page.index("<svg") : page.index("</svg>")]  # currentColor, for light and dark mode
    assert "tuning step</text>" in page
    paths = ElementTree.fromstring(re.search(r"<svg.*?</svg>", page, re.S)[0])
    dots = [paths.findall(f".//*[@id='dots-{frame}']//{{*}}path") for frame in range(8)]
    assert [len(found) for found in dots] == [5, 5, 4, 5, 5, 5, 5, 5]  # source and four edits
    assert "tav demo --out=DIR --clip=7 --steps=40</pre>" in page
    assert "source_clip(7, frames=8)" in page


@pytest.mark.slow
def test_the_command_needs_no_home_no_display_and_no_network(tmp_path):
    environment = {
        "PATH": os.environ["PATH"],
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "http_proxy": "http://127.0.0.1:9",  # refuses connections
        "https_proxy": "http://127.0.0.1:9",
    }
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    out = tmp_path / "new" / "demo"
    command = [sys.executable, "-m", "tav_jax", "demo", f"--out={out}", "--steps=2"]
    command += ["--prompt=a golden star on snow", "--prompt=a <b>blue</b> ring"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "not trained on 'golden'" in done.stderr
    page = out / "report.html"
    assert done.stderr.strip().endswith(str(page))

    text = page.read_text()
    links = ExternalLinks()
    links.feed(text)
    assert not links.found
    assert "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.S)
    assert "<b>blue</b>" not in text  # prompts are escaped
    assert text.count('class="clip"') == 3
    assert "--prompt='a golden star on snow'" in text.replace("&#x27;", "'")

    metrics = json.loads((out / "metrics.json").read_text())
    assert {"edit_accuracy", "trajectory_error_px", "frame_consistency", "seconds"} <= set(metrics)
    assert [edit["prompt"] for edit in metrics["edits"]] == ["a golden star on snow", "a <b>blue</b> ring"]
    assert min(metrics["seconds"].values()) >= 0
    assert {"tuning", "inverting", "sampling"} <= set(metrics["seconds"])
    for name in ("source", "a-golden-star-on-snow", "side-by-side"):
        for suffix in (".mp4", ".gif"):
            with av.open(str(out / (name + suffix))) as file:
                assert sum(1 for _ in file.decode(video=0)) == 8
    assert any((tmp_path / "compiled").iterdir())


def test_unusable_output_directory_is_refused_before_the_model_loads(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(TuneAVideo, "from_pretrained", fail)
    file = tmp_path / "file"
    file.write_text("content")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("content")
    for out, message in (
        (file, "is a file"),
        (file / "below", "is a file"),
        (full, "is not empty"),
        ("/proc/demo", "/proc"),
    ):
        assert main.main(["demo", f"--out={out}"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("tav: ")
        assert len(error.strip().splitlines()) == 1
    assert file.read_text() == (full / "file").read_text() == "content"
    assert prepare_directory(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("overrides", [{"steps": 0}, {"steps": -3}, {"seed": -1}, {"seed": 2**31}])
def test_invalid_settings_are_refused(overrides):
    (name, value), *_ = overrides.items()
    with pytest.raises(InputError, match=f"--{name} is {value}"):
        make_settings(**overrides)
    assert make_settings(steps=None, seed=None) == Settings()


def test_negative_clip_is_refused(tmp_path):
    with pytest.raises(InputError, match="--clip is -1"):
        run_demo(tmp_path / "out", clip_seed=-1)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- compilation cache


def test_compilation_cache_directory_and_its_fallback(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.compiled_directory().is_relative_to(tmp_path / "tav_jax" / "compiled")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert compilation_cache.compiled_directory().is_relative_to(tmp_path / "temporary")
