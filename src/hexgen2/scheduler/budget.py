"""Which GPUs to rent: the mix that serves most at an hourly price, or the cheapest that serves a rate.

The mixed-integer program of `mixes` names mixes by templates of groups; the planner then plans each of a few
mixes, and only plans count: the answer is the best plan. In a rate's case the program is asked for more until a
plan reaches the rate. Every planned mix goes into one pool, so that the price/throughput frontier, read off the
pool, never falls with more money.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hexgen2.scheduler.columns import Kinds, columns
from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.mixes import Estimate, Market, Wanted
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import schedule
from hexgen2.specs.errors import InputError
from hexgen2.specs.offers import Mix, Offers
from hexgen2.specs.plan import Plan, Role

TEMPLATE_NODES = 4
"""Nodes of each offer that templates are made on: no template spans more of one kind."""
RUNG, LOWEST, HIGHEST = 1.12, 0.2, 2.0
"""Prices of the frontier are USD 1 times powers of this, in these parts of the asked (or found) price: runs for
unlike prices look at the same ones, so that more money seldom buys less from run to run either."""
ROUGHLY = 0.01
"""Part of the optimum at which the program stops for the frontier's prices."""
NEAR_OPTIMAL = 0.9
"""A mix is planned when its estimate is at least this part of the best plan so far."""
MOST_GPUS = 1024
"""GPUs rented at most, whatever is asked: larger clusters take minutes to plan."""
MOST_PLANS = 6
"""Mixes planned for the asked price beside the program's first."""
STEPS, STEP = 60, 1.005
"""How often the program is asked for a higher rate, and by how much more at least."""
MOST_TRIES = 8
"""Mixes planned while a rate is not reached."""

Watcher = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """The question: ``hourly`` USD to spend or ``rate`` requests/s to serve (one of them), GPUs at most."""

    hourly: float | None = None
    rate: float | None = None
    max_gpus: int | None = None


@dataclass(frozen=True)
class Rented:
    """A mix and its plan; ``estimate``: requests/s that the program expected of it, None where not asked."""

    mix: Mix
    price: float
    plan: Plan
    estimate: float | None = None

    @property
    def rps(self) -> float:
        return self.plan.objective.value


@dataclass(frozen=True)
class Alone:
    """What a single GPU type does on the same terms; None where it cannot meet them."""

    gpu: str
    best: Rented | None


@dataclass(frozen=True)
class Answer:
    """The best mix, each GPU type alone, and the frontier: planned mixes that serve more than any cheaper one.

    ``bound``: by the program over templates no mix serves more (asked for a price), or costs less (for a rate).
    """

    best: Rented
    bound: float
    frontier: tuple[Rented, ...]
    alone: tuple[Alone, ...]
    planned: int


def budget(
    problem: Problem, offers: Offers, asked: Asked, *, seed: int = 0, watch: Watcher = lambda _: None
) -> Answer:
    """Answer the question; InputError when no mix of the offers can.

    ``problem.cluster`` is not looked at. Deterministic for a seed.
    """
    asked = replace(asked, max_gpus=min(MOST_GPUS, asked.max_gpus or MOST_GPUS))
    search = _Search(problem, offers, asked, seed, watch)
    if asked.hourly is not None:
        best, bound = search.most_for(asked.hourly)
    else:
        assert asked.rate is not None, "a price or a rate is asked"
        best, bound = search.least_for(asked.rate)
    alone = tuple(search.alone())
    frontier = search.frontier(best)
    # A mix planned for the frontier or for one type may have turned out better than those of the question.
    best = search.winner() or best
    return Answer(best, bound, frontier, alone, search.planned)


