"""The flags that say which devices rounds run on."""

from absl import flags

from zofl_jax.configuration.experiment import Devices
from zofl_jax.engine import placement

from . import entry

flags.DEFINE_integer(
    "devices",
    None,
    "Devices that the clients of a round are shared out over. Unless given, all accelerators; on a "
    "CPU its cores for convolutional models, 1 for others. With --distributed, of each process.",
    lower_bound=1,
)
flags.DEFINE_string(
    "mesh",
    None,
    "Devices of all processes as clients:N,model:M in place of --devices: N groups share the "
    "clients out, and the M devices of a group hold the params together, for models larger than "
    "one; clients:N may be left out.",
)


def chosen() -> Devices:
    """Returns what --devices or --mesh says.

    Raises:
      UserError: for both, or a mesh that isn't one.
    """
    devices, mesh = flags.FLAGS.devices, flags.FLAGS.mesh
    if mesh is None:
        return devices
    if devices is not None:
        raise entry.UserError("--devices and --mesh say the same in two ways: leave one out")
    try:
        return placement.parse(mesh)
    except ValueError as error:
        raise entry.UserError(f"--mesh={mesh}: {error}") from error
