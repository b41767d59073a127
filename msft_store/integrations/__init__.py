"""The store behind other libraries' interfaces; each module needs its library, and none is imported
by ``import msft_store``.

Example::

    from msft_store.integrations.dcp import SavePlanner, StorageWriter
"""
