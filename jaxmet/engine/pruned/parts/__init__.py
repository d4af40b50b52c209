"""Programs on arrays of which only some channels are left: a rule a primitive."""

from jaxmet.engine.pruned.parts.partial import Partial as Partial
from jaxmet.engine.pruned.parts.partial import Uniform as Uniform
from jaxmet.engine.pruned.parts.partial import taken as taken
from jaxmet.engine.pruned.parts.partial import whole as whole
from jaxmet.engine.pruned.parts.rules import RULES as RULES
