"""MSFT around the user's own Trainer.

Example::

    from trainer.hf import MsftRun

    result = MsftRun(make_trainer, model, mixture, output_dir="run", base=PATH).train()
"""

from trainer.hf.run import MsftResult, MsftRun

__all__ = ["MsftResult", "MsftRun"]
