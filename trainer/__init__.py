"""Multi-task supervised fine-tuning that goes back in time: MSFT and what it is compared with.

The command is ``msft-train`` (:mod:`trainer.cli.main`), the algorithm is
:mod:`trainer.algorithms.msft`, and the loop that acts on its decisions is
:mod:`trainer.training.loop`.

Example::

    msft-train run examples/stdlib_tasks/demo.yaml
"""
