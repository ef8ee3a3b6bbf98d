"""The learning rates of a comparison: as asked, or the best of a sweep; and the sweep itself."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """How one comparison sweeps learning rates, and where sweeps are kept.

    **Attributes:**

    - `file`: the sweeps that are committed. What one of the same name in the output folder has comes first, arm by arm.
    - `same`: in what a sweep must agree with a setting.
    - `near`: in what it should, the most telling first.
    - `shape`: what else of a setting is kept with a sweep.
    - `metric`: what of a result is looked at, `plural` its name in a sweep, and `title` that of the table.
    - `best`: `min` or `max`.
    - `show`: writes one number.
    """

    file: pathlib.Path
    same: tuple[str, ...]
    near: tuple[str, ...]
    shape: tuple[str, ...]
    metric: str
    plural: str
    title: str
    best: Callable[..., float]
    show: Callable[[float], str]

    def rates(self, options: Any, setting: Any, names: list[str]) -> dict[str, float]:
        """The learning rate of each arm: as asked, or as tuned for the nearest shapes at which it was tuned; none where
        they are to be swept. Prints where that is not what was asked for: other shapes, and arms that were never tuned."""
        if options.tune:
            if options.learning_rate is not None:
                raise SystemExit(
                    f"--tune sweeps --grid, and --learning-rate {options.learning_rate:g} would fix it: give one"
                )
            return {}
        if options.learning_rate is not None:
            return {name: options.learning_rate for name in names}
        sweeps = self._nearest(options, setting)
        usual = sorted(sweeps[0]["best"].values())[len(sweeps[0]["best"]) // 2]
        found, elsewhere, untuned = {}, {}, []
        for name in names:
            # An arm with a policy of the cache learns at the rate of the arm that shares nothing.
            like = name.partition(", ")[0]
            sweep = next((sweep for sweep in sweeps if {name, like} & sweep["best"].keys()), None)
            if sweep is None:
                untuned.append(name)
                found[name] = usual
                continue
            found[name] = sweep["best"].get(name, sweep["best"].get(like))
            if apart := {key: sweep[key] for key in self.near if sweep[key] != getattr(setting, key)}:
                elsewhere.setdefault(str(apart), []).append(name)
        for apart, arms in elsewhere.items():
            print(
                f"learning rates of {', '.join(arms)} were tuned at {apart}, not at these shapes: --tune does it for these"
            )
        if untuned:
            print(
                f"no learning rate is tuned for {', '.join(untuned)}: {usual:g}, the median of the others, is taken; --tune does it"
            )
        return found

    def _nearest(self, options: Any, setting: Any) -> list[dict[str, Any]]:
        """The sweeps that a setting can learn from: its own before those that are committed, of each the nearest first."""
        far = lambda sweep: tuple(abs(sweep[name] - getattr(setting, name)) for name in self.near)
        found = []
        for path in (options.output / self.file.name, self.file):
            sweeps = json.loads(path.read_text("utf-8"))["sweeps"] if path.exists() else []
            alike = (sweep for sweep in sweeps if all(sweep[name] == getattr(setting, name) for name in self.same))
            found += sorted(alike, key=far)
        if not found:
            raise SystemExit(
                f"no learning rate is tuned for {setting.optimizer}: give --learning-rate, or run with --tune first"
            )
        return found

    def tuned(self, options: Any, setting: Any, arms: list[Any], results: list[Any], data: list[str]) -> None:
        """Prints and writes a sweep over `data`: the mean over seeds of each arm and rate."""
        from _report import hardware, rich_table
        from rich.console import Console

        grid = sorted(options.grid)
        of = lambda name, rate: [r[self.metric] for r in results if (r["arm"], r["learning_rate"]) == (name, rate)]
        table = {arm.name: {rate: statistics.fmean(of(arm.name, rate)) for rate in grid} for arm in arms}
        best = {name: self.best(found, key=lambda rate: found[rate]) for name, found in table.items()}
        star = lambda name, rate: "*" if rate == best[name] else ""
        rows = [[name, *(self.show(found[rate]) + star(name, rate) for rate in grid)] for name, found in table.items()]
        title = f"{self.title} by learning rate (* best)"
        Console().print(rich_table(title, ["arm", *(f"{rate:g}" for rate in grid)], rows))
        if edges := [name for name, rate in best.items() if rate in (grid[0], grid[-1])]:
            print(f"the best of {', '.join(edges)} is at an end of the grid: widen --grid")
        sweep = {
            **{name: getattr(setting, name) for name in dict.fromkeys((*self.same, *self.near, *self.shape))},
            "data": data,
            "seeds": options.seeds,
            "machine": hardware(),
            self.plural: {name: {f"{rate:g}": found[rate] for rate in grid} for name, found in table.items()},
            "best": best,
            "interior": not edges,
        }
        (options.output / self.file.name).write_text(json.dumps({"sweeps": [sweep]}, indent=1), "utf-8")
