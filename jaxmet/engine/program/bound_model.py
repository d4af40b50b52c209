"""A model with its static keyword arguments filled in."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmet.engine.program.calls import Apply, is_array
from jaxmet.tree.named_leaves import flatten


def bound(apply: Apply, kwargs: dict[str, Any]) -> Apply:
    """The model with its static keyword arguments filled in."""
    static = {
        k: v for k, v in kwargs.items() if not any(is_array(a) for a in flatten(v)[1])
    }
    return WithArguments(apply, static) if static else apply


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WithArguments:
    """A model with some keyword arguments filled in."""

    model: Apply
    static: Mapping[str, Any]

    def __call__(self, params: Any, *inputs: Any, **more: Any) -> Any:
        return self.model(params, *inputs, **{**self.static, **more})