class _Search:
    """The market, the question, and the pool of mixes planned so far."""

    def __init__(self, problem: Problem, offers: Offers, asked: Asked, seed: int, watch: Watcher) -> None:
        self.problem, self.offers, self.asked, self.seed, self.watch = problem, offers, asked, seed, watch
        self.market = _market(problem, offers, asked)
        self.pool: dict[Mix, Rented | None] = {}

    @property
    def planned(self) -> int:
        return len(self.pool)

    def plan(self, mix: Mix, estimate: float | None = None) -> Rented | None:
        """The mix with its plan; None when the planner finds that the model does not fit. Planned once."""
        if mix not in self.pool:
            price = self.offers.price(mix)
            self.watch(f"planning mix {self.planned + 1}: {self.offers.gpus(mix)} GPUs, ${price:.2f}/h")
            cluster = self.offers.cluster(mix, f"{self.offers.name}-{self.offers.gpus(mix)}-gpus")
            try:
                plan = schedule(replace(self.problem, cluster=cluster), seed=self.seed)
                self.pool[mix] = Rented(mix, price, plan, estimate)
            except InputError:  # less memory than the templates promised
                self.pool[mix] = None
        return self.pool[mix]

    def winner(self) -> Rented | None:
        """The best planned mix for the question."""
        asked = self.asked
        rented = [found for found in self.pool.values() if found is not None]
        if asked.hourly is not None:
            return self.richest(asked.hourly)
        reached = [found for found in rented if asked.rate is not None and found.rps >= asked.rate]
        return min(
            reached,
            key=lambda found: (found.price, self.offers.gpus(found.mix), -found.rps, found.mix),
            default=None,
        )

    def richest(self, hourly: float) -> Rented | None:
        """The planned mix that serves most for at most this price; of equal ones the cheapest."""
        rented = [f for f in self.pool.values() if f is not None and f.price <= hourly * (1 + 1e-9)]
        return min(rented, key=lambda found: (-found.rps, found.price, found.mix), default=None)

    def most_for(self, hourly: float) -> tuple[Rented, float]:
        """Plan the program's best mix for a price and a few near it."""
        wanted = Wanted(hourly=hourly, gpus=self.asked.max_gpus)
        first = self.market.best(wanted)
        if first is None:
            raise self._too_little(hourly)
        self.plan(first.mix, first.rps)
        estimates = {found.mix: found for found in self._variants(wanted, first)}
        for found in sorted(estimates.values(), key=lambda found: (-found.rps, found.price))[:MOST_PLANS]:
            best = self.richest(hourly)
            if best is None or found.rps >= NEAR_OPTIMAL * best.rps:
                self.plan(found.mix, found.rps)
        best = self.richest(hourly)
        if best is None:
            raise self._too_little(hourly)
        return best, first.bound

    def least_for(self, rate: float) -> tuple[Rented, float]:
        """Ask the program for the rate, then for more, until a plan reaches it; then try cheaper mixes."""
        wanted = Wanted(rate=rate, gpus=self.asked.max_gpus)
        first = self.market.best(wanted)
        best = self._reach(wanted, rate, MOST_TRIES)
        if first is None or best is None:
            raise self._too_much(rate)
        for found in sorted(self._variants(wanted, first), key=lambda found: (found.price, -found.rps)):
            if found.price < best.price * (1 - 1e-9):
                best = self._cheaper(best, self.plan(found.mix, found.rps), rate)
        return self._trimmed(best, rate), first.bound

    def alone(self) -> Iterator[Alone]:
        """The question with one GPU type at a time."""
        for gpu in dict.fromkeys(offer.gpu for offer in self.offers.offers):
            kept = [offer.gpu == gpu for offer in self.offers.offers]
            most = tuple(count if keep else 0 for count, keep in zip(self.market.most, kept, strict=True))
            wanted = Wanted(self.asked.hourly, self.asked.rate, self.asked.max_gpus, most)
            if self.asked.rate is not None:
                yield Alone(gpu, self._reach(wanted, self.asked.rate, MOST_TRIES // 2))
                continue
            found = self.market.best(wanted)
            yield Alone(gpu, None if found is None else self.plan(found.mix, found.rps))

    def frontier(self, best: Rented) -> tuple[Rented, ...]:
        """Plan mixes for prices around the asked one, or around that of the plan found for a rate.

        Then the program is asked again for the very price of each mix that serves more than all cheaper ones.
        """
        self._plan_for(_rungs(self.asked.hourly or best.price))
        self._plan_for([rented.price for rented in self._rising()])
        return self._rising()

    def _plan_for(self, prices: Sequence[float]) -> None:
        """Plan the program's mix for each price."""
        for price in prices:
            found = self.market.best(Wanted(hourly=price, gpus=self.asked.max_gpus, gap=ROUGHLY))
            if found is not None:
                self.plan(found.mix, found.rps)

    def _rising(self) -> tuple[Rented, ...]:
        """Every planned mix that serves more than all cheaper ones, by price."""
        rising: list[Rented] = []
        planned = [rented for rented in self.pool.values() if rented is not None]
        for rented in sorted(planned, key=lambda one: (one.price, -one.rps, one.mix)):
            if not rising or rented.rps > rising[-1].rps * (1 + 1e-9):
                rising.append(rented)
        return tuple(rising)

    def _variants(self, wanted: Wanted, first: Estimate) -> Iterator[Estimate]:
        """Other good mixes: other roles alone, without each offer of the first, with one node of it less."""
        kinds: tuple[tuple[Role, ...], ...] = (("colocated",), ("prefill", "decode"))
        tries = [replace(wanted, roles=frozenset(roles)) for roles in kinds]
        for place, count in enumerate(first.mix):
            for left in {0, count - 1} if count else ():
                most = tuple(left if k == place else most for k, most in enumerate(self.market.most))
                tries.append(replace(wanted, most=most))
        for trial in tries:
            found = self.market.best(trial)
            if found is not None and found.mix != first.mix:
                yield found

    def _reach(self, wanted: Wanted, rate: float, tries: int) -> Rented | None:
        """The first plan that reaches the rate, asking the program for more while plans fall short."""
        target, seen = rate, set()
        for _ in range(STEPS):
            found = self.market.best(replace(wanted, rate=target))
            if found is None:
                return None
            rented = self.plan(found.mix, found.rps)
            if rented is not None and rented.rps >= rate:
                return rented
            seen.add(found.mix)
            if len(seen) > tries:
                return None
            target *= max(STEP, min(rate / rented.rps, 1.2) if rented is not None else STEP)
        return None

    def _trimmed(self, best: Rented, rate: float) -> Rented:
        """Without a node, the dearest first, while the plan still reaches the rate."""
        order = sorted(range(len(best.mix)), key=lambda k: -self.offers.offers[k].node_price)
        for place in order:
            while best.mix[place]:
                mix = tuple(count - (k == place) for k, count in enumerate(best.mix))
                guess = self.market.best(Wanted(gpus=self.asked.max_gpus, most=mix))
                if guess is None or guess.rps < NEAR_OPTIMAL * rate:
                    break
                after = self._cheaper(best, self.plan(mix), rate)
                if after is best:
                    break
                best = after
        return best

    def _cheaper(self, best: Rented, found: Rented | None, rate: float) -> Rented:
        good = found is not None and found.rps >= rate and found.price < best.price
        return found if found is not None and good else best

    def _too_little(self, hourly: float) -> InputError:
        market = replace(self.market, most=_most(self.offers, replace(self.asked, hourly=None)))
        least = market.best(Wanted(rate=market.least_rate, gpus=self.asked.max_gpus))
        if least is None:
            return self._nothing_holds()
        return InputError(
            "--hourly",
            "",
            f"{hourly:g} USD rent nothing of {self.problem.source} that holds {self.problem.model.name}",
            f"give at least {least.price:.2f}",
        )

    def _too_much(self, rate: float) -> InputError:
        most = self.market.best(Wanted(gpus=self.asked.max_gpus))
        if most is None:
            return self._nothing_holds()
        return InputError(
            "--rate",
            "",
            f"{rate:g} requests/s are more than the GPUs of {self.problem.source} that can be had serve, "
            f"about {most.rps:.3g}",
            "lower the rate, or raise available or --max-gpus",
        )

    def _nothing_holds(self) -> InputError:
        return InputError(
            self.problem.source,
            "offers",
            f"no mix of them holds {self.problem.model.name} in a group that the engine profile "
            f"{self.problem.engine.name!r} can run",
            "offer larger GPUs or more nodes, raise --max-gpus, or take a smaller or quantised model",
        )


def _rungs(centre: float) -> list[float]:
    """Prices around one, rising."""
    if centre <= 0:
        return []
    first, last = (math.log(centre * part, RUNG) for part in (LOWEST, HIGHEST))
    return [RUNG**step for step in range(math.ceil(first), math.floor(last) + 1)]


def _market(problem: Problem, offers: Offers, asked: Asked) -> Market:
    """The templates of the offers."""
    mix = tuple(min(TEMPLATE_NODES, offer.available) for offer in offers.offers)
    evaluator = Evaluator(replace(problem, cluster=offers.cluster(mix)), best_rate)
    labels = tuple(place for place, count in enumerate(mix) for _ in range(count))
    found = columns(evaluator, Kinds(evaluator.topology, labels=labels))
    kv_bytes = float(problem.lengths.inputs.mean()) * problem.model.kv_bytes_per_token
    return Market(offers, tuple(found), kv_bytes, _most(offers, asked))


def _most(offers: Offers, asked: Asked) -> Mix:
    """Nodes of each offer that can be had, and paid for up to the frontier's end."""
    limits: list[int] = []
    for offer in offers.offers:
        most = offer.available
        if asked.max_gpus is not None:
            most = min(most, asked.max_gpus // offer.count)
        if asked.hourly is not None and offer.node_price > 0:
            most = min(most, int(asked.hourly * HIGHEST / offer.node_price * (1 + 1e-9)))
        limits.append(most)
    return tuple(limits)
