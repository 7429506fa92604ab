"""The methods of sparse training, one file each; `METHODS` has all that are imported here."""

from .acdc import Acdc as Acdc
from .base import Allocated as Allocated
from .base import DropAndGrow as DropAndGrow
from .base import Method as Method
from .gap import Gap as Gap
from .gmp import Gmp as Gmp
from .granet import Granet as Granet
from .magnitude import Magnitude as Magnitude
from .rigl import Rigl as Rigl
from .rigl_reset import RiglReset as RiglReset
from .set import Set as Set
from .snfs import Snfs as Snfs
from .snip import Snip as Snip
from .srigl import Srigl as Srigl
from .static import Static as Static

METHODS: dict[str, type[Allocated]] = {
    found.name: found
    for found in list(vars().values())
    if isinstance(found, type) and issubclass(found, Allocated) and hasattr(found, "name")
}
"""Name -> method."""
