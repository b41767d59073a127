from msft_store.integrations.hf.callback import StoreCallback

__all__ = ["StoreCallback"]
