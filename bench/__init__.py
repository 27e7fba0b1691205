"""Load tests and comparisons; each is one command that writes data and a report.

python -m bench.demo       one server unshaped, then shaped, on the same traffic
python -m bench.studies.X  what is run once a GPU, a trace or a published file
"""

from __future__ import annotations

import importlib.util
import sys

_PACKAGES = ("aiohttp", "pandas", "plotly", "pyarrow", "scipy")


def _missing() -> list[str]:
    """Packages of the `bench` extra that this Python does not have."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ImportError:
            return False

    return [name for name in _PACKAGES if not there(name)]


# Of a command (`python -m bench.X`) alone; it imports them before anything of it runs.
if sys.argv[:1] == ["-m"] and (_lacking := _missing()):
    print(
        f"bench: error: it needs {', '.join(_lacking)}, which this Python does not have: "
        f"{sys.executable} -m pip install {' '.join(_lacking)}",
        file=sys.stderr,
    )
    raise SystemExit(2)
