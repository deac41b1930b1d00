"""Lists of other projects' names, as the inventories that intersphinx reads.

A line of ``python.txt`` and its like has a name, its role, and the page that describes
it, below the address in conf.py. ``$`` in the page stands for the name.
"""

import zlib
from pathlib import Path


def write_inventory(source: Path, target: Path) -> Path:
    """Write a list of names as an inventory of Sphinx's second version.

    Args:
        source: The list.
        target: Where to write.

    Returns:
        The target.
    """
    entries = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, role, page = line.split()
            entries.append(f"{name} {role} 1 {page} -")
    head = (
        "# Sphinx inventory version 2\n"
        f"# Project: {source.stem}\n"
        "# Version: \n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    body = zlib.compress("\n".join([*entries, ""]).encode())
    target.write_bytes(head.encode() + body)
    return target
