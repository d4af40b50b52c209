"""Files that are no files of ours: an error that names them, in bounded memory, nothing run."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxmet as jm
from jaxmet.tree import writing

pytest.importorskip("safetensors")

quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

ENCODINGS = {
    "2.0.0": {
        "version": "2.0.0",
        "encodings": [
            {"name": "w", "output_dtype": "int8", "y_scale": [0.5, 0.25], "axis": 0},
            {"name": "a", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 3},
        ],
    },
    "1.0.0": {
        "version": "1.0.0",
        "activation_encodings": [
            {
                "name": "a",
                "dtype": "INT",
                "bw": 8,
                "is_sym": False,
                "scale": [0.5],
                "offset": [-3],
                "enc_type": "PER_TENSOR",
            }
        ],
        "param_encodings": [],
    },
    "0.6.1": {
        "version": "0.6.1",
        "activation_encodings": {
            "a": [
                {
                    "bitwidth": 8,
                    "dtype": "int",
                    "is_symmetric": "False",
                    "scale": 0.5,
                    "offset": -3,
                }
            ]
        },
        "param_encodings": {},
    },
}


def tree():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    return {"w": jm.Compressed(w, upper=jnp.ones(4)), "k": [jnp.arange(3), None]}


def quantizers():
    return jm.Quantizers(
        {"w": jm.Quantizer(jnp.ones((1, 4)), bits=4, axis=(1,))},
        {"a": jm.Quantizer(jnp.float32(0.1), jnp.float32(8), symmetric=False)},
    )


def written(kind, path):
    if kind == "safetensors":
        jm.export.safetensors(path, tree(), quantizers())
    elif kind in ENCODINGS:
        path.write_text(json.dumps(ENCODINGS[kind]))
    else:
        jm.save(
            path, params=tree(), quantizers=quantizers(), compress=kind == "deflated"
        )
    return path.read_bytes()


KINDS = ("npz", "deflated", "safetensors", *ENCODINGS)


def reader(kind):
    if kind == "safetensors":
        return jm.export.read_safetensors, "jaxmet.export.read_safetensors: "
    if kind in ENCODINGS:
        return jm.export.read_encodings, "jaxmet.export.read_encodings: "
    return jm.load, "jaxmet.load: "


def read_or_refused(kind, path):
    """Whether the file was read; otherwise by an error that names function and file."""
    read, begins = reader(kind)
    tracemalloc.start()
    try:
        read(path)
    except ValueError as error:
        text = str(error)
        assert text.startswith(begins) and str(path) in text
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**23 + 1100 * path.stat().st_size
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_short_changed_and_made_up(kind, tmp_path):
    path = tmp_path / "file"
    whole = written(kind, path)
    assert read_or_refused(kind, path)

    @quick
    @given(st.integers(0, len(whole) - 1))
    def cut_short(size):
        path.write_bytes(whole[:size])
        assert not read_or_refused(kind, path)

    place = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255))

    @quick
    @given(st.lists(place, min_size=1, max_size=4))
    def changed(places):
        data = bytearray(whole)
        for i, bits in places:
            data[i] ^= bits
        path.write_bytes(data)
        read_or_refused(kind, path)  # a number may have changed: it is read then

    @quick
    @given(st.binary(max_size=200), st.booleans())
    def made_up(data, begins):
        path.write_bytes((whole[:8] if begins else b"") + data)
        assert not read_or_refused(kind, path)

    cut_short()
    changed()
    made_up()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "ref dict list tuple type fields array dtype numpy scalar key leaves tree "
                "names title columns name output_dtype y_scale axis bw scale offset".split()
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_of_other_contents(kind, tmp_path):
    path = tmp_path / "file"

    @quick
    @given(JSON, st.sampled_from(["params", "quantizers", "table"]))
    def made_up(value, key):
        with_json(kind, path, json.dumps(head(kind, key, value)))
        read_or_refused(kind, path)

    made_up()
    for version in (0, -1, 99, True, None, "1", [1], 10**30, "9.9.9"):
        data = head(kind, "params", None) | {"version": version}
        with_json(kind, path, json.dumps(data))
        assert not read_or_refused(kind, path)
    for text in ("[" * 10**6, '{"a":' * 10**5, '{"version": ' + "9" * 5000 + "}", ""):
        with_json(kind, path, text)
        assert not read_or_refused(kind, path)
    deep = {"list": []}
    for _ in range(400):
        deep = {"list": [deep]}
    with_json(kind, path, json.dumps(head(kind, "quantizers", deep)))
    read_or_refused(kind, path)
    deep = "[" * 900 + "]" * 900
    text = json.dumps(head(kind, "params", "DEEP")).replace('"DEEP"', deep)
    with_json(kind, path, text)
    assert kind in ENCODINGS or not read_or_refused(kind, path)


def head(kind, key, value):
    if kind not in ENCODINGS:
        return {"format": "jaxmet", "version": 1, key: value}
    names = ("encodings", "activation_encodings", "param_encodings")
    return {"version": kind} | dict.fromkeys(names, value)


def with_json(kind, path, text):
    data = text.encode()
    if kind in ENCODINGS:
        path.write_bytes(data)
    elif kind == "safetensors":
        header = json.dumps({"__metadata__": {"jaxmet": text}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
    else:
        with open(path, "wb") as file:
            np.savez_compressed(file, manifest=np.frombuffer(data, np.uint8))


def member(shape, data, dtype="<f4"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def archive(path, members, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members:
            file.writestr(name, data)


def test_archives_that_claim_more_than_they_have(tmp_path):
    path = tmp_path / "file"
    for shape in ("(10000000000,)", "(99999999999, 99999999999)", "(-4,)", "(2,)"):
        archive(path, [("manifest.npy", member(shape, b"\0" * 4))])
        assert not read_or_refused("npz", path)
    for dtype in ("|O", "|V8", "<U4"):
        archive(path, [("manifest.npy", member("(1,)", b"\0" * 16, dtype))])
        assert not read_or_refused("npz", path)
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        archive(path, [("manifest.npy", member("(10000000,)", bytes(4 * 10**7)))], kind)
        assert not read_or_refused("npz", path)
    archive(path, [("manifest", b"{}")])
    assert not read_or_refused("npz", path)
    # a directory that gives one member many names
    inner = io.BytesIO()
    archive(inner, [("a.npy", member("(1000000,)", bytes(4 * 10**6)))])
    with zipfile.ZipFile(inner, "a") as file:
        (one,) = file.infolist()
        for i in range(99):
            again = zipfile.ZipInfo(f"{i}.npy")
            for field in ("compress_type", "CRC", "compress_size", "file_size"):
                setattr(again, field, getattr(one, field))
            again.header_offset = one.header_offset
            file.filelist.append(again)
        file._didModify = True
    path.write_bytes(inner.getvalue())
    assert not read_or_refused("npz", path)
    # zeros that are deflated a thousandfold are no bomb
    jm.save(path, params=jnp.zeros((512, 512)), compress=True)
    assert path.stat().st_size < 2**13
    assert jm.load(path).params.shape == (512, 512)


def test_tensors_that_claim_more_than_there_is(tmp_path):
    path = tmp_path / "file"
    for header in (
        {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}},
        {"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
    ):
        text = json.dumps(header | {"__metadata__": {"jaxmet": "{}"}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
        assert not read_or_refused("safetensors", path)
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert not read_or_refused("safetensors", path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    old = written("safetensors", path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    for write in (
        lambda: jm.export.safetensors(path, {"w": jnp.ones(3)}, overwrite=True),
        lambda: jm.save(path, params={"w": jnp.ones(3)}),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert path.read_bytes() == old and os.listdir(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
import numpy as np
import jaxmet as jm
from jaxmet.tree import writing
path, kind = sys.argv[1:]
def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)
writing.os.fsync = kill  # the bytes are written, the name is not yet
if kind == "safetensors":
    jm.export.safetensors(path, {"w": np.ones(10**6)}, overwrite=True)
else:
    jm.save(path, params={"w": np.ones(10**6)})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_process_killed_while_it_writes_leaves_the_old_file(kind, tmp_path):
    path = tmp_path / "file"
    old = written(kind, path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == old and read_or_refused(kind, path)
    assert len(os.listdir(tmp_path)) == 2  # what it had written has a name of its own
