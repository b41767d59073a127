"""The public names of :mod:`msft_store.remote`: push, pull, clone and open a remote store.

Example::

    from msft_store.integrations.remote import push
"""

from msft_store.remote.api import clone, pull, push, upgrade
from msft_store.remote.transfer import Transfer
from msft_store.store import open_remote

__all__ = ["Transfer", "clone", "open_remote", "pull", "push", "upgrade"]
