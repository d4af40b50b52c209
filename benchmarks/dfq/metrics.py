"""mIoU and mAP, each with what it is on resampled scenes.

The counts are scikit-learn's (`confusion_matrix`) and pycocotools' (`COCOeval`). A
`Score` holds the metric on all scenes and on bootstrap resamples of them; resamples of
two scores are of the same scenes, so that their difference is a paired one.
"""

import contextlib
import os
from typing import Any, NamedTuple

import numpy as np

from dfq.networks import CLASSES
from dfq.scenes import Scenes

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from sklearn.metrics import confusion_matrix
except ImportError as error:
    raise ImportError(
        f"dfq.metrics: {error.name} is not installed. Run "
        "`pip install '.[benchmarks]'`."
    ) from error

RESAMPLES = 200
FAINTEST = 0.01  # detections with a lower score are not counted

Array = np.ndarray[Any, Any]


class Score(NamedTuple):
    """A metric in percent, on all scenes and on resamples of them."""

    value: float
    resampled: Array

    def text(self) -> str:
        """The value with half of its 95 % interval."""
        return f"{self.value:.2f} ± {1.96 * self.resampled.std():.2f}"

    def change(self, reference: "Score") -> str:
        """The paired difference to another score, likewise."""
        spread = 1.96 * (self.resampled - reference.resampled).std()
        return f"{self.value - reference.value:+.2f} ± {spread:.2f}"


def draws(scenes: int, seed: int = 0) -> Array:
    """The scenes of each bootstrap resample: `(RESAMPLES, scenes)` numbers."""
    return np.random.default_rng(seed).integers(0, scenes, (RESAMPLES, scenes))


def mean_iou(found: Array, scenes: Scenes) -> Score:
    """Intersection over union of pixels, the mean over classes; `found` as labels."""
    every = range(CLASSES)
    counts = np.stack(
        [
            confusion_matrix(truth.ravel(), guess.ravel(), labels=every)
            for truth, guess in zip(scenes.labels, found, strict=True)
        ]
    ).astype(np.float64)

    def of(total: Array) -> Array:
        both = np.diagonal(total, axis1=-2, axis2=-1)
        either = total.sum(-1) + total.sum(-2) - both
        present = total.sum(-1) > 0
        shares = np.where(present, both / np.maximum(either, 1), 0)
        return 100 * shares.sum(-1) / present.sum(-1)

    chosen = draws(len(counts))
    often = np.stack([np.bincount(row, minlength=len(counts)) for row in chosen])
    return Score(
        float(of(counts.sum(0))), of(np.tensordot(often.astype(float), counts, 1))
    )


def mean_ap(boxes: Array, scores: Array, scenes: Scenes) -> Score:
    """Average precision at an overlap of 0.5 (COCO's 101 points), mean over classes.

    `boxes` `(scenes, classes, detections, 4)` and `scores` are what `boxes.detect` gives.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        evaluation = COCOeval(_truth(scenes), _detections(boxes, scores), "bbox")
        settings = evaluation.params
        settings.iouThrs = np.array([0.5])
        settings.areaRng, settings.areaRngLbl = [[0, 1e10]], ["all"]
        settings.maxDets = [100]
        evaluation.evaluate()
        per_class = np.empty(len(evaluation.evalImgs), object)
        per_class[:] = evaluation.evalImgs
        per_class = per_class.reshape(CLASSES - 1, len(scenes.images))

        def of(chosen: Array) -> float:
            evaluation.evalImgs = list(per_class[:, chosen].ravel())
            evaluation.accumulate()
            precision = evaluation.eval["precision"]  # -1 where a class is absent
            return 100 * float(precision[precision > -1].mean())

        whole = of(np.arange(len(scenes.images)))
        return Score(whole, np.array([of(row) for row in draws(len(scenes.images))]))


def _truth(scenes: Scenes) -> COCO:
    """The scenes' boxes as pycocotools wants them."""
    rows = []
    for scene, (boxes, classes) in enumerate(
        zip(scenes.boxes, scenes.classes, strict=True)
    ):
        rows += [
            _row(scene, kind, box, len(rows) + i + 1)
            for i, (box, kind) in enumerate(
                zip(boxes[classes > 0], classes[classes > 0], strict=True)
            )
        ]
    return _dataset(len(scenes.images), rows)


def _detections(boxes: Array, scores: Array) -> COCO:
    rows = [
        _row(scene, kind + 1, boxes[scene, kind, i], number)
        | {"score": float(scores[scene, kind, i])}
        for number, (scene, kind, i) in enumerate(
            np.argwhere(scores > FAINTEST).tolist(), 1
        )
    ]
    return _dataset(len(boxes), rows)


def _row(scene: int, kind: int, box: Array, number: int) -> dict[str, Any]:
    x1, y1, x2, y2 = map(float, box)
    return {
        "id": number,  # from 1 on: COCOeval takes 0 for unmatched
        "image_id": scene,
        "category_id": int(kind),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
    }


def _dataset(scenes: int, rows: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": n} for n in range(scenes)],
        "categories": [{"id": kind} for kind in range(1, CLASSES)],
        "annotations": rows,
    }
    coco.createIndex()
    return coco
