"""Coefficients of the polynomials for ``2**x`` on [-1/2, 1/2], lowest power first.

Minimax polynomials for the relative error, found with Remez' exchange algorithm
(Muller, Elementary Functions, 3rd ed., section 3.5) in 60 digits, then rounded. The
degree is the smallest whose error disappears behind the rounding of the evaluation:
1.9e-9 at degree 6 for float32 (half a unit in the last place is 6.0e-8), 3.1e-18 at
degree 11 for float64 (1.1e-16). ``tests/test_numerics.py`` measures the result.
"""

from __future__ import annotations

EXP2_COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "float32": (
        1.0000000005541662993,
        0.69314720573725267536,
        0.24022646890639572134,
        0.055503287769976637639,
        0.0096184889565227915705,
        0.0013399931209474140493,
        0.00015345812158740182477,
    ),
    "float64": (
        0.9999999999999999971,
        0.69314718055994533046,
        0.24022650695910156205,
        0.055504108664819921483,
        0.0096181291075883350833,
        0.0013333558146789950323,
        0.00015403530462514613026,
        0.0000152527334899608046,
        1.3215433089594629037e-6,
        1.0178198033328527662e-7,
        7.0741056262456593708e-9,
        4.4352809446103361611e-10,
    ),
}
