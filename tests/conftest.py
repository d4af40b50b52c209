"""What every test runs under: eight CPU devices and JAX at its strictest.

JAXMET_TYPECHECK=0 switches the run-time check of array shapes and types off. Most of the
time goes into compiling: programs are compiled without most optimizations, which
JAXMET_OPTIMIZE=1 brings back, and kept in .pytest_cache for all workers and the next run.
"""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
OPTIMIZE = os.environ.get("JAXMET_OPTIMIZE", "0") != "0"
FLAGS = ["--xla_force_host_platform_device_count=8"]
JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))
if not OPTIMIZE and JAXLIB < (0, 11):  # a quarter of the time; later releases lack them
    FLAGS += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
# Read when JAX first looks for devices, so before anything imports it.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

import collections
import gc
import importlib.util
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

# Traces make many objects that stay: to look through them often takes a tenth of the time.
gc.set_threshold(50_000, 20, 100)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if not OPTIMIZE:
    jax.config.update("jax_disable_most_optimizations", True)
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def annotated() -> list[str]:
    """The modules that state shapes and dtypes; the others are the type checker's alone."""
    spec = importlib.util.find_spec("jaxmet")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    return [
        ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for path in sorted(root.rglob("*.py"))
        if "from jaxtyping import" in path.read_text("utf-8")
    ]


if os.environ.get("JAXMET_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook(annotated(), "beartype.beartype")

hypothesis.settings.register_profile(
    "jaxmet",
    deadline=None,  # the first example of a test compiles
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxmet")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`one_in(n)`: the cases in between are slow."""
    met: collections.Counter[tuple[Path, str]] = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is not None:
            function = item.path, getattr(item, "originalname", item.name)
            if met[function] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            met[function] += 1


@pytest.fixture
def keys(request: pytest.FixtureRequest) -> Iterator[jax.Array]:
    """Fresh PRNG keys from `next(keys)`: the same in each run, others in each test."""
    root = jax.random.key(zlib.crc32(request.node.nodeid.encode()))
    return (jax.random.fold_in(root, i) for i in itertools.count())
