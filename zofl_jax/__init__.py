"""Federated learning that exchanges a few scalars instead of a model, in JAX.

    import zofl_jax as zofl

    zofl.simulate("digits", "decomfl", rounds=400)  # as the command does, by its settings' names

    simulator = zofl.make_simulator(algorithm, task, clients_per_round=5, batch_size=32)
    outcome = zofl.train(simulator, workdir="runs/mine", rounds=400)

The names here are what a notebook needs; `dir(zofl)` lists them. Each is imported when it is first
used, so the import itself takes no time. All else is in the modules that WORKSPACE.md maps.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zofl_jax import algorithms, keys
    from zofl_jax.conditions import aggregation, attacks, compression, participation, privacy
    from zofl_jax.configuration.resolve import resolve
    from zofl_jax.core import Algorithm, Phase, Task
    from zofl_jax.data import partition, sources
    from zofl_jax.directions import estimators, perturbations
    from zofl_jax.engine import budgets
    from zofl_jax.engine.rounds import Conditions
    from zofl_jax.engine.simulation import Diverged, make_simulator, run
    from zofl_jax.models import cnn, mlp
    from zofl_jax.observation import diagnostics, fronts, plots
    from zofl_jax.runs.directory import RunError
    from zofl_jax.tasks import objectives, quadratic, vision
    from zofl_jax.training import observers
    from zofl_jax.training.described import simulate
    from zofl_jax.training.loop import train
    from zofl_jax.training.summaries import About, table

__version__ = "0.1.0"

__all__ = [
    "About",
    "Algorithm",
    "Conditions",
    "Diverged",
    "Phase",
    "RunError",
    "Task",
    "aggregation",
    "algorithms",
    "attacks",
    "budgets",
    "cnn",
    "compression",
    "diagnostics",
    "estimators",
    "fronts",
    "keys",
    "make_simulator",
    "mlp",
    "objectives",
    "observers",
    "participation",
    "partition",
    "perturbations",
    "plots",
    "privacy",
    "quadratic",
    "resolve",
    "run",
    "simulate",
    "sources",
    "table",
    "train",
    "vision",
]

_MODULES = {
    "": ("algorithms", "keys"),
    "conditions": ("aggregation", "attacks", "compression", "participation", "privacy"),
    "data": ("partition", "sources"),
    "directions": ("estimators", "perturbations"),
    "engine": ("budgets",),
    "models": ("cnn", "mlp"),
    "observation": ("diagnostics", "fronts", "plots"),
    "tasks": ("objectives", "quadratic", "vision"),
    "training": ("observers",),
}
_MEMBERS = {
    "core": ("Algorithm", "Phase", "Task"),
    "engine.rounds": ("Conditions",),
    "engine.simulation": ("Diverged", "make_simulator", "run"),
    "runs.directory": ("RunError",),
    "configuration.resolve": ("resolve",),
    "training.described": ("simulate",),
    "training.loop": ("train",),
    "training.summaries": ("About", "table"),
}


def __getattr__(name: str) -> Any:
    """Imports a name of the front door at its first use."""
    for room, names in _MODULES.items():
        if name in names:
            found = importlib.import_module(".".join(filter(None, (__name__, room, name))))
            break
    else:
        module = next((module for module, names in _MEMBERS.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
