"""What the public calls are told, checked before any work."""

from typing import Literal, get_args

Method = Literal["coordinate", "adam", "gram"]
METHODS = get_args(Method)
Scales = Literal["given", "search", "refit"]
SCALES = get_args(Scales)
