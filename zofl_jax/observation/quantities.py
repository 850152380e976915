"""Bytes and counts as people write them, in figures and in tables."""


def human_bytes(count: float) -> str:
    """Returns a number of bytes as people write it, in powers of 1000.

    >>> human_bytes(0), human_bytes(1500), human_bytes(2e6)
    ('0 B', '1.5 kB', '2 MB')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    power = 0
    # 999.5 would be written as 1e+03.
    while abs(count) >= 999.5 and power < len(units) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g} {units[power]}"


def human_count(count: float) -> str:
    """Returns a number as people write it, in powers of 1000.

    >>> human_count(7), human_count(43210), human_count(2.5e6)
    ('7', '43.2 k', '2.5 M')
    """
    return human_bytes(count).removesuffix("B").rstrip()
