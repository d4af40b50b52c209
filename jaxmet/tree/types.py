"""Types that the signatures of public functions share.

Words that a function takes are a `Literal` beside the function, and the tuple that its check
reads is made of it, so that a type checker and the message name the same words.
"""

from typing import Literal, TypeVar

P = TypeVar("P")
"""A parameter tree: what a transform returns is of the type that it was given."""

Store = Literal["device", "host"]
"""Where values between two pieces of a model are kept for all batches."""

Rounded = Literal["weights", "both"]
"""What of the model is rounded while it is compared with float."""
