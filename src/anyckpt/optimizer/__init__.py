"""Optimizer state by parameter, whatever container it came from and goes to.

The neutral form is ``checkpoint.OptimizerState``: slots by weight's name, which are renamed, joined and cut as the
weights are.  Formats of one file per rank find it themselves; ``read.with_optimizer`` finds it in all others, and
``write.laid_out`` puts it into the form that a target format keeps.
"""
