"""The built-in hub: a real HTTP server that unmodified clients of the Hub can push to and pull from, with LFS or Xet.

For rehearsals (`publish hub`), the demo and the tests of `push`. Files on disk, no accounts, loopback only. It knows
nothing of the rest of the project. docs/hub.md says what it does and what it does not.
"""

from publisher.localhub.faults import Fault, Faults, Stats
from publisher.localhub.server import LocalHub, run, start_in_thread
from publisher.localhub.store import FolderInUse

__all__ = ["Fault", "Faults", "FolderInUse", "LocalHub", "Stats", "run", "start_in_thread"]
