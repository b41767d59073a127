"""Save and load sharded checkpoints with ``torch.distributed.checkpoint``.

Example::

    from msft_store.integrations.dcp import SavePlanner, StorageWriter
"""

from msft_store.integrations.dcp.boxes import boxes_of
from msft_store.integrations.dcp.planners import LoadPlanner, SavePlanner
from msft_store.integrations.dcp.storage import StorageReader, StorageWriter

__all__ = ["LoadPlanner", "SavePlanner", "StorageReader", "StorageWriter", "boxes_of"]
