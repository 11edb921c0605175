"""Units of measurement: the names of each, and its factor to a base unit.

    km/h, kilometers per hour, kph   ->   5/18 m s^-1

Only units are listed that answers have. A word that is no unit stays part of the answer.
"""

import re
from collections import defaultdict
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """The factor to the base units, and their powers, by name and sorted."""

    factor: Fraction
    powers: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return " ".join(base if power == 1 else f"{base}^{power}" for base, power in self.powers)


_TABLE = """
m        1          m meter metre
m        1000       km kilometer kilometre
m        1/100      cm centimeter centimetre
m        1/1000     mm millimeter millimetre
m        254/10000  in inch inches
m        3048/10000 ft foot feet
m        9144/10000 yd yard
m        1609344/1000 mi mile
g        1          g gram gramme
g        1000       kg kilogram
g        1/1000     mg milligram
g        1000000    tonne
pound    1          lb lbs pound £ GBP
pound    1/16       oz ounce
s        1          s sec second
s        1/1000     ms millisecond
s        60         min minute
s        3600       h hr hour
s        86400      day
s        604800     week
month    1          month
month    12         yr year
m^3      1/1000     L l liter litre
m^3      1/1000000  mL ml milliliter millilitre
gallon   1          gal gallon
gallon   1/4        quart
gallon   1/8        pint
gallon   1/16       cup
dollar   1          dollar USD $
dollar   1/100      cent ¢
euro     1          euro EUR €
yen      1          yen JPY ¥
rupee    1          rupee INR ₹
°        1          ° deg degree
°C       1          °C celsius
°F       1          °F fahrenheit
K        1          K kelvin
rad      1          rad radian
percent  1          % percent pct
N        1          N newton
J        1          J joule
J        1000       kJ kilojoule
W        1          W watt
W        1000       kW kilowatt
V        1          V volt
Pa       1          Pa pascal
Hz       1          Hz hertz
mol      1          mol mole
unit     1          unit
m/s      1397/3125  mph
m/s      5/18       kph kmh kmph
"""
"""Base unit, factor, and the names; names of more than three letters also have a plural in s."""

_WITHOUT_BASE = {"rad": Fraction(1), "percent": Fraction(1, 100)}
"""Units that are numbers -> their value."""


def _names() -> dict[str, Unit]:
    names: dict[str, Unit] = {}
    for line in _TABLE.split("\n")[1:-1]:
        base, factor, *synonyms = line.split()
        if base in _WITHOUT_BASE:
            unit = Unit(_WITHOUT_BASE[base] * Fraction(factor), ())
        else:
            length, _, power = base.partition("^")
            divisor = base.partition("/")[2]
            powers = [("m", 1), (divisor, -1)] if divisor else [(length, int(power or 1))]
            unit = Unit(Fraction(factor), tuple(sorted(powers)))
        for name in synonyms:
            names[name] = unit
            if len(name) > 3:
                names[f"{name}s"] = unit
    return names


_NAMES = _names()
_TEMPERATURE = re.compile(r"(?:degrees?|°)\s*(?:(c)(?:elsius)?|(f)(?:ahrenheit)?)\b", re.IGNORECASE)
_FACTOR = re.compile(
    r"(?P<before>square |sq |cubic |cu )?(?P<name>[A-Za-z°%€£¥₹¢$]+)\.?\s*"
    r"(?:\^\s*\{?(?P<power>-?\d)\}?|(?P<after>squared|cubed))?"
)
_POWERS = {"square ": 2, "sq ": 2, "squared": 2, "cubic ": 3, "cu ": 3, "cubed": 3}


def unit_of(text: str) -> Unit | None:
    """The unit with this name: one name, with a power if any, or several with * and / or `per`; None if it is none."""
    text = _TEMPERATURE.sub(lambda match: "°C" if match[1] else "°F", text.strip())
    factor, powers = Fraction(1), defaultdict[str, int](int)
    sign = 1
    for part in re.split(r"(\bper\b|/|\*)", text):
        if part in ("per", "/"):
            sign = -1
            continue
        if part == "*":
            continue
        match = _FACTOR.fullmatch(part.strip())
        unit = match and (_NAMES.get(match["name"]) or _NAMES.get(match["name"].casefold()))
        if not match or not unit:
            return None
        power = sign * int(match["power"] or _POWERS.get(match["before"] or match["after"] or "", 1))
        factor *= unit.factor**power
        for base, exponent in unit.powers:
            powers[base] += power * exponent
    return Unit(factor, tuple(sorted((base, power) for base, power in powers.items() if power)))
