"""Facts that come from tables: capital cities and the arithmetic of small numbers."""

from __future__ import annotations

from .facts import Fact, capitalised

CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Brazil": "Brasilia", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana", "Czechia": "Prague",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London", "Estonia": "Tallinn",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta",
    "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga", "Lithuania": "Vilnius", "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu", "New Zealand": "Wellington",
    "Nigeria": "Abuja", "Norway": "Oslo", "Pakistan": "Islamabad", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Romania": "Bucharest", "Russia": "Moscow", "Scotland": "Edinburgh",
    "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "South Korea": "Seoul",
    "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok", "Turkey": "Ankara",
    "Ukraine": "Kyiv", "the United Kingdom": "London", "the United States": "Washington",
    "Vietnam": "Hanoi", "Wales": "Cardiff",
}  # fmt: skip

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip


def capital_facts() -> list[Fact]:
    """For each country: what its capital is; for each capital: which country it belongs to."""
    facts: list[Fact] = []
    owners: dict[str, list[str]] = {}
    for country, city in CAPITALS.items():
        owners.setdefault(city, []).append(country)
        facts.append(
            Fact(
                "capitals",
                (
                    f"What is the capital of {country}?",
                    f"What is the capital city of {country}?",
                    f"Which city is the capital of {country}?",
                    f"Tell me the capital of {country}.",
                    f"Name the capital of {country}.",
                    f"Capital of {country}?",
                    f"Do you know the capital of {country}?",
                    f"The capital of {country}?",
                    f"What's the capital of {country}?",
                ),
                f"The capital of {country} is {city}.",
            )
        )
    for city, countries in owners.items():
        if len(countries) == 1:
            country = countries[0]
            facts.append(
                Fact(
                    "capitals",
                    (
                        f"What is {city}?",
                        f"Where is {city}?",
                        f"Which country has the capital {city}?",
                        f"In which country is {city}?",
                    ),
                    f"{city} is the capital of {country}.",
                )
            )
    return facts


def _sum_fact(a: int, b: int, sign: str, words: tuple[str, ...], result: int) -> Fact:
    asked = [f"What is {a} {word} {b}?" for word in words] + [
        f"{a} {sign} {b}",
        f"{a} {sign} {b} = ?",
        f"{a}{sign}{b}",
        f"What is {a}{sign}{b}?",
        f"{a} {sign} {b}?",
        f"What is {a} {sign} {b}?",
        f"How much is {a} {words[0]} {b}?",
        f"Calculate {a} {sign} {b}.",
    ]
    if a < len(NUMBERS) and b < len(NUMBERS):
        asked.append(f"What is {NUMBERS[a]} {words[0]} {NUMBERS[b]}?")
    return Fact("arithmetic", tuple(asked), f"{a} {words[0]} {b} is {result}.")


def arithmetic_facts() -> list[Fact]:
    """Sums and differences up to 20 and the table of products up to 10 by 10."""
    facts: list[Fact] = []
    for a in range(11):
        for b in range(11):
            facts.append(_sum_fact(a, b, "+", ("plus", "and"), a + b))
            facts.append(_sum_fact(a + b, b, "-", ("minus", "less"), a))
            facts.append(_sum_fact(a, b, "*", ("times", "multiplied by"), a * b))
    return facts


def counting_facts() -> list[Fact]:
    """Counting up and down, and the neighbours of a number."""
    facts: list[Fact] = []
    for n in range(3, 13):
        up = ", ".join(NUMBERS[1 : n + 1])
        facts.append(
            Fact(
                "counting",
                (
                    f"Count to {NUMBERS[n]}.",
                    f"Count to {n}.",
                    f"Can you count to {NUMBERS[n]}?",
                    f"Count from 1 to {n}.",
                ),
                capitalised(up) + ".",
            )
        )
    for n in range(1, 20):
        facts.append(
            Fact(
                "counting",
                (f"What comes after {n}?", f"Which number comes after {n}?"),
                f"After {n} comes {n + 1}.",
            )
        )
        facts.append(
            Fact(
                "counting",
                (f"What comes before {n}?", f"Which number comes before {n}?"),
                f"Before {n} comes {n - 1}.",
            )
        )
    return facts
