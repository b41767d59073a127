"""Integrations with other libraries. ``import msft_store`` imports none of them.

Example::

    from msft_store.integrations.dcp import SavePlanner, StorageWriter
"""
