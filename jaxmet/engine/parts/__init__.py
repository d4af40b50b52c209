"""Programs on arrays of which only some channels are left: a rule a primitive."""

from jaxmet.engine.parts.partial import Partial as Partial
from jaxmet.engine.parts.partial import Uniform as Uniform
from jaxmet.engine.parts.partial import taken as taken
from jaxmet.engine.parts.partial import whole as whole
from jaxmet.engine.parts.rules import RULES as RULES
