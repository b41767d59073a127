"""Keep the checkpoints of a Hugging Face Trainer in a store.

Example::

    trainer = Trainer(..., callbacks=[StoreCallback("run/store")])
"""

from msft_store.integrations.hf.callback import StoreCallback

__all__ = ["StoreCallback"]
