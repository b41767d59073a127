"""Keep the checkpoints of a Hugging Face Trainer in a store.

Example::

    trainer = Trainer(..., callbacks=[StoreCallback("run/store")])
"""

from msft_store.integrations.hf.callback import StoreCallback
from msft_store.integrations.hf.peft import KeptModel, find_local_model

__all__ = ["KeptModel", "StoreCallback", "find_local_model"]
