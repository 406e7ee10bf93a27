# Copyright (c) mmscalablevit contributors. All rights reserved.
"""The architectures by name, and the checks of what describes one."""

import difflib
import math
from collections.abc import Sequence
from numbers import Real

NUM_STAGES = 4
_SMALL = dict(
    embed_dims=(64, 128, 256, 512),
    num_heads=(2, 4, 8, 16),
    depths=(2, 2, 20, 2),
    c_ratios=(1.25, 1.25, 1.25, 1),
    sr_ratios=(8, 4, 2, 1),
    window_sizes=(7, 7, 7, 7),
    mlp_ratios=(4, 4, 4, 4),
    ssa_kv='separate',
)
_BASE = dict(
    _SMALL,
    embed_dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    depths=(2, 2, 14, 6),
    c_ratios=(2, 1.25, 1.25, 1),
)
_LARGE = dict(
    _SMALL,
    embed_dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    depths=(2, 6, 12, 4),
    c_ratios=(0.25, 0.5, 1, 1),
)
_SMALL_MERGED = dict(_SMALL, ssa_kv='merged')
ARCH_ZOO = {
    **dict.fromkeys(['s', 'small'], _SMALL),
    **dict.fromkeys(['b', 'base'], _BASE),
    **dict.fromkeys(['l', 'large'], _LARGE),
    **dict.fromkeys(['s-merged', 'small-merged'], _SMALL_MERGED),
}


def arch_settings(arch: str | dict, zoo: dict[str, dict]) -> dict:
    """Return the settings of a named arch, or of a dict after checking it.

    Raises:
        TypeError: If ``arch`` is neither.
        ValueError: If the name is unknown or a key or value is wrong; the message says what is
            allowed.

    Example:
        >>> arch_settings('base', ARCH_ZOO)['embed_dims']
        (96, 192, 384, 768)
    """
    if isinstance(arch, str):
        if arch.lower() not in zoo:
            meant = difflib.get_close_matches(arch.lower(), zoo, n=1)
            hint = f'; did you mean {meant[0]!r}?' if meant else ''
            raise ValueError(f'arch must be a dict or one of {sorted(zoo)}, got {arch!r}{hint}')
        return zoo[arch.lower()]
    if not isinstance(arch, dict):
        raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')
    keys = zoo['small'].keys()
    missing, unknown = keys - arch.keys(), arch.keys() - keys
    if missing or unknown:
        raise ValueError(
            f'arch as a dict needs exactly the keys {sorted(keys)}; '
            f'missing: {sorted(missing)}, unknown: {sorted(unknown)}'
        )
    if arch['ssa_kv'] not in ('separate', 'merged'):
        raise ValueError(f"arch['ssa_kv'] must be 'separate' or 'merged', got {arch['ssa_kv']!r}")
    numbers = {key: _stage_values(key, arch[key]) for key in keys if key != 'ssa_kv'}
    settings = dict(numbers, ssa_kv=arch['ssa_kv'])
    _check_widths(settings)
    return settings


def _stage_values(key: str, values: Sequence[float]) -> tuple[float, ...]:
    kind, wanted = (Real, 'numbers') if key in ('c_ratios', 'mlp_ratios') else (int, 'integers')
    is_sequence = isinstance(values, (list, tuple)) and len(values) == NUM_STAGES
    if not is_sequence or not all(_is_a(kind, v) and 0 < v < math.inf for v in values):
        raise ValueError(f'arch[{key!r}] must be {NUM_STAGES} positive {wanted}, got {values!r}')
    return tuple(values)


def _check_widths(arch: dict) -> None:
    for i in range(NUM_STAGES):
        dims, heads, ratio = (arch[key][i] for key in ('embed_dims', 'num_heads', 'c_ratios'))
        if dims % heads:
            raise ValueError(
                f"arch['num_heads'][{i}]={heads} does not divide arch['embed_dims'][{i}]={dims}"
            )
        if arch['sr_ratios'][i] == 1 and ratio != 1:
            raise ValueError(
                f"arch['c_ratios'][{i}] must be 1 where arch['sr_ratios'][{i}] is 1, got {ratio}"
            )
        scaled_dims = int(dims * ratio)
        if scaled_dims % heads or scaled_dims == 0:
            raise ValueError(
                f"arch['num_heads'][{i}]={heads} does not divide SSA's width "
                f'int(embed_dims * c_ratio) = int({dims} * {ratio}) = {scaled_dims}'
            )
        if int(dims * arch['mlp_ratios'][i]) == 0:
            raise ValueError(
                f"arch['mlp_ratios'][{i}]={arch['mlp_ratios'][i]} leaves the MLP no width"
            )


def check_int(name: str, value: int, low: int, high: float = math.inf) -> None:
    """Raise if ``value`` is not an integer from ``low`` to ``high``."""
    is_int = _is_a(int, value)
    if not is_int or not low <= value <= high:
        allowed = f'at least {low}' if high == math.inf else f'{low} to {high}'
        error = ValueError if is_int else TypeError
        raise error(f'{name} must be an integer of {allowed}, got {value!r}')


def check_rate(name: str, rate: float) -> None:
    """Raise if ``rate`` is not a number in [0, 1)."""
    is_number = _is_a(Real, rate)
    if not is_number or not 0 <= rate < 1:
        error = ValueError if is_number else TypeError
        raise error(f'{name} must be a number in [0, 1), got {rate!r}')


def check_out_indices(out_indices: Sequence[int]) -> None:
    """Raise if ``out_indices`` is not an ascending sequence of stages."""
    are_ints = isinstance(out_indices, (list, tuple)) and all(_is_a(int, i) for i in out_indices)
    ascending = [i for i in range(NUM_STAGES) if are_ints and i in out_indices]
    if not ascending or ascending != list(out_indices):
        raise (ValueError if are_ints else TypeError)(
            f'out_indices must be a sequence of stages of 0 to {NUM_STAGES - 1} in ascending '
            f'order, at least one, got {out_indices!r}'
        )


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
