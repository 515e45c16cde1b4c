import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cmamba_jax.bench.collectives import Collective, read_collectives

PROGRAM = """
  %a = f32[8,256]{1,0} all-reduce(f32[8,256]{1,0} %x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %b = (f32[10]{0}, bf16[4,2]{1,0}) all-reduce(%y, %z), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %c = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%w), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  %d = f32[8,4]{1,0} all-gather-done(%c)
  %e = (f32[3,8]{1,0:T(8,128)}, f32[3,8]{1,0:T(8,128)}, u32[]) collective-permute-start(%v), channel_id=4
  %g = s32[6]{0} all-reduce(%t), replica_groups=mesh['x'=4,'y'=2] {'x','y'}, to_apply=%add
  %h = s32[6]{0} all-reduce(%t), replica_groups=mesh['x'=4,'y'=2] {'x':(1)2}, to_apply=%add
  ROOT %f = f32[5]{0} reduce-scatter(%u), channel_id=5, replica_groups=[2,2]<=[4], dimensions={0}
"""


def test_sizes_and_groups_of_every_kind():
    assert read_collectives(PROGRAM) == [
        Collective("all-reduce", 8 * 256 * 4, 2),
        Collective("all-reduce", 10 * 4 + 8 * 2, 4),
        Collective("all-gather", 32 * 4, 4),
        Collective("collective-permute", 24 * 4, 2),
        Collective("all-reduce", 24, 8),
        Collective("all-reduce", 24, 2),
        Collective("reduce-scatter", 5 * 4, 2),
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("all-reduce", 150), ("all-gather", 75), ("all-to-all", 75), ("reduce-scatter", 300), ("collective-permute", 100)],
)
def test_bytes_sent_by_rings(kind, expected):
    assert Collective(kind, 100, 4).sent() == expected
    assert Collective(kind, 100, 1).sent() == 0


def test_a_sum_over_eight_devices_is_one_all_reduce():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    x = jax.ShapeDtypeStruct((8, 100), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    out = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda x: x.sum(0), out_shardings=out).lower(x).compile().as_text()
    assert read_collectives(program) == [Collective("all-reduce", 400, 8)]
