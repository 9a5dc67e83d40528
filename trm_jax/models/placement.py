"""Where a value inside a jitted function lies: hints to the partitioner, nothing without a mesh.

The mesh is that of the context (`jax.set_mesh`), which the training loop enters.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped


def sharded_rows(x: Shaped[Array, " n *rest"]) -> Shaped[Array, " n *rest"]:
    """`x` cut along its first axis over all devices of the mesh; n need not divide evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def replicated(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x` whole on every device of the mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())
