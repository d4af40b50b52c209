from jaxmet.engine.node import Node
