from msft_store.remote.api import clone, open_remote, pull, push
from msft_store.remote.transfer import Transfer

__all__ = ["Transfer", "clone", "open_remote", "pull", "push"]
