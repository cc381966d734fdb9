"""The notebook as on Colab, with one variable changed and the network replaced: the hub serves the demo model."""

import base64
import io
import json
import re
from pathlib import Path

import av
import pytest
from hub_server import MODEL_ID, SETTINGS, Hub

from tav_jax import Clip
from tav_jax.demo.edits import FPS, MODEL, source_clip

nbformat = pytest.importorskip("nbformat", reason='the notebook is read with nbformat: pip install -e ".[notebook]"')
nbclient = pytest.importorskip("nbclient", reason='the notebook is run with nbclient: pip install -e ".[notebook]"')
pytest.importorskip("ipykernel", reason='the notebook runs in ipykernel: pip install -e ".[notebook]"')


NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "tune_a_video.ipynb"
# Runs in the kernel after the last cell.
RESULTS_CELL = """
import json
from tav_jax.demo.edits import source_clip
from tav_jax.demo.evaluation import evaluate
source = source_clip(None, FRAMES)
expected = [source.edit(colour="pink", shape="ring"), source.edit(place="clouds", style="night")]
evaluations = [evaluate(edit.frames, e) for edit, e in zip(edits, expected)]
print(json.dumps({
    "edit_accuracy": [e.edit_accuracy for e in evaluations],
    "trajectory_error_px": [e.trajectory_error_px for e in evaluations],
    "losses": tuned.losses.tolist(), "steps": TUNING_STEPS, "source": clip.frames.shape, "fps": clip.fps,
    "files": sorted(path.name for path in directory.glob("edit-*")),
    "edit_prompts": [e.prompt for e in edits], "prompts": EDITS,
}))
"""

# Runs before the first cell. The hub's client is directed to the stand-in by its own variables.
STARTUP = """
import shutil, urllib.request
urllib.request.urlretrieve = lambda url, target: shutil.copyfile({clip!r}, target)
"""


def read():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs, and the results of RESULTS_CELL."""
    directory = NOTEBOOK.parent
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    notebook = read()
    (settings,) = (cell for cell in notebook.cells if cell.id == "settings")
    assert settings.source.startswith("SMALL = False ")
    settings.source = settings.source.replace("SMALL = False", "SMALL = True", 1)
    hub = Hub({str(path.relative_to(MODEL)): path.read_bytes() for path in MODEL.rglob("*") if path.is_file()})
    place = tmp_path_factory.mktemp("notebook")
    clip = Clip(source_clip(None, 8).frames, fps=FPS).save(place / "clip.mp4")
    startup = place / "ipython/profile_default/startup/network.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP.format(clip=str(clip)))
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS_CELL))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_HUB_OFFLINE", "XLA_FLAGS"):
            patch.delenv(variable, raising=False)
        network = {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1", **SETTINGS}
        own = {"TMPDIR": place, "IPYTHONDIR": place / "ipython", "HF_HOME": place / "hub"}  # not the user's files
        for variable, value in {**network, **own}.items():
            patch.setenv(variable, str(value))
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
        )
        client.execute()  # raises where a cell fails
    hub.close()
    assert f"GET /api/models/{MODEL_ID}/revision/main" in hub.requests
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    results = notebook.cells.pop()
    return notebook, json.loads(text_output(results))


def code_cells(notebook) -> dict:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def text_output(cell, stream: str = "stdout") -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == stream)


def videos(cell) -> list[bytes]:
    pages = [out.data.get("text/html", "") for out in cell.outputs if "data" in out]
    return [base64.b64decode(data) for page in pages for data in re.findall(r"data:video/mp4;base64,([^\"]+)", page)]


def test_committed_notebook_has_no_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook).values():
        assert cell.outputs == []
        assert cell.execution_count is None
    assert all(cell.metadata == {} for cell in notebook.cells)


@pytest.mark.slow
def test_every_cell_runs(executed):
    notebook, _ = executed
    cells = code_cells(notebook).values()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    warned = [line for cell in cells for line in text_output(cell, "stderr").splitlines() if "Warning" in line]
    assert warned == []


@pytest.mark.slow
def test_progress_bars_reach_the_end(executed):
    cells = code_cells(executed[0])
    for name, bars in (("tune", 1), ("invert", 1), ("sample", 2), ("guidance", 2)):
        if "widget-view" not in str(cells[name].outputs):  # with ipywidgets, bars are not text
            assert len(re.findall(r": 100%.*\n", text_output(cells[name], "stderr"))) == bars


@pytest.mark.slow
def test_clips_are_shown_as_videos(executed):
    notebook, results = executed
    frames, height, width, _ = results["source"]
    shown = {name: videos(cell) for name, cell in code_cells(notebook).items()}
    assert {name: len(found) for name, found in shown.items() if found} == {"clip": 1, "sample": 3, "guidance": 2}
    for data in (video for found in shown.values() for video in found):
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            images = list(container.decode(stream))
            assert len(images) == frames == 8
            assert {(x.height, x.width, x.format.name) for x in images} == {(height, width, "yuv420p")}
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == results["fps"]
    assert shown["clip"][0] == shown["sample"][0]  # both show the source
    assert len({*shown["sample"], *shown["guidance"]}) == 5


@pytest.mark.slow
def test_the_loss_of_each_step_is_plotted(executed):
    notebook, results = executed
    losses, cell = results["losses"], code_cells(notebook)["losses"]
    assert len(losses) == results["steps"] == 100
    (plot,) = (out.data["image/svg+xml"] for out in cell.outputs if "data" in out)
    line = re.search(r'<g id="losses">\s*<path d="([^"]+)"', plot)
    assert line is not None
    assert len(re.findall("[ML]", line[1])) == len(losses)
    assert f"{losses[0]:.3f}" in text_output(cell)


@pytest.mark.slow
def test_edits_match_their_prompts_and_the_path_of_the_source(executed):
    _, results = executed
    assert min(results["edit_accuracy"]) >= 0.75, results
    assert max(results["trajectory_error_px"]) <= 3, results


@pytest.mark.slow
def test_other_guidance_needs_no_compilation(executed):
    text = text_output(code_cells(executed[0])["guidance"])
    counts = re.search(r"compiled denoising loops: (\d+) before, (\d+) after", text)
    assert counts is not None
    assert counts[1] == counts[2] == "2"  # inversion and sampling


@pytest.mark.slow
def test_saved_edits_and_the_saved_model(executed):
    notebook, results = executed
    assert results["edit_prompts"] == results["prompts"]
    assert results["files"] == ["edit-0.gif", "edit-0.mp4", "edit-1.gif", "edit-1.mp4"]
    assert "largest difference from the first edit: 0 of 255" in text_output(code_cells(notebook)["pretrained"])
