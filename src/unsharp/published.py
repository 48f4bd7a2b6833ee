"""The settings under which a step is that of the published code of Sharpness-Aware Machine Unlearning.

The code is https://github.com/HaoranTang/sharp-unlearn; docs/published-code.md says what it does differently.
"""

from __future__ import annotations

from typing import Any

from unsharp.errors import UserError

OF_LOOP: dict[str, Any] = {"optimizer": "adamw", "last_batch": "short", "cycle": "repeat"}
OF_METHODS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "gradient_ascent": {},
    "neggrad": {"sharpness_on": "joint"},
    "sharp_minmax": {"select": "smallest", "phase_steps": "alternate"},
}
OF_RULES: dict[str, dict[str, Any]] = {"none": {}, "sam": {"perturb": "all"}, "asam": {"perturb": "all"}}
OF_PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("sharp_minmax", "sam"): {"leak": True},
    ("sharp_minmax", "asam"): {"leak": True},
}


def published_settings(method: str, rule: str) -> dict[str, Any]:
    """The settings, by name, under which the method steps under the rule as the published code does.

    Learning rate, epochs, α, ρ and the like are not among them.

    Args:
        method: Name of the method.
        rule: Name of the rule.

    Raises:
        UserError: if the published code lacks the method or the rule, or steps in a way that is not offered.
    """
    for what, name, known in (("method", method, OF_METHODS), ("rule", rule, OF_RULES)):
        if name not in known:
            raise UserError(
                f"published: the steps of the published code are offered for {what} {', '.join(known)}, got {name!r}; "
                "leave published out, docs/published-code.md tells what else there is"
            )
    return OF_LOOP | OF_METHODS[method] | OF_RULES[rule] | OF_PAIRS.get((method, rule), {})
