"""The command line: a report and the check of a file, for a model in a module of the user's."""

import sys
import textwrap
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.__main__ import main

SOURCE = """
import jax.numpy as jnp

def apply(params, x):
    return jnp.maximum(x @ params["one"], 0) @ params["two"]

class both:
    @staticmethod
    def apply(params, x, y):
        return apply(params, x) + y
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module, a saved tree with its quantizers, examples, and a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    Path("its_nets.py").write_text(textwrap.dedent(SOURCE))
    rng = np.random.default_rng(0)
    drawn = lambda *shape: jax.device_put(np.float32(rng.normal(size=shape)))
    params, x = {"one": drawn(4, 6), "two": drawn(6, 3)}, drawn(10, 4)
    scope = {}
    exec(SOURCE, scope)
    apply = scope["apply"]
    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], progress=False)
    jm.save("net.npz", params=params, quantizers=quantizers)
    jm.save("params.npz", params=params)
    np.save("x.npy", x)
    np.savez("xy.npz", x=x, y=np.ones((10, 3), np.float32))
    jm.export.stablehlo("net.jax", apply, params, quantizers, x[:1])
    yield apply, params, quantizers, x
    sys.modules.pop("its_nets", None)


def test_a_file_is_checked(folder, capsys):
    apply, params, quantizers, x = folder
    main(["check", "net.jax", "its_nets:apply", "net.npz", "x.npy"])
    out = capsys.readouterr().out
    assert "export.check: net.jax in jax" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("output")]
    y = np.asarray(apply(params, x), np.float64)
    error = y - np.asarray(jm.simulate(apply, quantizers)(params, x))
    wanted = 10 * np.log10(np.sum(y**2) / np.sum(error**2))
    assert any(
        cell.replace(".", "").isdigit() and abs(float(cell) - wanted) < 0.1
        for cell in row
    )


def test_a_report_is_written(folder, capsys):
    main(["report", "its_nets:apply", "net.npz", "x.npy", "-o", "out.html"])
    assert capsys.readouterr().out.strip() == "out.html"
    text = Path("out.html").read_text()
    assert "two" in text and "noise" in text


def test_several_inputs_and_a_method(folder, capsys):
    _, params, _, x = folder
    apply = lambda p, x, y: jnp.maximum(x @ p["one"], 0) @ p["two"] + y
    y = np.ones((10, 3), np.float32)
    quantizers = jm.calibrate(
        params, jm.trace(apply, params, x, y), [(x, y)], progress=False
    )
    jm.save("both.npz", params=params, quantizers=quantizers)
    main(["report", "its_nets:both.apply", "both.npz", "xy.npz"])
    assert Path(capsys.readouterr().out.strip()).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "net.jax", "its_nets.apply", "net.npz", "x.npy"], "module:function"),
        (["check", "net.jax", "its_nets:nothing", "net.npz", "x.npy"], "nothing"),
        (
            ["check", "net.jax", "no_such_nets:apply", "net.npz", "x.npy"],
            "no_such_nets",
        ),
        (["check", "gone.jax", "its_nets:apply", "net.npz", "x.npy"], "gone.jax"),
        (["check", "net.jax", "its_nets:apply", "gone.npz", "x.npy"], "gone.npz"),
        (["check", "net.jax", "its_nets:apply", "net.npz", "gone.npy"], "gone.npy"),
        (["report", "its_nets:apply", "params.npz", "x.npy"], "holds no quantizers"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, arguments, said):
    with pytest.raises(SystemExit, match=said) as found:
        main(arguments)
    assert "\n" not in str(found.value)


def test_the_command_and_its_help(capsys):
    for arguments in (["--help"], ["check", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as found:
            main(arguments)
        assert found.value.code == 0
        text = capsys.readouterr().out
        assert "usage: jaxmet" in text and "%%" not in text
    project = tomllib.loads(
        (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    )
    assert project["project"]["scripts"] == {"jaxmet": "jaxmet.__main__:main"}
