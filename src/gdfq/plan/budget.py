"""The effort of a plan with a budget."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gdfq.analysis.run_costs import measure_costs
from gdfq.effort import Effort, effort_within
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.files.states import Results
from gdfq.graph.inputs import takes_images
from gdfq.plan.method import Method
from gdfq.plan.plan import Plan, Timing
from gdfq.recipes import Recipe, effort_rule

_MEASURED_SHARE = 0.02
"""Share of a budget that further steps of each kind are measured for, after the first ones."""


_RECORD = "effort"
"""The part of a checkpoint that has the effort of a run with a budget."""


def within_budget(
    plan: Plan, method: Method, untuned: Recipe, context: Context, timing: Timing
) -> Plan:
    """Return the plan with the effort of its budget: that of its checkpoint, or else a new one.

    A run that resumes takes the effort that it started with, and measures nothing.

    Args:
        plan: The plan, with the effort of its recipe.
        method: What the user asks for.
        untuned: The recipe of a budget that is too short to tune, for the inputs of the network.
        context: Context of the run.
        timing: When its time began, and what follows the run.
    """
    assert plan.budget is not None
    assert timing.started is not None
    recorded = context.checkpointer.recorded(_RECORD)
    seconds: float | None = None
    if recorded is None:
        effort, seconds = _measured_effort(plan, plan.budget, method, context, timing)
    else:
        effort = _recorded_effort(recorded, plan.budget)
    record = Results(budget=plan.budget, **effort.as_values())
    context.checkpointer.register(_RECORD, record)
    if not effort.steps:
        plan = replace(plan, recipe=untuned)
    return replace(plan.with_effort(effort), planned_seconds=seconds)


def _recorded_effort(recorded: Mapping[str, Any], budget: float) -> Effort:
    """Return the effort that a checkpoint has for a budget."""
    before = recorded.get("budget")
    if before != budget:
        raise UsageError(
            f"a run resumes with the settings that it started with; its budget was {before} s and "
            f"is {budget} s. Use the old budget, or start in another folder."
        )
    return Effort(recorded.get("images"), recorded.get("iterations"), recorded.get("steps", 0))


def _measured_effort(
    plan: Plan, budget: float, method: Method, context: Context, timing: Timing
) -> tuple[Effort, float]:
    """Return the effort that fits into a budget, and the seconds that it is expected to take.

    All processes measure at the same time, as they will work, and take the first one's numbers.
    """
    costs = measure_costs(
        plan.teacher,
        plan.scheme,
        plan.carried_out,
        context,
        following=timing.following,
        least=_MEASURED_SHARE * budget,
    )
    passed = time.perf_counter() - (timing.started or 0.0)
    costs = costs.after(passed).agreed(context.group, plan.teacher.device)
    shape = plan.teacher.input_shape if takes_images(plan.teacher.inputs) else ()
    effort = effort_within(budget, costs, effort_rule(method.recipe, shape))
    return effort, costs.seconds(effort)
