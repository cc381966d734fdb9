"""Installation: the commands that install extras, and libtpu on a machine without a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import with_libtpu

from tav_jax import errors
from tav_jax.plan import compiler_directory
from tav_jax.training import environment

ROOT = Path(__file__).parent.parent


@pytest.fixture
def site_packages(tmp_path, monkeypatch) -> Path:
    """A directory with the metadata of an installed tav_jax, of which the running package is a part."""
    metadata = tmp_path / "tav_jax-7.dist-info"
    metadata.mkdir()
    requirements = ("numpy>=2", "torch<3,>=2.6; extra == 'torch'", 'wandb<1; extra == "wandb"', 'x; extra == "wandb"')
    (metadata / "METADATA").write_text(
        "Name: tav_jax\nVersion: 7\n" + "".join(f"Requires-Dist: {r}\n" for r in requirements)
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "tav_jax/errors.py"))
    return metadata


def test_in_a_checkout_the_extra_is_installed_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert errors.install_command("torch") == "pip install '.[torch]'"
    monkeypatch.chdir(tmp_path)
    assert errors.install_command("torch") == f"pip install '{ROOT}[torch]'"


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        ({"url": "file://{here}/a%20clone", "dir_info": {}}, "tav_jax[wandb] @ file://{here}/a%20clone"),
        (
            {"url": "https://example.org/tav.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "tav_jax[wandb] @ git+https://example.org/tav.git",
        ),
    ],
)
def test_the_extra_is_installed_from_where_the_package_came(site_packages, origin, requirement):
    here = site_packages.parent
    (here / "a clone").mkdir()
    (site_packages / "direct_url.json").write_text(json.dumps({**origin, "url": origin["url"].format(here=here)}))
    assert errors.install_command("wandb") == f"pip install '{requirement.format(here=here)}'"


def test_without_its_origin_the_packages_of_the_extra_are_installed(site_packages):
    assert errors.install_command("wandb") == "pip install 'wandb<1' x"
    removed = {"url": f"file://{site_packages.parent}/removed", "dir_info": {}}
    (site_packages / "direct_url.json").write_text(json.dumps(removed))
    assert errors.install_command("torch") == "pip install 'torch<3,>=2.6'"


def test_a_tpu_is_looked_for_only_where_there_is_one(tmp_path, monkeypatch):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu/__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(environment, "has_tpu", lambda: True)
    environment.skip_absent_tpu()
    assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setattr(environment, "has_tpu", lambda: False)
    environment.skip_absent_tpu()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # an explicit choice
    environment.skip_absent_tpu()
    assert os.environ["JAX_PLATFORMS"] == "tpu"


@pytest.mark.slow
@with_libtpu
@pytest.mark.skipif(environment.has_tpu(), reason="this machine has a TPU")
def test_doctor_does_not_start_libtpu_without_a_tpu():
    variables = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(compiler_directory())])
    done = subprocess.run(
        [sys.executable, "-m", "tav_jax", "doctor"], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "TPU" not in done.stderr, done.stderr
    assert "libtpu is used by `tav plan` only, because this machine has no TPU" in done.stdout
