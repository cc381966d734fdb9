"""A run's folder, on this machine or in a bucket.

A bucket cannot append, rename or lock. So files are always made whole on this machine, and `publish` puts them in
place: by a rename here, by one upload there.

    config.json  metrics.jsonl  checkpoints/  previews/  inversions/  edits/
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tav_jax import processes
from tav_jax.errors import InputError, MissingError


def bucket(path: str) -> Any:
    from etils import epath

    return epath.Path(path)


class Workdir:
    def __init__(self, path: str | Path):
        self.remote = "://" in str(path)
        self.path: Any = bucket(str(path)) if self.remote else Path(path).expanduser().absolute()
        # Where files are made. On this machine it is the folder itself, so that a rename is all that publishing takes.
        self.local = Path(tempfile.mkdtemp(prefix="tav_jax_run_")) if self.remote else self.path

    def __str__(self) -> str:
        return str(self.path)

    def usable(self) -> "Workdir":
        """Checked before anything long; nothing is made yet."""
        if self.remote:
            return self
        there = next(place for place in (self.path, *self.path.parents) if place.exists())
        if not there.is_dir():
            raise InputError(f"{there} is a file; give a folder")
        if not os.access(there, os.W_OK):
            raise InputError(f"{there} may not be written; give another folder or change its permissions")
        return self

    def check_shared(self) -> "Workdir":
        """Do all processes see what the first one writes here? Tried out, but for a bucket: all see the same."""
        if not processes.several() or self.remote:
            return self

        there = next(place for place in (self.path, *self.path.parents) if place.exists())

        def mark() -> str:
            try:
                handle, name = tempfile.mkstemp(prefix=".tav_jax_", dir=there)
            except OSError:
                return ""  # what may not be written can still be read
            os.close(handle)
            return Path(name).name

        name = processes.from_first("looking for the folder", mark)
        try:
            for _ in range(25):  # a network disk may take seconds to show it
                if (there / name).exists():
                    break
                time.sleep(0.2)
            seen = processes.everyones("looking for the folder", (there / name).exists())
        finally:
            if processes.is_first() and name:
                (there / name).unlink(missing_ok=True)
        if blind := [str(number) for number, sees in enumerate(seen) if not sees]:
            raise InputError(
                f"process {', '.join(blind)} does not see the {self} of process 0; give a folder that all of them "
                "share, such as one in a bucket (gs://…)"
            )
        return self

    def create(self) -> "Workdir":
        if processes.is_first():
            self.path.mkdir(parents=True, exist_ok=True)
        processes.barrier("making the folder")
        return self

    def existing(self) -> "Workdir":
        if not self.has_run:
            raise MissingError(f"{self} holds no run (no config.json); give the --workdir of a `tav train`")
        return self

    @property
    def has_run(self) -> bool:
        return processes.from_first("looking for a run", (self.path / "config.json").exists)

    def __truediv__(self, name: str) -> Any:
        return self.path / name

    def read(self, name: str) -> str | None:
        file = self.path / name
        return file.read_text() if file.exists() else None

    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all; of several processes the first one writes it."""
        if not processes.is_first():
            return
        scratch = self.scratch(name)
        try:
            scratch.write_text(text)
            self.publish(scratch, name)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise

    def scratch(self, name: str) -> Path:
        """Where a file that will be published as `name` is made: a hidden one beside it."""
        final = self.local / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.with_name(f".{final.stem}.{os.getpid()}{final.suffix}")

    def publish(self, file: Path, name: str) -> None:
        if not self.remote:
            os.replace(file, self.path / name)  # scratch has made the folder
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
        file.unlink()

    def publish_folder(self, name: str) -> None:
        """A folder that a library fills by itself."""
        if self.remote:
            for file in (self.local / name).rglob("*"):
                if file.is_file():
                    target = self.path / str(file.relative_to(self.local))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())

    def fetch(self, name: str) -> Path | None:
        """A file of the run as one on this machine."""
        source = self.path / name
        if not source.exists():
            return None
        if not self.remote:
            return source
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        return target

    def close(self) -> None:
        if self.remote:
            shutil.rmtree(self.local, ignore_errors=True)
