"""Keep the checkpoints of a Hugging Face Trainer in a store, and load models from it.

Example::

    trainer = Trainer(..., callbacks=[StoreCallback("run/store")])
    model = from_pretrained("run/store@best")
"""

from msft_store.integrations.hf.callback import StoreCallback
from msft_store.integrations.hf.loading import from_pretrained
from msft_store.integrations.hf.peft import KeptModel, find_local_model

__all__ = ["KeptModel", "StoreCallback", "find_local_model", "from_pretrained"]
