"""Cross-layer equalization."""

from jaxmet.transforms.equalize.equalize import equalize as equalize
