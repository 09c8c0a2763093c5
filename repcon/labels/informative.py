"""Detects teachers whose labels of these images hardly carry information."""

import math

from repcon.runtime.console import console

NEARLY_UNIFORM = 0.9
"""Share of the maximal entropy above which a teacher's mean entropy counts as uninformative."""
ONE_CLASS = 0.9
"""Share of the crops with the same top class above which a teacher counts as uninformative."""
REMEDY = "images that show some of its classes help, and a teacher trained without label smoothing"


def why_uninformative(entropy_nat: float, classes: int, top_share: float) -> str:
    """Why a teacher's labels are uninformative, and what helps; empty where they are not.

    entropy_nat: mean over crops at temperature 1. top_share: of the crops with the most frequent class on top.
    """
    most = math.log(classes)
    if entropy_nat > NEARLY_UNIFORM * most:
        return f"its answers are nearly uniform (entropy {entropy_nat:.2f} of at most {most:.2f} nat); {REMEDY}"
    if top_share > ONE_CLASS:
        return f"the same class is on top of {100 * top_share:.0f} % of its answers; {REMEDY}"
    return ""


def warn_uninformative(teacher: str, reason: str) -> None:
    """Prints the reason that `why_uninformative` gives."""
    line = f"warning: teacher {teacher} tells little about these images: {reason}"
    console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
