"""The page that shows edits beside their source, and the record from which `tav edit` builds it."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from tav_jax import Clip
from tav_jax.cli import edit, main
from tav_jax.errors import InputError
from tav_jax.evaluation import index, page
from tav_jax.evaluation.index import update_index
from tav_jax.evaluation.page import Entry, mark_changes, render_page
from tav_jax.io.video import Audio
from tav_jax.training.run_directory import RunDirectory

FRAMES = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
SOURCE = Clip(FRAMES, 8.0)
HOSTILE = '</title></script><script>alert(1)</script>" onerror="x" $lead & \u202e'


class Elements(HTMLParser):
    """All elements of a page, as (tag, attributes), and its text by the tag around it."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag = self.found[-1][0] if self.found else ""
        self.text[tag] = self.text.get(tag, "") + data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def embedded(uri: str, kind: str) -> bytes:
    assert uri.startswith(f"data:{kind};base64,")
    return base64.b64decode(uri.partition(",")[2])


def test_page_is_one_file_with_all_videos(tmp_path):
    file = SOURCE.save(tmp_path / "an edit.mp4")
    gif = SOURCE.save(tmp_path / "b.gif")
    entries = [Entry("a cat", file), Entry("a bird", gif), Entry("", SOURCE)]
    found = Elements(render_page(SOURCE, "a dog", entries, directory=tmp_path))
    videos = found.all("video")
    assert [video["aria-label"] for video in videos] == ["a dog", "a cat", "a bird", ""]
    for video in videos:
        assert "muted" in video
        with av.open(io.BytesIO(embedded(video["src"], "video/mp4"))) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert sum(1 for _ in container.decode(video=0)) == 6
    assert embedded(videos[1]["src"], "video/mp4") == file.read_bytes()
    assert [link["href"] for link in found.all("a")] == ["an%20edit.mp4", "b.gif"]
    loaded = [x[k] for _, x in found.found for k in ("src", "href", "xlink:href", "srcset") if k in x]
    assert all(x.startswith("data:") for x in loaded if x not in ("an%20edit.mp4", "b.gif"))
    policy = found.all("meta")[3]["content"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    # Controls: a button and a slider for all videos, no switch without a function.
    assert [x["id"] for x in found.all("input")] == ["frame"]
    assert found.all("input")[0]["max"] == "5"
    assert "fps = 8;" in found.text["script"]


def test_hostile_text_is_escaped():
    entry = Entry(HOSTILE, SOURCE, {HOSTILE: HOSTILE}, HOSTILE, {"score": HOSTILE}, kind=HOSTILE, note=HOSTILE)
    text = render_page(SOURCE, HOSTILE, [entry])
    plain = render_page(SOURCE, "a dog", [replace(entry, prompt="a", settings={"a": "a"}, command="a", note="a")])
    found = Elements(text)
    assert [tag for tag, _ in found.found if tag != "ins"] == [
        tag for tag, _ in Elements(plain.replace(HOSTILE, "")).found if tag != "ins"
    ]
    assert len(found.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes in found.found)
    assert found.all("video")[1]["aria-label"] == HOSTILE
    assert HOSTILE in found.text["pre"]


@pytest.mark.parametrize(
    ("source", "prompt", "marked"),
    [
        ("a man is skiing", "a man is skiing", "a man is skiing"),
        ("a man is skiing", "spider man is skiing, fast", "<ins>spider</ins> man is skiing<ins>, fast</ins>"),
        ("a red circle", "a blue ring", "a <ins>blue ring</ins>"),
        ("a cat", "A CAT & a <b>", "A CAT <ins>&amp; a &lt;b&gt;</ins>"),
        ("a cat sees a dog", "a dog sees a cat", "a <ins>dog</ins> sees a <ins>cat</ins>"),
        ("", "человек", "<ins>человек</ins>"),
        ("a cat", "", ""),
    ],
)
def test_new_words_are_marked(source, prompt, marked):
    assert mark_changes(prompt, source) == marked


def test_settings_scores_and_command_are_shown():
    scored = Entry("a cat", SOURCE, {"strength": 0.6}, "tav edit --prompt='a cat'", {"clip_text": 31.23456})
    other = Entry("a bird", SOURCE, {"sampler": "dpm++2m"})
    text = render_page(SOURCE, "a dog", [scored, other])
    cells = re.findall(r'<td data-label="(.*?)">(.*?)</td>', text)
    names = ("strength", "sampler", "clip_text")
    assert cells == [*zip(names, ("0.6", "–", "31.23"), strict=True), *zip(names, ("–", "dpm++2m", "–"), strict=True)]
    assert Elements(text).text["pre"] == "tav edit --prompt='a cat'"
    assert text.count('class="copy"') == 1
    assert "<table" not in render_page(SOURCE, "a dog", [Entry("a cat", SOURCE)])


@pytest.mark.parametrize("side", [16, 200])
def test_masks_are_an_overlay_that_can_be_switched_on(side):
    mask = np.zeros((6, side, side), np.float32)
    mask[2, : side // 2] = 1
    found = Elements(render_page(SOURCE, "a dog", [Entry("a cat", SOURCE, mask=mask), Entry("a bird", SOURCE)]))
    assert [x["id"] for x in found.all("input")] == ["frame", "masks"]
    (overlay,) = (x for x in found.all("div") if x.get("class") == "mask")
    assert overlay["data-frames"] == "6"
    uri = re.search(r"url\((.*?)\)", overlay["style"])[1]
    with Image.open(io.BytesIO(embedded(uri, "image/png"))) as image:
        alpha = np.asarray(image)[..., 3].reshape(6, -1, image.width)
    assert alpha.shape[1] <= page.MASK_SIDE
    half = alpha.shape[1] // 2
    assert (alpha[2, :half] == page.MASK_COLOUR[3]).all()
    assert alpha.sum() == alpha[2, :half].sum()


def test_sound_can_be_switched_on():
    audio = Audio(np.zeros((1, 6 * 6000), np.float32), 48000, "mono")
    found = Elements(render_page(Clip(FRAMES, 8.0, audio), "a dog", [Entry("a cat", SOURCE)]))
    assert [x["id"] for x in found.all("input")] == ["frame", "sound"]


def test_large_videos_are_linked(tmp_path):
    """A page stays below 25 MB. Here each video of an edit has 3 MB, as 24 frames of 512 × 512 have at most."""
    entries = []
    for i in range(8):
        (tmp_path / f"{i}.mp4").write_bytes(bytes(3_000_000))
        entries.append(Entry("a cat", tmp_path / f"{i}.mp4"))
    text = render_page(SOURCE, "a dog", entries, directory=tmp_path)
    sources = [video["src"][:10] for video in Elements(text).all("video")]
    assert sources == ["data:video"] * 6 + ["5.mp4", "6.mp4", "7.mp4"]
    assert len(text.encode()) < 25e6


# ------------------------------------------------------------------------------------------------------ index of a run


@pytest.fixture
def run_directory(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def add(directory: RunDirectory, *names: str, prompt: str = "", **options) -> list[str]:
    """Write videos, add them to the page, and return the prompts that the page shows."""
    edits = {}
    for name in names:
        video = SOURCE.save(directory.path / "edits" / name)
        edits[name] = Entry(prompt or Path(name).stem, video, **options)
    path = update_index(directory, "edits/", SOURCE, "a dog", edits)
    assert path == str(directory.path / "edits/index.html")
    return [video["aria-label"] for video in Elements(Path(path).read_text("utf-8")).all("video")]


def test_second_edit_is_added_to_the_page(run_directory):
    mask = np.zeros((6, 4, 8), np.float32)
    mask[3, 1] = 1
    first = {"settings": {"strength": 0.6}, "command": "tav edit", "scores": {"flicker": 0.5}, "mask": mask}
    assert add(run_directory, "a.mp4", "b.gif", **first) == ["a dog", "a", "b"]
    assert add(run_directory, "c.mp4") == ["a dog", "c", "a", "b"]
    assert add(run_directory, "a.mp4", prompt="again") == ["a dog", "again", "c", "b"]
    (run_directory.path / "edits/c.mp4").unlink()
    assert add(run_directory, "d.mp4") == ["a dog", "d", "again", "b"]
    entry = index.read_record(run_directory, "edits/.tav-edits.json")["b.gif"]
    assert (entry.settings, entry.command, entry.scores) == (first["settings"], "tav edit", first["scores"])
    np.testing.assert_array_equal(entry.mask, mask)
    names = {file.name for file in (run_directory.path / "edits").iterdir()}
    assert names == {"a.mp4", "b.gif", "d.mp4", ".tav-edits.json", "index.html"}


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"edits": [1]}',
    b'{"edits": {"a.mp4": 1}}',
    b'{"edits": {"a.mp4": {"prompt": "x"}}}',
    b"1" * 10_000,
]
EDIT = {"prompt": "x", "settings": {}, "scores": {}, "command": "", "mask": None}
DAMAGED += [
    json.dumps({"edits": {name: EDIT | changes}}).encode()
    for name, changes in [
        ("../secret.mp4", {}),
        ("/etc/passwd", {}),
        ("a.mp4", {"settings": {"a": []}}),
        ("a.mp4", {"mask": {"frames": 3, "png": "AAAA"}}),
        ("a.mp4", {"mask": {"frames": 0, "png": ""}}),
    ]
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_record_is_begun_anew(run_directory, content):
    edits = run_directory.path / "edits"
    edits.mkdir(parents=True)
    (run_directory.path / "secret.mp4").write_bytes(b"secret")
    (edits / ".tav-edits.json").write_bytes(content)
    assert add(run_directory, "b.mp4") == ["a dog", "b"]
    assert add(run_directory, "c.mp4") == ["a dog", "c", "b"]


def test_large_source_and_damaged_gif(run_directory, monkeypatch):
    monkeypatch.setattr(index, "MAX_SOURCE", 1000)
    monkeypatch.setattr(page, "MAX_EMBEDDED", 1000)
    add(run_directory, "a.mp4", "b.gif")
    (run_directory.path / "edits/b.gif").write_bytes(b"GIF89a")
    add(run_directory, "c.mp4")
    found = Elements((run_directory.path / "edits/index.html").read_text("utf-8"))
    assert [video["src"] for video in found.all("video")] == ["_source.mp4", "c.mp4", "a.mp4", "b.gif"]
    assert len((run_directory.path / "edits/_source.mp4").read_bytes()) > 1000


def test_other_index_html_is_not_overwritten(run_directory):
    assert not index.is_foreign(run_directory, "edits/index.html")
    add(run_directory, "a.mp4")
    assert not index.is_foreign(run_directory, "edits/index.html")
    (run_directory.path / "edits/index.html").write_text("<title>My home page</title>")
    assert index.is_foreign(run_directory, "edits/index.html")
    message = refusal(InputError, edit._check_outputs, run_directory, "edits/", ["edits/b.mp4"])
    assert "edits/index.html is not a page of `tav edit`; add --force to overwrite it" in message
    edit._check_outputs(run_directory, "edits/", ())  # with --force


def test_command_that_makes_an_edit_again():
    line = [
        "edit",
        "--workdir=my run",
        "--prompt=a",
        "--prompt=b",
        "--strength=0.6",
        "--step=0",
        "--no-inversion",
        "--force",
    ]
    arguments = main.parser().parse_args([*line, "--seed=3", "--gif"])
    words = ["tav", "edit", "--workdir=my run", "--step=0", "--strength=0.6", "--no-inversion", "--gif"]
    assert edit.command_words(arguments) == words
    assert main.parser().parse_args(words[1:]).strength == 0.6
