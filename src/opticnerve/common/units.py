"""Bytes and durations for people."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """`42 s`, `6 min 10 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2f} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_bytes(count: float) -> str:
    """`1.8 GB` (10⁹ bytes)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1e12 else f"{count / 1e9:,.0f} GB"
    return f"{count:.0f} bytes"
