"""The web page of the top-level folder `app/`, as `unique_asr.app.<name>`.

That folder has no `__init__.py`: `app` is a name that other projects use too, and the page is imported by this one
alone. Installed, the wheel holds its files here.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]

if (_CHECKOUT / "pyproject.toml").is_file():  # elsewhere a folder `app` may be anybody's
    __path__.append(str(_CHECKOUT / "app"))
