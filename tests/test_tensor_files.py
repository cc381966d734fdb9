"""Weight files from untrusted sources: safetensors headers, indices and directories, valid and invalid."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refusal
from safetensors import safe_open
from safetensors.numpy import save_file

from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io import tensor_files
from tav_jax.io.tensor_files import MAX_HEADER, iter_tensors


def read_all(directory: Path) -> list:
    return list(iter_tensors(directory))


def write(directory: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, whose length field is `length` if given."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    directory.mkdir(exist_ok=True)
    field = struct.pack("<Q", len(encoded) if length is None else length)
    (directory / "model.safetensors").write_bytes(field + encoded + data)
    return directory


def entry(shape, *offsets, dtype: Any = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


# ----------------------------------------------------------------------------------------------------------- headers


def test_a_valid_header_is_read(tmp_path):
    """The helper that writes the invalid headers below also writes valid ones."""
    table = {"../../a": entry([2, 2], 0, 16), "b": entry([], 16, 18, dtype="BF16"), "none": entry([0, 3], 18, 18)}
    data = np.arange(4, dtype=np.float32).tobytes() + b"\x80\x3f"
    found = {t.name: t for t in read_all(write(tmp_path / "w", {"__metadata__": {"format": "pt"}, **table}, data))}
    assert found["../../a"].read().tolist() == [[0, 1], [2, 3]]  # a name is never used as a path
    assert float(found["b"].read()) == 1.0
    assert found["none"].read().shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, 0, 2**32, "header has 4294967296 bytes, more than 10485760"),
        ({}, 0, 2**63, "header has 9223372036854775808 bytes, more than 10485760"),
        # refused by safetensors
        ({}, 0, 3, "invalid header length"),
        (b"", 0, None, "EOF while parsing"),
        (b"\xff\xfe{}", 0, None, "invalid UTF-8"),
        (b'{"a": ', 0, None, "EOF while parsing"),
        (b"[" * 50_000, 0, None, "invalid type: sequence"),
        (b"[]", 0, None, "invalid type: sequence"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}', 4, None, "missing field `dtype`"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4, None, "invalid offset for tensor `[ab]`"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8, None, "invalid offset for tensor `b`"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, None, "invalid offset for tensor `b`"),
        ({"a": entry([1], 4, 8)}, 8, None, "invalid offset for tensor `a`"),
        ({"a": entry([4], 0, 16)}, 15, None, "file not fully covered"),
        ({"a": entry([4], 0, 16)}, 17, None, "file not fully covered"),
        ({"a": entry([10**12], 0, 4 * 10**12)}, 16, None, "file not fully covered"),
        ({"a": entry([3], 0, 16)}, 16, None, "invalid shape, data type, or offset"),
        ({"a": entry([10**18], 0, 16)}, 16, None, "overflow computing buffer size"),
        ({"a": entry([2**32, 2**32], 0, 0)}, 0, None, "overflow computing buffer size"),
        ({"a": entry([-1], 0, 4)}, 4, None, "integer `-1`, expected usize"),
        ({"a": entry([1.0], 0, 4)}, 4, None, "floating point `1.0`, expected usize"),
        ({"a": entry([True], 0, 4)}, 4, None, "boolean `true`, expected usize"),
        ({"a": entry([1], -4, 0)}, 4, None, "integer `-4`, expected usize"),
        ({"a": entry([1], 4, 0)}, 4, None, "invalid offset for tensor `a`"),
        ({"a": entry([1], 0)}, 4, None, "invalid length 1, expected a tuple of size 2"),
        ({"a": entry([1], 0, 4, 8)}, 4, None, "invalid length 3, expected 2 elements"),
        ({"a": entry([1], 0, 4, dtype="F33")}, 4, None, "unknown variant `F33`"),
        ({"a": entry([1], 0, 4, dtype="\n" * 5000)}, 4, None, "unknown variant"),
        ({"a": entry([1], 0, 4, dtype=["F32"])}, 4, None, "expected string or map"),
        ({"a": {"dtype": "F32"}}, 4, None, "missing field `shape`"),
        ({"x\ny" * 3000: 3}, 4, None, "invalid type: integer `3`"),
    ],
)  # fmt: skip
def test_an_invalid_header_is_refused_before_any_tensor_is_read(tmp_path, header, data, length, message):
    directory = write(tmp_path / "w", header, bytes(data), length)
    before, start = contents(tmp_path), time.process_time()
    with pytest.raises(WeightsError, match=message) as caught:
        read_all(directory)
    assert "model.safetensors is truncated or not a valid safetensors file" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert time.process_time() - start < 5
    assert contents(tmp_path) == before


def test_a_header_of_4_gib_is_not_read(tmp_path):
    directory = tmp_path / "w"
    directory.mkdir()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**32))
        file.truncate(2**32 + 8)  # sparse: it uses no disk space
    assert f"has 4294967296 bytes, more than {MAX_HEADER}" in refusal(WeightsError, read_all, directory)


def test_a_large_valid_header_is_refused(tmp_path):
    """safetensors would accept it, and use about 25 times its size in memory."""
    header = {"__metadata__": {"text": "x" * MAX_HEADER}, "a": entry([1], 0, 4)}
    assert f"more than {MAX_HEADER}" in refusal(WeightsError, read_all, write(tmp_path / "w", header, bytes(4)))


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
# Every kind of header that safetensors reads → the message if it is refused, None if it is read.
READ_BY_SAFETENSORS: dict[str, tuple[str, str | None]] = {
    "spaces after the header, which writers use for alignment": (f'{{"a":{ENTRY}}}   ', None),
    "metadata": (f'{{"__metadata__":{{"format":"pt"}},"a":{ENTRY}}}', None),
    "an unknown field of an entry: every reader ignores it": (f'{{"a":{ENTRY[:-1]},"more":[1]}}}}', None),
    "a scalar": (f'{{"a":{ENTRY.replace("[1]", "[]")}}}', None),
    "a tensor without elements": (f'{{"a":{ENTRY},"b":{{"dtype":"F32","shape":[0,3],"data_offsets":[4,4]}}}}', None),
    "a name that is a path: it is never used as one": (f'{{"../../etc/passwd":{ENTRY}}}', None),
    "an empty name": (f'{{"":{ENTRY}}}', None),
    "integers: refused later if they are weights": (f'{{"a":{ENTRY.replace("F32", "U32")}}}', None),
    "a repeated name: readers differ in which entry counts": (f'{{"a":{ENTRY},"a":{ENTRY}}}', "duplicate name 'a'"),
    "an entry that is a list: only safetensors reads it": ('{"a":["F32",[1],[0,4]]}', "expected an object with dtype"),
    "a dtype that is an object: only safetensors reads it": (
        '{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}', "expected an object with dtype",
    ),
    "9 dimensions: numpy has at most 64, and weights 4": (
        f'{{"a":{ENTRY.replace("[1]", str([1] * 9))}}}', "9 dimensions, more than 8, for tensor 'a'",
    ),
    "a long name with line breaks": (
        json.dumps({"x\ny" * 3000: json.loads(ENTRY) | {"shape": [1] * 99}}), "99 dimensions, more than 8, for tensor",
    ),
    "no elements, and an axis that numpy cannot hold": (
        f'{{"a":{ENTRY},"b":{{"dtype":"F32","shape":[0,{2**63}],"data_offsets":[4,4]}}}}', "is too large",
    ),
    "no elements, and axes whose product numpy cannot hold": (
        f'{{"a":{ENTRY},"b":{{"dtype":"F32","shape":[{2**31},{2**31},0],"data_offsets":[4,4]}}}}', "is too large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ_BY_SAFETENSORS)
def test_headers_that_safetensors_reads(tmp_path, kind):
    header, refused = READ_BY_SAFETENSORS[kind]
    directory = write(tmp_path / "w", header.encode(), bytes(4))
    with safe_open(directory / "model.safetensors", framework="np") as file:
        assert len(list(file.keys())) > 0
    if refused is None:
        assert read_all(directory)[0].read().nbytes == 4
    else:
        assert refused in refusal(WeightsError, read_all, directory)


def test_a_file_that_is_replaced_while_loading_is_refused(tmp_path):
    directory = write(tmp_path / "w", {"a": entry([1], 0, 4)}, bytes(4))
    (tensor,) = read_all(directory)
    (directory / "model.safetensors").write_bytes(b"<html>404</html>")
    assert "model.safetensors could not be read (header too large)" in refusal(WeightsError, tensor.read)


# ----------------------------------------------------------------------------------------------- indices, directories


@pytest.mark.parametrize(
    "name",
    ["../unet/x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "x\0", "x" * 4000, 3, None, ["a"], {"a": "b"}],
)
def test_an_index_can_only_name_files_beside_it(tmp_path, name):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    message = refusal(WeightsError, read_all, tmp_path / "vae")
    assert "not a file beside it" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an index of weight files (Expecting value"),
        ("[", "is not an index of weight files (Expecting value"),
        ("[" * 50_000, "is not an index of weight files (it is nested too deeply)"),
        ("{}", "is not an index of weight files ('weight_map')"),
        ('{"weight_map": []}', "is not an index of weight files"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {}, "weight_map": {}}', "duplicate name 'weight_map'"),
        ("\udcff", "is not an index of weight files ('utf-8'"),
        (" " * (10 * 2**20 + 1), "it is larger than 10 MiB"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path, text, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode(errors="surrogateescape"))
    refused = refusal(WeightsError, read_all, tmp_path)
    assert refused.startswith(str(index))
    assert message in refused


def test_a_symbolic_link_beside_the_index_is_followed(tmp_path):
    """The hub's cache consists of such links."""
    blobs = write(tmp_path / "blobs", {"a": entry([1], 0, 4)}, struct.pack("<f", 7.0))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/one.safetensors").symlink_to(blobs / "model.safetensors")
    (tmp_path / "vae/model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert [float(t.read()[0]) for t in read_all(tmp_path / "vae")] == [7.0]


def test_a_pipe_is_not_opened_as_a_weight_file(tmp_path):
    (tmp_path / "vae").mkdir()
    os.mkfifo(tmp_path / "vae/model.safetensors")  # opening it would block
    assert "contains no weights" in refusal(MissingError, read_all, tmp_path / "vae")


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "model.safetensors")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tensor_files, "safe_open", refuse)
    with pytest.raises(InputError, match=r"model\.safetensors is not readable; change its permissions"):
        list(tensor_files._iter_safetensors([tmp_path / "model.safetensors"]))
