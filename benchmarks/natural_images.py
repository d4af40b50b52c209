"""Compose a set of natural pictures from Debian's artwork packages, the same for a seed.

    python benchmarks/natural_images.py pictures

Cut-out photographs of objects (`tuxpaint-stamps-default`) are laid on random crops of
photographed scenes (`mate-backgrounds`, `plasma-workspace-wallpapers`), at random sizes and
places and mirrored at random. `pictures/calibration` and `pictures/evaluation` share no object.
The packages are fetched with `apt-get download`, or read from a folder given with --packages.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = (
    "tuxpaint-stamps-default",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
)
SIDE = 260
COLOURS = 5000  # a drawing has fewer


def fetch(folder: Path) -> None:
    """The packages' files into a folder, from Debian."""
    for package in PACKAGES:
        try:
            done = subprocess.run(
                ["apt-get", "download", package],
                cwd=folder,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise SystemExit(
                "natural_images.py: there is no apt-get here. Fetch the Debian packages "
                f"{', '.join(PACKAGES)} elsewhere and name their folder with --packages."
            ) from None
        if done.returncode:
            raise SystemExit(
                f"natural_images.py: apt-get could not download {package}: "
                f"{done.stderr.strip().splitlines()[-1]}. Try `apt-get update` first."
            )


def unpack(packages: Path, folder: Path) -> None:
    """All packages into one folder; raises SystemExit for one that is missing."""
    for package in PACKAGES:
        found = sorted(packages.glob(f"{package}_*.deb"))
        if not found:
            raise SystemExit(
                f"natural_images.py: {packages} holds no {package}_*.deb. "
                f"It takes all of {', '.join(PACKAGES)}."
            )
        subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(folder)], check=True)


def objects(folder: Path) -> list[Path]:
    """Cut-out photographs of a fair size: pictures with a mask and many colours."""
    found = []
    for path in sorted((folder / "usr/share/tuxpaint/stamps").rglob("*.png")):
        with Image.open(path) as image:
            if min(image.size) < 80 or image.mode not in ("RGBA", "LA", "P"):
                continue
            pixels = np.asarray(image.convert("RGBA").convert("RGB"), np.uint32)
        colours = np.unique(pixels @ np.array([1, 256, 65536], np.uint32))
        if colours.size >= COLOURS:
            found.append(path)
    return found


def scenes(folder: Path) -> list[Path]:
    """The largest JPEG of every wallpaper."""
    largest: dict[Path, Path] = {}
    for path in sorted((folder / "usr/share").rglob("*.jpg")):
        wallpaper = path if path.parent.name == "nature" else path.parent
        if path.stem == "screenshot":
            continue
        if wallpaper not in largest or _area(path) > _area(largest[wallpaper]):
            largest[wallpaper] = path
    return sorted(largest.values())


def _area(path: Path) -> int:
    with Image.open(path) as image:
        return image.size[0] * image.size[1]


def composed(
    rng: np.random.Generator, scene: Image.Image, stamps: list[Path]
) -> Image.Image:
    """One picture: a crop of the scene, and one or two objects on it."""
    share = rng.uniform(0.35, 1.0)
    side = max(SIDE, int(share * min(scene.size)))
    side = min(side, *scene.size)
    left, top = (int(rng.integers(0, n - side + 1)) for n in scene.size)
    box = (left, top, left + side, top + side)
    picture = scene.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    for _ in range(int(rng.integers(1, 3))):
        stamp = Image.open(stamps[rng.integers(len(stamps))]).convert("RGBA")
        long = rng.uniform(0.4, 0.95) * SIDE
        size = [max(1, round(n * long / max(stamp.size))) for n in stamp.size]
        stamp = stamp.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x, y = (int(rng.integers(0, SIDE - n + 1)) for n in stamp.size)
        picture.paste(stamp, (x, y), stamp)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture


def compose(
    folder: Path, out: Path, calibration: int, evaluation: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stamps, wallpapers = objects(folder), scenes(folder)
    if len(stamps) < 2 or not wallpapers:
        raise SystemExit(
            "natural_images.py: the packages hold no pictures that it knows."
        )
    order = rng.permutation(len(stamps))
    third = max(1, len(stamps) // 3)
    halves = {"calibration": (order[:third], calibration),
              "evaluation": (order[third:], evaluation)}  # fmt: skip
    loaded = [Image.open(path).convert("RGB") for path in wallpapers]
    for name, (mine, number) in halves.items():
        (out / name).mkdir(parents=True)
        own = [stamps[i] for i in mine]
        for i in range(number):
            scene = loaded[rng.integers(len(loaded))]
            composed(rng, scene, own).save(out / name / f"{i:03d}.jpg", quality=92)
    print(
        f"{out}: {calibration} pictures to calibrate on and {evaluation} to measure on, "
        f"of {len(stamps)} objects and {len(loaded)} scenes, seed {seed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--packages", type=Path, help="folder with the .deb files")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--evaluation", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists; nothing is overwritten")
    with tempfile.TemporaryDirectory() as work:
        folder, packages = Path(work) / "unpacked", args.packages
        folder.mkdir()
        if packages is None:
            packages = Path(work)
            fetch(packages)
        unpack(packages, folder)
        compose(folder, args.out, args.calibration, args.evaluation, args.seed)


if __name__ == "__main__":
    main()
