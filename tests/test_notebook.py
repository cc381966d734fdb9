"""The notebook runs as it is, from a fresh clone, without a download."""

import base64
import io
import json
import re
from pathlib import Path

import av
import pytest

nbformat = pytest.importorskip("nbformat", reason='the notebook is read with nbformat: pip install -e ".[notebook]"')
nbclient = pytest.importorskip("nbclient", reason='the notebook is run with nbclient: pip install -e ".[notebook]"')
pytest.importorskip("ipykernel", reason='the notebook runs in ipykernel: pip install -e ".[notebook]"')


NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "tune_a_video.ipynb"
# Asked of the kernel after the last cell.
QUESTION = """
import json
from tav_jax.demo import judge
truth = drawn_world.source_clip(None, FRAMES)
wanted = [truth.edited(colour="pink", shape="ring"), truth.edited(place="clouds", style="night")]
verdicts = [judge.judge(edit.frames, clip_of) for edit, clip_of in zip(edits, wanted)]
print(json.dumps({
    "right": [v.edit_accuracy for v in verdicts], "off_the_path": [v.trajectory_error_px for v in verdicts],
    "losses": tuned.losses.tolist(), "steps": TUNING_STEPS, "source": clip.frames.shape, "fps": clip.fps,
    "saved": sorted(path.name for path in folder.glob("edit-*")), "prompts": [e.prompt for e in edits], "asked": EDITS,
}))
"""


def read():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs, and the answer to the question."""
    folder = NOTEBOOK.parent
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    notebook = read()
    notebook.cells.append(nbformat.v4.new_code_cell(QUESTION))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for variable in ("TMPDIR", "IPYTHONDIR"):  # nothing of the user's is read, and nothing stays behind
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable)))
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()  # raises where a cell fails
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    question = notebook.cells.pop()
    return notebook, json.loads(written(question))


def code_cells(notebook) -> dict:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def written(cell, stream: str = "stdout") -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == stream)


def videos(cell) -> list[bytes]:
    pages = [out.data.get("text/html", "") for out in cell.outputs if "data" in out]
    return [base64.b64decode(data) for page in pages for data in re.findall(r"data:video/mp4;base64,([^\"]+)", page)]


def test_the_committed_file_holds_no_outputs():
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
    warned = [line for cell in cells for line in written(cell, "stderr").splitlines() if "Warning" in line]
    assert warned == []


@pytest.mark.slow
def test_the_bars_reach_their_ends(executed):
    cells = code_cells(executed[0])
    for name, bars in (("tune", 1), ("invert", 1), ("sample", 2), ("guidance", 3)):
        if "widget-view" not in str(cells[name].outputs):  # with ipywidgets installed they are no text
            assert len(re.findall(r": 100%.*\n", written(cells[name], "stderr"))) == bars


@pytest.mark.slow
def test_clips_are_shown_as_videos_that_play(executed):
    notebook, told = executed
    frames, height, width, _ = told["source"]
    shown = {name: videos(cell) for name, cell in code_cells(notebook).items()}
    assert {name: len(found) for name, found in shown.items() if found} == {"clip": 1, "sample": 3, "guidance": 3}
    for data in (video for found in shown.values() for video in found):
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            pictures = list(container.decode(stream))
            assert len(pictures) == frames == 8
            assert {(p.height, p.width, p.format.name) for p in pictures} == {(height, width, "yuv420p")}
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == told["fps"]
    assert shown["clip"][0] == shown["sample"][0]  # the source, beside its edits
    assert len({*shown["sample"], *shown["guidance"]}) == 6


@pytest.mark.slow
def test_one_loss_a_step(executed):
    notebook, told = executed
    losses = told["losses"]
    assert len(losses) == told["steps"] == 100
    (picture,) = (out.data["text/html"] for out in code_cells(notebook)["losses"].outputs)
    line = re.search(r'points="([^"]+)"', picture)
    assert line is not None
    assert len(line[1].split()) == len(losses)
    assert f"{losses[0]:.3f}" in picture


@pytest.mark.slow
def test_the_edits_show_what_their_words_say_where_the_clip_shows_it(executed):
    _, told = executed
    assert min(told["right"]) >= 0.75, told
    assert max(told["off_the_path"]) <= 3, told


@pytest.mark.slow
def test_another_guidance_compiles_nothing(executed):
    counts = re.search(r"compiled walks: (\d+) before, (\d+) after", written(code_cells(executed[0])["guidance"]))
    assert counts is not None
    assert counts[1] == counts[2] == "2"  # the inversion, the sampling


@pytest.mark.slow
def test_edits_are_saved_and_the_tuned_model_comes_back(executed):
    notebook, told = executed
    assert told["prompts"] == told["asked"]
    assert told["saved"] == ["edit-0.gif", "edit-0.mp4", "edit-1.gif", "edit-1.mp4"]
    assert "largest difference from the edit before: 0 of 255" in written(code_cells(notebook)["pretrained"])
