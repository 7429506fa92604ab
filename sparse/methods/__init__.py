"""The methods of sparse training, one file each; `METHODS` has all that are imported here."""

from sparse.methods.base import Allocated as Allocated
from sparse.methods.base import DropAndGrow as DropAndGrow
from sparse.methods.base import Method as Method
from sparse.methods.gmp import Gmp as Gmp
from sparse.methods.rigl import Rigl as Rigl
from sparse.methods.rigl_reset import RiglReset as RiglReset
from sparse.methods.set import Set as Set
from sparse.methods.snfs import Snfs as Snfs
from sparse.methods.snip import Snip as Snip
from sparse.methods.static import Static as Static

METHODS: dict[str, type[Allocated]] = {
    found.name: found
    for found in list(vars().values())
    if isinstance(found, type) and issubclass(found, Allocated) and hasattr(found, "name")
}
"""Name -> method."""
