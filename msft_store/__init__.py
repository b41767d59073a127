"""A content-addressed delta store for model checkpoints.

A checkpoint costs only what changed: chunks that are equal to the base model or to another
checkpoint cost nothing, the others are kept as compressed differences, and every restore is
bit-exact and verified. Every error that this package raises on purpose is a :class:`StoreError`.

Example::

    from msft_store import KeepBest, Store, Timeline

    store = Store.create("run/store")
    base = store.add_base("Qwen2.5-0.5B")
    timeline = Timeline(store, base, retention=KeepBest("overall", 3))
    ckpt = timeline.commit(model.state_dict(), step=10, metrics={"overall": 0.41})
    timeline.rollback(ckpt, into=model)
"""

import lazy_loader

__version__ = "0.1.0"

# For type checkers and lazy_loader alike, __init__.pyi states the public names and their modules.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
