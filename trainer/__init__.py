"""Multi-task supervised fine-tuning with rollback: MSFT and the methods it is compared with.

The command is ``msft-train`` (:mod:`trainer.cli.main`). The algorithm is
:mod:`trainer.algorithms.msft`, and :mod:`trainer.training.loop` carries out its decisions.

Example::

    from trainer import compare, load_config, resume, run

    result = run(load_config("examples/stdlib_tasks/demo.yaml"))
"""

import lazy_loader

# For type checkers and lazy_loader alike, __init__.pyi states the public names and their modules.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
