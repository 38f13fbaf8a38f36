"""The built-in hub: a real HTTP server that the unmodified `huggingface_hub` client can push to and pull from.

For rehearsals (`publish hub`), the demo and the tests of `push`. Files on disk, no accounts, loopback only, no Xet.
It knows nothing of the rest of the project.
"""

from publisher.localhub.faults import Fault, Faults, Stats
from publisher.localhub.server import LocalHub, run, start_in_thread
from publisher.localhub.store import FolderInUse

__all__ = ["Fault", "Faults", "FolderInUse", "LocalHub", "Stats", "run", "start_in_thread"]
