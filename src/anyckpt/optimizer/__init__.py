"""Optimizer state by parameter, whatever container it came from and goes to.

The neutral form is ``checkpoint.OptimizerState``: slots by weight's name, which are renamed, joined and cut as the
weights are.  Formats of one file per rank find it themselves; ``with_optimizer`` finds it in all others, and
``laid_out`` puts it into the form that a target format keeps.
"""

from anyckpt.optimizer.read import holds_optimizer, with_optimizer
from anyckpt.optimizer.state import checked, renamed, with_masters
from anyckpt.optimizer.write import has_another_form, laid_out

__all__ = ["checked", "has_another_form", "holds_optimizer", "laid_out", "renamed", "with_masters", "with_optimizer"]
