"""Print constraints that pin every dependency of pyproject.toml to its declared lower bound.

torch is left out: its lowest version exists for CPUs only as a build that brings CUDA.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
needed = [
    requirement
    for group in (
        project["dependencies"],
        *(extras[name] for name in extras if name not in ("dev", "docs")),
    )
    for requirement in group
]
for requirement in dict.fromkeys(needed):
    bound = re.match(r"([\w-]+)>=([\w.]+)", requirement)
    if bound and bound[1] != "torch":
        print(f"{bound[1]}=={bound[2]}")
